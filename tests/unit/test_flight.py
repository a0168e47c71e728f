"""Decode steps that a device makes by itself: the tokens, ends and pages are those of the engine without them.

The device is played by a queue that does what it is given late (late_stream.py).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Results, all_free, lm_in_float64, lm_with, loaded, run
from flights import flying, stream_of, tokens_of
from handloom.cache.pages import PagePool
from handloom.decoding.decoder import TokenEvent
from handloom.engine import Engine
from handloom.engine.decode_step import DecodeRow, DecodeStep
from handloom.engine.graphs import DecodeGraphs
from handloom.engine.stream import EagerStream
from handloom.errors import NonFiniteLogits
from handloom.model.transformer import Transformer
from handloom.ops import choose_backend
from late_stream import LateStream
from tiny_models import random_ids

GREEDY = {"do_sample": False, "eos_token_id": []}
SAMPLED = {"do_sample": True, "eos_token_id": [], "seed": 5, "top_k": 0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "drawn": SAMPLED | {"temperature": 1.7},
    "cut": SAMPLED | {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2**64 - 3},
}


REQUESTS = [
    (random_ids(i, 3 + 4 * i), {**WAYS[way], "max_new_tokens": 6 + 5 * i, "logprobs": 0 if i % 2 else None})
    for i, way in enumerate(("greedy", "drawn", "cut", "greedy", "cut"))
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_tokens_and_ends_are_those_without(seed: int, page_size: int) -> None:
    expected = tokens_of(lm_in_float64(80), REQUESTS)
    lm = flying(lm_in_float64(800 // page_size, page_size), LateStream(seed), min_width=1)
    ours = tokens_of(lm, REQUESTS)
    assert ours.tokens == expected.tokens and ours.texts == expected.texts
    assert {i: end.reason for i, end in ours.ends.items()} == {i: end.reason for i, end in expected.ends.items()}
    assert stream_of(lm).num_launched > 20 and all_free(lm)


@pytest.mark.parametrize("way", WAYS)
def test_logprobs_are_those_of_the_host(way: str) -> None:
    options = {**WAYS[way], "max_new_tokens": 12, "logprobs": 0}
    engines = [Engine(flying(lm_with(page_size=4))), Engine(flying(lm_with(page_size=4)))]
    engines[0].pilot = None
    found = []
    for engine in engines:
        engine.add_request(random_ids(2, 9), **options)
        found.append([(e.token_id, e.logprob, e.top_logprobs) for e in engine.run() if isinstance(e, TokenEvent)])
    assert len(found[0]) == 12
    for ours, expected in zip(*found, strict=True):
        assert ours[0] == expected[0] and ours[2] == expected[2] == []
        assert ours[1] == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_captured_or_not_has_the_same_bits(family: str) -> None:
    """On the compiled CPU backend, whose bits do not depend on company, also the bits of the engine without flights."""
    found = []
    for stream in (None, EagerStream(), LateStream(1)):
        lm = lm_with(page_size=4, family=family)
        if stream is not None:
            lm.graphs = DecodeGraphs(lm.transformer, lm.pool, stream)
        engine = Engine(lm)
        for i in range(5):
            engine.add_request(random_ids(i, 4 + i), **GREEDY, max_new_tokens=9 + i, logprobs=0)
        events = [event for event in engine.run() if isinstance(event, TokenEvent)]
        assert engine.stats().num_captured_steps > 8 or stream is None
        found.append(sorted((event.request_id, event.token_id, event.logprob) for event in events))
    assert found[0] == found[1] == found[2]


def test_a_step_is_queued_before_the_one_before_is_read() -> None:
    lm = flying(lm_in_float64())
    stream = stream_of(lm)
    engine = Engine(lm)
    engine.add_request(random_ids(1, 5), **GREEDY, max_new_tokens=8)
    engine.step()  # the prompt
    assert stream.num_launched == 0
    seen = []
    while engine.has_work:
        events = engine.step()
        seen.append((stream.num_launched, sum(isinstance(e, TokenEvent) for e in events)))
    assert seen == [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (7, 1)], "and none past the last token"
    assert all_free(lm)


def test_what_ran_past_an_eos_is_thrown_away() -> None:
    prompt = random_ids(4, 6)
    tokens = tokens_of(lm_in_float64(), [(prompt, GREEDY | {"max_new_tokens": 20})]).tokens[0]
    stop = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    lm = flying(lm_in_float64())
    found = tokens_of(lm, [(prompt, GREEDY | {"max_new_tokens": 20, "eos_token_id": [tokens[stop]]})])
    assert found.tokens[0] == tokens[: stop + 1] and found.ends[0].reason == "eos"
    assert stream_of(lm).num_launched == stop + 1 and all_free(lm)


def test_stop_strings_and_criteria_end_on_the_host() -> None:
    prompt = random_ids(4, 6)
    lm = lm_in_float64()
    alone = tokens_of(lm, [(prompt, GREEDY | {"max_new_tokens": 20})])
    assert lm.tokenizer is not None
    stop = lm.tokenizer.decode(alone.tokens[0][:8])[-2:]

    def criterion(ids: torch.Tensor, scores: Any) -> bool:
        return ids.shape[1] >= 11

    requests = [
        (prompt, GREEDY | {"max_new_tokens": 20, "stop_strings": [stop]}),
        (prompt, GREEDY | {"max_new_tokens": 20, "stopping_criteria": [criterion]}),
    ]
    expected, ours = tokens_of(lm, requests), tokens_of(flying(lm_in_float64()), requests)
    assert ours.tokens == expected.tokens and ours.texts == expected.texts
    assert [end.reason for _, end in sorted(ours.ends.items())] == ["stop_string", "criteria"]


def test_abort_and_pause_while_a_step_is_in_flight() -> None:
    lm = flying(lm_in_float64())
    engine = Engine(lm)
    prompts = [random_ids(i, 6) for i in range(3)]
    expected = tokens_of(lm_in_float64(), [(p, GREEDY | {"max_new_tokens": 20}) for p in prompts])
    for prompt in prompts:
        engine.add_request(prompt, **GREEDY, max_new_tokens=20)
    results = Results()
    for _ in range(5):
        results.take(engine.step())
    assert engine.pilot is not None and engine.pilot.flying
    engine.abort(0)
    engine.pause(1)
    before = {i: len(tokens) for i, tokens in results.tokens.items()}
    for _ in range(4):
        results.take(engine.step())
    assert len(results.tokens[0]) == before[0] and len(results.tokens[1]) == before[1]
    engine.resume(1)
    run(engine, results)
    assert results.tokens[1] == expected.tokens[1] and results.tokens[2] == expected.tokens[2]
    assert all_free(lm)


def test_the_last_request_is_aborted_in_flight() -> None:
    lm = flying(lm_in_float64())
    engine = Engine(lm)
    request = engine.add_request(random_ids(1, 6), **GREEDY, max_new_tokens=20)
    for _ in range(4):
        engine.step()
    engine.abort(request)
    assert not stream_of(lm).queue and not engine.has_work and all_free(lm)
    assert tokens_of(lm, [(random_ids(1, 6), GREEDY | {"max_new_tokens": 4})]).ends[0].reason == "length"
    assert stream_of(lm).num_launched > 4, "another engine of the model has its turn"


def test_engines_of_one_model_take_turns() -> None:
    lm = flying(lm_in_float64())
    first, second = Engine(lm), Engine(lm)
    for i, engine in enumerate((first, second)):
        engine.add_request(random_ids(i, 5), **GREEDY, max_new_tokens=12)
    results = [Results(), Results()]
    while first.has_work or second.has_work:
        for engine, result in zip((first, second), results, strict=True):
            result.take(engine.step())
    expected = tokens_of(lm_in_float64(), [(random_ids(i, 5), GREEDY | {"max_new_tokens": 12}) for i in range(2)])
    assert [result.tokens[0] for result in results] == [expected.tokens[0], expected.tokens[1]]
    assert second.stats().other_decode_steps == {"another engine of this model is decoding": 10}, (
        "the last one is its own"
    )


def test_pages_are_taken_ahead_of_the_device_and_preemption_changes_no_token() -> None:
    prompts = [random_ids(i, 7) for i in range(4)]
    requests = [(p, GREEDY | {"max_new_tokens": 21}) for p in prompts]
    expected = tokens_of(lm_in_float64(), requests)
    lm = flying(lm_in_float64(14, 4))
    engine = Engine(lm)
    for prompt, options in requests:
        engine.add_request(prompt, **options)
    ours = run(engine)
    assert ours.tokens == expected.tokens and engine.stats().num_preempted and all_free(lm)
    assert engine.stats().num_captured_steps > 20


def test_equal_requests_share_pages_that_fill_while_in_flight() -> None:
    """Both compute the same page, and go on with one of the two: the device's table must hear of it."""
    requests = [(random_ids(3, 6), GREEDY | {"max_new_tokens": 30})] * 3 + [
        (random_ids(4, 6), GREEDY | {"max_new_tokens": 30})
    ]
    expected = tokens_of(lm_in_float64(), requests)
    for seed in range(4):
        lm = flying(lm_in_float64(30, 4), LateStream(seed))
        assert tokens_of(lm, requests).tokens == expected.tokens and all_free(lm)


def test_pages_that_nobody_was_told_of_before_the_flight() -> None:
    """Under hooks nothing is shared; afterwards both have the same first pages, and go on with those of one."""
    start = random_ids(3, 8)
    requests = [
        ([*start, 7, 8, 9], GREEDY | {"max_new_tokens": 26}),
        ([*start, 6, 5, 4], GREEDY | {"max_new_tokens": 26}),
    ]
    expected = tokens_of(lm_in_float64(), requests)
    lm = flying(lm_in_float64(20, 4))
    engine, results = Engine(lm), Results()
    for prompt, options in requests:
        engine.add_request(prompt, **options)
    with lm.capture("ln_final.hook_normalized"):
        results.take(engine.step())
    run(engine, results)
    assert results.tokens == expected.tokens and all_free(lm)


def test_a_sequence_of_the_callers_may_be_changed_between_steps() -> None:
    tokens = []
    for lm in (lm_in_float64(), flying(lm_in_float64())):
        engine, sequence = Engine(lm), lm.sequence(random_ids(6, 9))
        engine.add_request(sequence, **GREEDY, max_new_tokens=12)
        forks = []
        for i in range(12):
            if i == 4:
                forks.append(sequence.fork())
            if i == 6:
                sequence.rewind(2)
                sequence.append(17)
            if i == 8:
                k, _ = sequence.kv(0, 0, 3)
                sequence.set_kv(0, 0, k=k * -2)
            engine.step()
        run(engine)
        tokens.append((list(sequence.token_ids), list(forks[0].token_ids)))
        assert lm.graphs is None or engine.stats().num_captured_steps > 8
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"repetition_penalty": 1.3}, "a request has repetition_penalty on"),
        ({"do_sample": True, "rng": "torch"}, "a request draws by rng='torch'"),
        ({"logits_processor": [lambda ids, scores: scores]}, "a request has logits processors of the caller's"),
        ({"output_scores": True}, "a request asks for scores or logits"),
        ({"logprobs": 3}, "a request asks for the logprobs of other tokens"),
        ({"num_beams": 2}, "a request decodes by BeamDecoder"),
        ({"do_sample": True, "num_return_sequences": 2}, "a request decodes by SamplesDecoder"),
    ],
)
def test_what_a_captured_step_cannot_do_runs_outside_and_it_is_said(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(flying(lm_in_float64()))
    engine.add_request(random_ids(1, 5), eos_token_id=[], max_new_tokens=6, **options)
    with caplog.at_level(logging.INFO, "handloom"):
        run(engine)
    assert dict(engine.stats().other_decode_steps) == {reason: 5} and engine.stats().num_captured_steps == 0
    assert [record.getMessage() for record in caplog.records].count(
        f"decode steps run kernel by kernel, and wait for the host: {reason}"
    ) == 1


def test_hooks_that_open_in_flight_see_every_later_token() -> None:
    shapes = []
    for lm in (lm_in_float64(), flying(lm_in_float64())):
        engine = Engine(lm)
        engine.add_request(random_ids(1, 5), **GREEDY, max_new_tokens=10)
        results = Results()
        for _ in range(4):
            results.take(engine.step())
        with lm.capture("blocks.0.hook_resid_post") as acts:
            for _ in range(3):
                results.take(engine.step())
        run(engine, results)
        shapes.append((results.tokens[0], acts["blocks.0.hook_resid_post"].shape))
    assert shapes[0] == shapes[1]


def test_logits_that_are_not_finite_end_with_the_error_of_the_host() -> None:
    errors, tokens = [], []
    for lm in (lm_in_float64(), flying(lm_in_float64())):
        engine, results = Engine(lm), Results()
        for i in range(2):
            engine.add_request(random_ids(i, 5), **GREEDY, max_new_tokens=10)
        for _ in range(5):
            results.take(engine.step())
        victim = next(iter(engine.scheduler)).decoder.sequences[0]
        stream = lm.graphs.stream if lm.graphs is not None else None
        if isinstance(stream, LateStream):
            stream.catch_up()
        lm.pool.storages[next(iter(lm.pool.storages))][:, :, victim.page_table[0]] = torch.nan
        run(engine, results)
        errors.append(results.ends[0].error)
        tokens.append(results.tokens[1])
        assert all_free(lm)
    assert all(isinstance(error, NonFiniteLogits) for error in errors)
    assert tokens[0] == tokens[1]


def test_smaller_steps_where_half_of_the_rows_have_ended() -> None:
    lm = flying(lm_in_float64(400))
    requests = [(random_ids(i, 4), GREEDY | {"max_new_tokens": 4 if i else 30}) for i in range(9)]
    engine = Engine(lm)
    for prompt, options in requests:
        engine.add_request(prompt, **options)
    ours = run(engine)
    assert ours.tokens == tokens_of(lm_in_float64(400), requests).tokens
    assert lm.graphs is not None and lm.graphs.num_captured == 2 and lm.graphs.warm_up_seconds > 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_neither_asks_the_device_for_a_value_nor_sends_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Triton backend: here its kernels run in Triton's interpreter, whose own looks at tensors do not count."""
    lm = loaded(family)
    transformer = Transformer(lm.spec, {**lm.transformer.weights}, choose_backend(lm.device, "triton"))
    pool = PagePool(lm.spec, 8, 4, dtype=lm.dtype, device=lm.device)
    step = DecodeStep(transformer, pool, 2, 2)
    row = DecodeRow(7, 0, [3, 1], 1, seed=2**63, counter=1, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)
    for values, into in step.beginning([row]):
        into.copy_(values)
    step.pages[0] = 3
    asked: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        _watch(monkeypatch, torch.Tensor, name, asked)
    for name in ("tensor", "as_tensor"):
        _watch(monkeypatch, torch, name, asked)
    for drawn, cut in ((False, False), (True, False), (True, True)):
        step.run(drawn=drawn, cut=cut)
    assert not asked
    monkeypatch.undo()
    assert step.integers[1:4, 0].tolist() == [3, 4, 4] and int(step.out[0, 0]) >= 0
    backend = choose_backend(lm.device, "reference")
    assert transformer.backend.capturable and not backend.capturable


def _watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, asked: list[str]) -> None:
    """Note calls from modules of handloom that make the host wait for the device: of `tensor` those that name one,
    where "cpu", so written, is the host."""
    original = getattr(owner, name)

    def watched(*args: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        ours = {"handloom", "handloom_kernels"} & set(Path(caller).parts)
        if ours and (owner is torch.Tensor or options.get("device", "cpu") != "cpu"):
            asked.append(f"{name} in {caller}")
        return original(*args, **options)

    monkeypatch.setattr(owner, name, watched)
