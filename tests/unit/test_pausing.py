"""A paused request gets no step and holds up nobody; it goes on with the tokens it has alone."""

from __future__ import annotations

from typing import Any

import pytest

from engines import Results, all_free, lm_in_float64, run
from handloom.engine import Engine
from tiny_models import random_ids

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}
PROMPTS = [random_ids(i, length) for i, length in enumerate((20, 14, 9))]


def alone(prompt: list[int]) -> list[int]:
    tokens: list[int] = lm_in_float64().generate(prompt, **GREEDY).token_ids
    return tokens


@pytest.mark.parametrize("steps", [0, 1, 2, 9], ids=["waiting", "in its prompt", "later", "choosing"])
@pytest.mark.parametrize("num_pages", [100, 11], ids=["roomy", "tight"])
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[1]], ids=["the same prompt", "another"])
def test_others_go_on_to_their_end_while_it_is_paused(prompt: list[int], num_pages: int, steps: int) -> None:
    lm = lm_in_float64(num_pages)
    engine, results = Engine(lm, max_step_tokens=8), Results()
    first = engine.add_request(PROMPTS[0], **GREEDY)
    for _ in range(steps):
        results.take(engine.step())
    before = list(results.tokens.get(first, []))
    assert engine.pause(first) and not engine.has_work
    assert engine.step() == []
    others = [engine.add_request(ids, **GREEDY) for ids in (prompt, PROMPTS[2])]
    run(engine, results)
    assert results.ends.keys() == set(others)
    assert results.tokens.get(first, []) == before
    assert engine.resume(first)
    run(engine, results)
    assert [results.tokens[request] for request in (first, *others)] == [*map(alone, (PROMPTS[0], prompt, PROMPTS[2]))]
    assert all_free(lm)


def test_a_paused_request_can_be_aborted_and_frees_its_pages() -> None:
    lm = lm_in_float64()
    engine = Engine(lm)
    request = engine.add_request(PROMPTS[0], **GREEDY)
    engine.step()
    assert engine.pause(request) and engine.abort(request)
    assert all_free(lm) and not engine.resume(request) and not engine.has_work


def test_pausing_inside_a_step_holds_from_the_next_one() -> None:
    lm = lm_in_float64()
    engine, results = Engine(lm), Results()

    def pause(input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] == len(PROMPTS[0]) + 3:
            assert engine.pause(request)
        return scores

    request = engine.add_request(PROMPTS[0], logits_processor=[pause], **GREEDY)
    run(engine, results)
    assert results.tokens[request] == alone(PROMPTS[0])[:4]
    engine.resume(request)
    run(engine, results)
    assert results.tokens[request] == alone(PROMPTS[0])
    assert all_free(lm)
