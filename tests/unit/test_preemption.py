"""Pages that run out: they are taken from whoever comes last, who is computed again and ends with the same tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from engines import Results, all_free, lm_in_float64, lm_with, run
from handloom.cache.sequence import Sequence
from handloom.decoding.score import ScoreDecoder
from handloom.engine import Engine
from handloom.errors import InvalidParam, NonFiniteLogits, OutOfPages
from handloom.lm import LM
from tiny_models import random_ids

PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 3, 20, 6))]
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": []}
SAMPLED: dict[str, Any] = {**GREEDY, "do_sample": True, "temperature": 1.3, "top_k": 0}


class Watched(Engine):
    """Counts how often each running request had to stop. It is computed again then, unless host memory is given."""

    def __init__(self, lm: LM, *, spill_bytes: int | None = 0, **limits: int) -> None:
        super().__init__(lm, spill_bytes=spill_bytes, **limits)
        self.stops: Counter[int] = Counter()

    def step(self) -> list[Any]:
        before = {request.id for request in self.scheduler.running}
        events = super().step()
        self.stops.update(before & {request.id for request in self.scheduler.waiting})
        return events


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "limits",
    [{}, {"max_step_tokens": 5}, {"spill_bytes": None}, {"max_step_tokens": 5, "spill_bytes": 9_000}],
    ids=["whole", "chunks", "spilled", "some spilled"],
)
def test_a_request_that_was_stopped_and_computed_again_has_the_tokens_it_has_alone(
    family: str, options: dict[str, Any], limits: dict[str, Any]
) -> None:
    """Float64, since prefill and decode round differently: see `lm_in_float64`."""
    roomy, tight = lm_in_float64(family=family), lm_in_float64(12, family=family)
    alone = [roomy.generate(prompt, seed=i, **options) for i, prompt in enumerate(PROMPTS)]
    engine = Watched(tight, **limits)
    requests = [engine.add_request(prompt, seed=i, **options) for i, prompt in enumerate(PROMPTS)]
    results = run(engine)
    assert engine.stops.total() > 0, "nobody was stopped, so nothing was proven"
    assert [results.tokens[request] for request in requests] == [output.token_ids for output in alone]
    assert [results.texts[request] for request in requests] == [output.text for output in alone]
    assert all_free(tight)


def test_the_first_request_is_never_stopped_and_the_last_is_stopped_first() -> None:
    engine = Watched(lm_with(12))
    requests = [engine.add_request(prompt, **GREEDY) for prompt in PROMPTS]
    while not engine.stops:
        running = [request.id for request in engine.scheduler.running]
        assert running == sorted(running)
        engine.step()
    stopped = sorted(engine.stops)
    assert stopped == running[-len(stopped) :] and len(stopped) < len(running)
    run(engine)
    assert engine.stops[requests[0]] == 0


def test_a_request_of_higher_priority_takes_the_pages_of_lower_ones_and_they_go_on_afterwards() -> None:
    lm = lm_in_float64(10)
    engine, results = Watched(lm), Results()
    low = [engine.add_request(PROMPTS[i], priority=-1, **GREEDY) for i in (0, 1)]
    for _ in range(8):
        results.take(engine.step())
    assert len(results.tokens[low[0]]) == 8
    high = engine.add_request(PROMPTS[4], priority=5, **GREEDY)
    order: list[int] = []
    while engine.has_work:
        events = engine.step()
        results.take(events)
        order += [event.request_id for event in events if event.request_id in results.ends]
    assert order[0] == high
    assert engine.stops[high] == 0 < engine.stops[low[1]]
    for request, i in ((low[0], 0), (low[1], 1), (high, 4)):
        assert results.tokens[request] == lm_in_float64().generate(PROMPTS[i], **GREEDY).token_ids


def test_priorities_decide_who_waits_and_equals_keep_their_order() -> None:
    engine, results = Engine(lm_with(), max_running=1), Results()
    ids = [engine.add_request([5, 6], priority=p, max_new_tokens=2, eos_token_id=[]) for p in (0, 1, 0, 1, -3)]
    order: list[int] = []
    while engine.has_work:
        events = engine.step()
        results.take(events)
        order += [event.request_id for event in events if type(event).__name__ == "FinishedEvent"]
    assert order == [ids[1], ids[3], ids[0], ids[2], ids[4]]


@pytest.mark.parametrize("priority", [True, 1.0, "high", None])
def test_a_priority_that_is_no_integer_is_refused(priority: Any) -> None:
    engine = Engine(lm_with())
    with pytest.raises(InvalidParam, match="priority"):
        engine.add_request([5], priority=priority)
    assert not engine.has_work


# Other decoders and other people's sequences ----------------------------------------------------------


def test_a_callers_sequence_gives_its_pages_and_gets_them_back_and_its_fork_keeps_its_own() -> None:
    lm = lm_in_float64(12)
    sequence = lm.sequence(PROMPTS[1])
    _ = sequence.logits
    fork = sequence.fork()
    held = list(fork.page_table)
    engine = Watched(lm)
    first = engine.add_request(PROMPTS[3], **{**GREEDY, "max_new_tokens": 12})
    second = engine.add_request(sequence, **{**GREEDY, "max_new_tokens": 12})
    results = run(engine)
    assert engine.stops[second] > 0
    assert fork.page_table == held
    for request, i in ((first, 3), (second, 1)):
        alone = lm_in_float64().generate(PROMPTS[i], **{**GREEDY, "max_new_tokens": 12}).token_ids
        assert results.tokens[request] == alone
    assert sequence.token_ids == PROMPTS[1] + results.tokens[second]
    assert len(sequence.page_table) == -(-sequence.num_computed // 4)
    for own in (sequence, fork):
        own.free()
    assert all_free(lm)


def test_a_computed_sequence_that_waits_gives_its_pages_rather_than_fail_the_only_request_that_runs() -> None:
    lm = lm_in_float64(8)
    sequence = lm.sequence(PROMPTS[1])
    _ = sequence.logits
    options = {**GREEDY, "max_new_tokens": 11}
    outputs = lm.generate([PROMPTS[3], sequence], **options)
    for i, output in zip((3, 1), outputs, strict=True):
        assert (output.error, output.token_ids) == (None, lm_in_float64().generate(PROMPTS[i], **options).token_ids)


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": 0}], ids=["plain", "prompt logprobs"])
def test_a_computed_sequence_that_has_to_wait_stays_whole(options: dict[str, Any]) -> None:
    lm = lm_in_float64(9)
    with lm.sequence(PROMPTS[1]) as sequence:
        _ = sequence.logits
        engine = Engine(lm)
        engine.add_request(random_ids(8, 17), **{**GREEDY, "max_new_tokens": 3})
        engine.step()
        waiting = engine.add_request(sequence, **{**GREEDY, "max_new_tokens": 12, **options})
        engine.step()
        assert [request.id for request in engine.scheduler.waiting] == [waiting]
        assert len(sequence.page_table) == -(-sequence.num_computed // 4)
        results = run(engine)
        assert results.tokens[waiting] == lm_in_float64().generate(PROMPTS[1], **GREEDY).token_ids[:12]
    assert all_free(lm)


@pytest.mark.parametrize("budget", [3, 512])
def test_prompt_logprobs_of_a_stopped_request_are_told_once_each(budget: int) -> None:
    """Its prompt is stopped in the middle, by a request of higher priority."""
    lm = lm_in_float64(8)
    options = {**GREEDY, "max_new_tokens": 6, "prompt_logprobs": 0}
    expected = lm_in_float64().generate(PROMPTS[3], **options)
    engine = Watched(lm, max_step_tokens=budget)
    told: dict[int, list[float]] = {}
    tokens: list[int] = []
    asked = engine.add_request(PROMPTS[3], **options)
    steps = 0
    while engine.has_work:
        for event in engine.step():
            if hasattr(event, "logprobs"):
                told.setdefault(event.request_id, []).extend(event.logprobs)
            elif hasattr(event, "token_id") and event.request_id == asked:
                tokens.append(event.token_id)
        steps += 1
        if steps == 2:
            engine.add_request(PROMPTS[1], priority=1, max_new_tokens=8)
    assert engine.stops[asked] > 0
    assert told[asked] == pytest.approx(expected.prompt_logprobs, rel=1e-6)
    assert tokens == expected.token_ids


def test_scores_of_a_stopped_request_are_told_once_each() -> None:
    lm = lm_in_float64(8)
    expected = lm_in_float64().score(PROMPTS[3]).logprobs
    engine = Watched(lm, max_step_tokens=3)
    scored = engine.add(ScoreDecoder(Sequence(lm.pool, PROMPTS[3])))
    told: list[float] = []
    for steps in range(200):
        if steps == 3:
            engine.add_request(PROMPTS[1], priority=1, max_new_tokens=8)
        for event in engine.step():
            if event.request_id == scored and hasattr(event, "logprobs"):
                told += event.logprobs
    assert engine.stops[scored] > 0
    assert told == pytest.approx(expected, rel=1e-6)
    assert all_free(lm)


# Failure ---------------------------------------------------------------------------------------------


def test_a_request_too_long_for_the_whole_pool_fails_alone_and_says_what_to_do() -> None:
    lm = lm_with(12)
    outputs = lm.generate([PROMPTS[0], PROMPTS[3], PROMPTS[2]], params=[{}, {"max_new_tokens": 29}, {}], **GREEDY)
    assert isinstance(outputs[1].error, OutOfPages)
    assert "may grow to 49 tokens, and the KV cache holds 12 pages of 4; ask for fewer max_new_tokens" in str(
        outputs[1].error
    )
    assert [output.error for output in outputs[::2]] == [None, None]
    assert all_free(lm)


def test_a_processor_that_fails_after_its_request_was_stopped_fails_alone() -> None:
    lm = lm_in_float64(12)
    calls: list[int] = []

    def failing(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(input_ids.shape[1])
        return scores if input_ids.shape[1] < len(PROMPTS[3]) + 20 else scores * torch.nan

    engine = Watched(lm)
    others = [engine.add_request(prompt, **GREEDY) for prompt in PROMPTS[:3]]
    bad = engine.add_request(PROMPTS[3], logits_processor=[failing], **GREEDY)
    results = run(engine)
    assert engine.stops[bad] > 0
    assert isinstance(results.ends[bad].error, NonFiniteLogits)
    assert len(results.tokens[bad]) == 20
    assert calls == sorted(set(calls)), "a token was chosen twice"
    for i, other in enumerate(others):
        assert results.tokens[other] == lm_in_float64().generate(PROMPTS[i], **GREEDY).token_ids
    assert all_free(lm)


def test_abort_of_a_stopped_request_leaves_nothing_behind() -> None:
    lm = lm_with(12)
    engine = Watched(lm)
    requests = [engine.add_request(prompt, **GREEDY) for prompt in PROMPTS]
    while not engine.stops:
        engine.step()
    (stopped,) = engine.stops
    held = lm.pool.num_free
    assert engine.abort(stopped)
    assert lm.pool.num_free == held, "it held nothing"
    results = run(engine)
    assert stopped not in results.ends
    assert results.ends.keys() <= set(requests)
    assert all_free(lm)
