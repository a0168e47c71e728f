"""Beams among other requests: the outputs they have alone, whoever shares the step, and where pages run out."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import permutations
from typing import Any

import pytest
import torch

from engines import all_free, lm_in_float64, lm_with
from handloom.cache.sequence import Sequence
from handloom.collect import Collector
from handloom.decoding.beam import BeamDecoder
from handloom.decoding.beams import chain
from handloom.decoding.branches import Branches
from handloom.decoding.decoder import TokenEvent
from handloom.engine import Engine
from handloom.engine.prepare import resolve
from handloom.lm import LM
from handloom.output import Output
from handloom.sampling.rng import sample_without_replacement
from tiny_models import random_ids

EOS = list(range(4, 331, 30))
GROUPS: dict[str, Any] = {"num_beam_groups": 2, "diversity_penalty": 0.7}
WORDS = [[5, 6], [[9], [10, 11]]]
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (random_ids(1, 13), {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": EOS}),
    (random_ids(2, 9), {"max_new_tokens": 20, "eos_token_id": []}),
    (random_ids(3, 30), {"num_beams": 3, "eos_token_id": [], "repetition_penalty": 1.4}),
    (random_ids(4, 6), {"num_return_sequences": 4, "seed": 1, "eos_token_id": EOS[:2]}),
    (random_ids(5, 11), {"num_beams": 5, "seed": 2, "eos_token_id": EOS[:3], "early_stopping": "never"}),
    (random_ids(1, 13), {"num_beams": 2, "length_penalty": 0.0, "eos_token_id": EOS}),
    (random_ids(6, 12), {"num_beams": 4, **GROUPS, "num_return_sequences": 4, "eos_token_id": EOS}),
    (random_ids(7, 10), {"num_beams": 3, "force_words_ids": WORDS, "num_return_sequences": 2, "eos_token_id": EOS}),
]
STOPS = {3, 7, 12, 18, 40, 60, 85, 120}  # steps after which pages are taken


def gist(output: Output) -> tuple[Any, ...]:
    beams = None if output.beams is None else (round(output.beams.score, 4), output.beams.beam_indices)
    return output.token_ids, output.text, output.finish_reason, beams


def together(lm: LM, **limits: Any) -> Collector:
    collector = Collector(Engine(lm, **limits))
    for prompt, options in REQUESTS:
        collector.add(prompt, **{"max_new_tokens": 12, **options})
    list(collector.pieces())
    return collector


def alone(lm: LM) -> list[Output]:
    outputs: list[Output] = []
    for prompt, options in REQUESTS:
        outputs += lm.generate([prompt], **{"max_new_tokens": 12, **options})
    return outputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "limits",
    [{}, {"max_step_tokens": 7}, {"prefix_cache": False}, {"max_running": 2}, {"max_running": 3, "max_step_tokens": 3}],
    ids=str,
)
def test_beams_among_others_have_the_outputs_they_have_alone(family: str, limits: dict[str, Any]) -> None:
    """Float64, since a chunked prefill rounds differently: see `lm_in_float64`."""
    expected = alone(lm_in_float64(family=family))
    lm = lm_in_float64(family=family)
    assert [gist(o) for o in together(lm, **limits).outputs] == [gist(o) for o in expected]
    assert all_free(lm)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("pages", [24, 28])
@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 7}, {"prefix_cache": False}, {"spill_bytes": 0}], ids=str)
def test_beams_that_gave_their_pages_up_have_the_same_outputs(family: str, pages: int, limits: dict[str, Any]) -> None:
    """What the beams of a request have in common is computed again once, or 28 pages would not hold five of them."""
    expected = alone(lm_in_float64(family=family))
    tight = lm_in_float64(pages, family=family)
    collector = together(tight, **limits)
    assert collector.engine.stats().num_preempted > 0, "nobody was stopped, so nothing was proven"
    assert [gist(o) for o in collector.outputs] == [gist(o) for o in expected]
    assert all_free(tight)


@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 3}, {"max_step_tokens": 2, "spill_bytes": 0}], ids=str)
@pytest.mark.parametrize("kind", [{}, {**GROUPS, "eos_token_id": EOS[:2]}, {"force_words_ids": WORDS}], ids=str)
def test_beams_stopped_again_and_again_have_the_same_outputs(kind: dict[str, Any], limits: dict[str, Any]) -> None:
    """Whatever they were doing: computing what they have in common, or waiting for the rows of the others."""
    options = {
        "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 14, "eos_token_id": [], "logprobs": 1, **kind,
    }  # fmt: skip
    prompt = random_ids(7, 22)
    expected = lm_in_float64().generate(prompt, **options)
    lm = lm_in_float64(40)
    collector = Collector(Engine(lm, prefix_cache=False, **limits))
    collector.add(prompt, **options)
    scheduler, steps = collector.engine.scheduler, 0
    while collector.engine.has_work:
        for event in collector.engine.step():
            list(collector._requests[event.request_id].record(event))
        steps += 1
        if steps in STOPS and scheduler.running:
            scheduler._preempt(scheduler.running[0])
    assert collector.engine.stats().num_preempted > 2, "too seldom to prove anything"
    assert [gist(o) for o in collector.outputs] == [gist(o) for o in expected]
    assert all_free(lm)


def test_the_prompt_runs_once_beams_share_its_pages_and_a_cached_prefix_too() -> None:
    lm, prompt = lm_with(200, 4), random_ids(1, 41)
    engine = Engine(lm)
    engine.add_request(prompt, num_beams=8, max_new_tokens=5, eos_token_id=[])
    engine.step()
    assert engine.stats().num_computed == 41
    used = []
    while engine.has_work:
        engine.step()
        used.append(engine.stats().pages_used)
    assert engine.stats().num_computed == 41 + 8 * 4
    assert max(used) <= 10 + 8 * 2, "ten full pages for all, and for each no more than what it wrote"
    engine.add_request([*prompt, 5], num_beams=3, max_new_tokens=1, eos_token_id=[])
    list(engine.run())
    assert engine.stats().num_computed == 41 + 8 * 4 + 2, "ten pages were there"
    assert all_free(lm)


@pytest.mark.parametrize("kind", [{}, GROUPS, {"force_words_ids": WORDS}], ids=str)
def test_an_aborted_search_frees_its_pages(kind: dict[str, Any]) -> None:
    lm = lm_with(100, 4)
    engine = Engine(lm)
    request = engine.add_request(random_ids(1, 20), num_beams=6, max_new_tokens=30, eos_token_id=[], **kind)
    for _ in range(4):
        engine.step()
    assert not all_free(lm) and engine.abort(request) and all_free(lm)


def test_a_request_that_cannot_ever_fit_ends_with_an_error_that_says_so() -> None:
    lm = lm_with(8, 4)
    output = lm.generate([random_ids(1, 20)], num_beams=12, max_new_tokens=9, eos_token_id=[])[0]
    assert output.finish_reason == "error" and "kv_cache_tokens" in str(output.error)
    assert all_free(lm)


@pytest.mark.parametrize("kind", [{}, {"num_beam_groups": 3, "diversity_penalty": 0.1}, {"force_words_ids": WORDS}])
def test_a_stream_gives_only_what_no_longer_changes_and_in_the_end_everything(kind: dict[str, Any]) -> None:
    lm, early = lm_with(), 0
    for seed in range(6):
        options: dict[str, Any] = {
            "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 30, "eos_token_id": [7], **kind,
        }  # fmt: skip
        expected = lm.generate(random_ids(seed, 9), **options)
        collector = Collector(Engine(lm))
        collector.add(random_ids(seed, 9), **options)
        tokens: dict[int, list[int]] = defaultdict(list)
        texts: dict[int, str] = defaultdict(str)
        for piece in collector.pieces():
            texts[piece.sample] += piece.text
            if piece.token_id is not None:
                tokens[piece.sample].append(piece.token_id)
                early += any(not request.over for request in collector.engine._alive.values())
        for sample, output in enumerate(expected):
            assert (tokens[sample], texts[sample]) == (output.token_ids, output.text)
    assert early > 0, "nothing came before the end"


def test_what_ended_too_low_to_ever_be_an_output_holds_no_token_back() -> None:
    lm, earlier = lm_with(), 0
    for seed in range(8):
        search = _decoder(lm, random_ids(seed, 9), num_beams=3)
        engine = Engine(lm)
        engine.add(search)
        told: list[int] = []
        while engine.has_work:
            told += [event.token_id for event in engine.step() if isinstance(event, TokenEvent)]
            ended = [[link.token_id for link in chain(own.last)] for own in search._ended if own is not None]
            earlier += engine.has_work and any(own[: len(told)] != told for own in ended)
        assert told == lm.generate(random_ids(seed, 9), num_beams=3, **_ENDS).token_ids
    assert earlier > 0


def test_a_request_with_a_seed_gives_the_same_samples_each_time() -> None:
    options = {"num_beams": 3, "do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3, "eos_token_id": EOS}
    first, again, other = (lm_with().generate(random_ids(1, 9), seed=seed, **options) for seed in (4, 4, 5))
    assert [gist(o) for o in first] == [gist(o) for o in again] != [gist(o) for o in other]
    assert {o.seed for o in first} == {4}


def test_drawing_without_replacement_has_the_distribution_of_drawing_one_after_another() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    scores = probabilities.log()
    n = 6000
    drawn = Counter(tuple(sample_without_replacement(scores, seed, 3, 2).tolist()) for seed in range(n))
    statistic = 0.0
    for a, b in permutations(range(4), 2):
        expected = n * float(probabilities[a] * probabilities[b] / (1 - probabilities[a]))
        statistic += (drawn[a, b] - expected) ** 2 / expected
    assert statistic < 53.0, "chi-square of 11 degrees of freedom: p > 1e-6"
    assert math.isclose(sum(drawn.values()), n)


def test_drawing_more_than_is_possible_fills_up_with_what_comes_next() -> None:
    scores = torch.tensor([-torch.inf, 0.0, -1e9, -2e9, 0.5])
    drawn = sample_without_replacement(scores, 1, 2, 4).tolist()
    assert set(drawn[:2]) == {1, 4} and drawn[2:] == [2, 3]


def test_branches_share_again_what_they_have_in_common() -> None:
    lm = lm_with(60, 4)
    branches = Branches(Sequence(lm.pool, random_ids(1, 10)))
    runner = lm.runner()

    def run() -> torch.Tensor:
        while True:
            works = branches.plan()
            logits = runner.forward(works)
            for work in works:
                work.sequence.num_computed += work.num_tokens
            if sum(work.num_rows for work in works) and (rows := branches.take(logits)) is not None:
                return rows

    run()
    branches.split([0, 0, 0])
    for at, leaf in enumerate(branches.leaves):
        leaf.append(at)
    before = run()
    used = lm.pool.num_pages - lm.pool.num_free
    branches.free()
    assert all_free(lm) and branches.sequences == branches.leaves[:1]
    after = run()
    assert lm.pool.num_pages - lm.pool.num_free == used == 2 + 3
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    branches.split([1])
    assert lm.pool.num_pages - lm.pool.num_free == 3
    branches.free()
    assert all_free(lm)


def test_rows_that_came_in_different_steps_are_put_together_in_order() -> None:
    lm = lm_with(60, 4)
    whole = _decoder(lm, random_ids(1, 10))
    assert [len(work.sequence) for work in whole.plan()] == [10]
    branches = Branches(Sequence(lm.pool, [1, 2, 3]))
    branches.leaves[0].grow(3)
    branches.leaves[0].num_computed = 3
    branches.take(torch.zeros(1, 5))
    branches.split([0, 0, 0])
    for leaf in branches.leaves:
        leaf.append(4)
    branches.leaves[1].num_computed += 1
    assert branches.take(torch.full((1, 5), 1.0)) is None
    assert [work.sequence for work in branches.plan()] == [branches.leaves[0], branches.leaves[2]]
    branches.leaves[0].num_computed += 1
    branches.leaves[2].num_computed += 1
    rows = branches.take(torch.tensor([[0.0] * 5, [2.0] * 5]))
    assert rows is not None and rows[:, 0].tolist() == [0.0, 1.0, 2.0]


_ENDS: dict[str, Any] = {"eos_token_id": EOS, "length_penalty": 2.0, "early_stopping": "never", "max_new_tokens": 40}


def _decoder(lm: LM, prompt: list[int], num_beams: int = 2) -> BeamDecoder:
    sequence = Sequence(lm.pool, prompt)
    params = resolve(lm, sequence, {"num_beams": num_beams, **_ENDS})
    return BeamDecoder(sequence, params, lm.tokenizer, Branches(sequence))
