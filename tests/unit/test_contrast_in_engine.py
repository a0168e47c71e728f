"""Decoding by contrast among other requests: the tokens it has alone, whoever shares the step, where pages run out, and
pages that are free again at the end."""

from __future__ import annotations

from typing import Any

import pytest

from engines import Results, all_free, lm_in_float64, lm_with, run
from handloom.collect import Collector
from handloom.engine import Engine
from handloom.lm import LM
from handloom.output import Output
from tiny_models import random_ids

EOS = list(range(4, 331, 30))
LONG = random_ids(1, 30)
REQUESTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "guided": (random_ids(1, 13), {"guidance_scale": 1.7, "negative_prompt_ids": random_ids(2, 21)}),
    "plain": (random_ids(2, 9), {"max_new_tokens": 20}),
    "guided by its last token": (LONG, {"guidance_scale": 3.0, "eos_token_id": EOS}),
    "guided samples": (random_ids(4, 6), {"guidance_scale": 1.4, "num_return_sequences": 3, "seed": 1}),
    "guided beams": (random_ids(5, 11), {"guidance_scale": 1.3, "num_beams": 3, "eos_token_id": EOS}),
    "guided away from it": (random_ids(6, 5), {"guidance_scale": 1.5, "negative_prompt_ids": LONG}),
    "contrastive": (random_ids(8, 13), {"penalty_alpha": 0.6, "top_k": 4}),
    "contrastive to an end": (LONG[:17], {"penalty_alpha": 0.3, "top_k": 3, "eos_token_id": EOS}),
    "DoLa": (LONG, {"dola_layers": "high"}),
    "DoLa, sampled": (random_ids(1, 13), {"dola_layers": [0, 1], "seed": 4, "logprobs": 2}),
    "sampled": (random_ids(7, 8), {"seed": 3, "top_k": 20}),
}
STOPS = [{1}, {2, 12}, {3, 9}, {5, 8, 30}]  # steps after which pages are taken


def gist(output: Output) -> tuple[Any, ...]:
    return output.token_ids, output.text, output.finish_reason


def together(lm: LM, **limits: Any) -> Collector:
    collector = Collector(Engine(lm, **limits))
    for prompt, options in REQUESTS.values():
        collector.add(prompt, **{"max_new_tokens": 12, "eos_token_id": [], **options})
    list(collector.pieces())
    return collector


def alone(lm: LM) -> list[Output]:
    outputs: list[Output] = []
    for prompt, options in REQUESTS.values():
        outputs += lm.generate([prompt], **{"max_new_tokens": 12, "eos_token_id": [], **options})
    return outputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "limits",
    [{}, {"max_step_tokens": 7}, {"prefix_cache": False}, {"max_running": 2}, {"max_running": 3, "max_step_tokens": 3}],
    ids=str,
)
def test_a_requests_tokens_are_those_it_has_alone(family: str, limits: dict[str, Any]) -> None:
    """Float64, since a chunked prefill rounds differently: see `lm_in_float64`."""
    expected = alone(lm_in_float64(family=family))
    lm = lm_in_float64(family=family)
    assert [gist(o) for o in together(lm, **limits).outputs] == [gist(o) for o in expected]
    assert all_free(lm)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("pages", [26, 36])
@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 7}, {"prefix_cache": False}, {"spill_bytes": 0}], ids=str)
def test_requests_that_gave_their_pages_up_have_the_same_tokens(
    family: str, pages: int, limits: dict[str, Any]
) -> None:
    expected = alone(lm_in_float64(family=family))
    tight = lm_in_float64(pages, family=family)
    collector = together(tight, **limits)
    assert collector.engine.stats().num_preempted > 0, "nobody was stopped, so nothing was proven"
    assert [gist(o) for o in collector.outputs] == [gist(o) for o in expected]
    assert all_free(tight)


@pytest.mark.parametrize("spill_bytes", [0, None])
@pytest.mark.parametrize("max_step_tokens", [7, 512])
@pytest.mark.parametrize("name", REQUESTS)
def test_one_that_gives_its_pages_up_at_some_step_has_the_same_tokens(
    name: str, max_step_tokens: int, spill_bytes: int | None
) -> None:
    prompt, own = REQUESTS[name]
    options = {"max_new_tokens": 8, "eos_token_id": [], **own}
    expected = lm_in_float64().generate([prompt], **options)
    for stops in STOPS:
        lm = lm_in_float64()
        collector = Collector(Engine(lm, max_step_tokens=max_step_tokens, spill_bytes=spill_bytes, prefix_cache=False))
        collector.add(prompt, **options)
        engine, steps = collector.engine, 0
        while engine.has_work:
            for event in engine.step():
                list(collector._requests[event.request_id].record(event))
            steps += 1
            if steps in stops and engine.scheduler.running:
                engine.scheduler._preempt(engine.scheduler.running[0])
        assert engine.stats().num_preempted > 0
        assert [gist(o) for o in collector.outputs] == [gist(o) for o in expected]
        assert all_free(lm)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("steps", range(0, 9, 2))
def test_one_that_is_aborted_frees_its_pages_and_leaves_the_others_their_tokens(name: str, steps: int) -> None:
    lm = lm_with(200, 4)
    options = {"max_new_tokens": 12, "eos_token_id": []}
    prompt, own = REQUESTS[name]
    expected = lm.generate(random_ids(9, 9), **options)
    engine = Engine(lm, max_step_tokens=16)
    results = Results()
    leaves = engine.add_request(prompt, **{**options, **own})
    stays = engine.add_request(random_ids(9, 9), **options)
    for _ in range(steps):
        events = engine.step()
        results.take(event for event in events if event.request_id == stays)
    assert engine.abort(leaves)
    run(engine, results)
    assert results.tokens[stays] == expected.token_ids
    assert all_free(lm)


@pytest.mark.parametrize("name", [name for name in REQUESTS if name.startswith("guided")])
def test_a_prompt_is_taken_over_from_the_prefix_cache_and_so_is_a_negative_one(name: str) -> None:
    lm = lm_with(200, 4)
    prompt, own = REQUESTS[name]
    options = {"max_new_tokens": 3, "eos_token_id": [], **own}
    engine = Engine(lm)
    engine.add_request(prompt, **options)
    list(engine.run())
    computed = engine.stats().num_computed
    engine.add_request(prompt, **options)
    list(engine.run())
    negative = options.get("negative_prompt_ids", prompt[-1:])
    shared = sum((len(ids) - 1) // 4 * 4 for ids in (prompt, negative))
    assert engine.stats().num_computed - computed == computed - shared
