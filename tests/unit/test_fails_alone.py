"""What goes wrong in one request ends it alone: the others of the step get, bit for bit, what they would have."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from torch import Tensor

from drafting import add_with_oracle, draft_freely
from engines import Results, all_free, lm_in_float64, lm_with, run
from handloom.decoding.decoder import Event, PromptLogprobsEvent
from handloom.decoding.sample import SampleDecoder
from handloom.engine import Engine
from handloom.errors import HandloomError, InvalidParam, InvalidPrompt, RequestFailed
from handloom.lm import LM
from handloom.model.hooks import At
from handloom.sampling.rules import Row
from handloom.sampling.sampler import Choice, choose
from tiny_models import random_ids

PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 3))]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [], "output_logits": True}


# Patches ---------------------------------------------------------------------------------------------


def raises(values: Tensor, at: At) -> None:
    raise ZeroDivisionError("mine")


PATCHES: list[tuple[Callable[[Tensor, At], Any], type[HandloomError]]] = [
    (raises, RequestFailed),
    (lambda values, at: values[:, :1], InvalidParam),
]


@pytest.mark.parametrize("point", ["hook_embed", "blocks.0.attn.hook_q", "blocks.1.hook_resid_post", "blocks.*"])
@pytest.mark.parametrize("when", ["prompt", "third token"])
@pytest.mark.parametrize(("function", "expected"), PATCHES, ids=["raises", "wrong shape"])
def test_a_patch_that_fails_ends_the_request_whose_sequence_it_saw(
    function: Callable[[Tensor, At], Any], expected: type[HandloomError], when: str, point: str
) -> None:
    lm = lm_with()
    patched = lm.sequence(PROMPTS[1])
    start = 0 if when == "prompt" else len(PROMPTS[1]) + 2

    def patch(values: Tensor, at: At) -> Any:
        return function(values, at) if int(at.positions[-1]) >= start else values

    prompts = [PROMPTS[0], patched, PROMPTS[2]]
    with lm.patch(point.replace("blocks.*", "blocks.*.hook_mlp_out"), lambda values, at: values, sequence=patched):
        well = lm.generate([PROMPTS[0], patched.fork(), PROMPTS[2]], **OPTIONS)
    with lm.patch(point.replace("blocks.*", "blocks.*.hook_mlp_out"), patch, sequence=patched):
        outputs = lm.generate(prompts, **OPTIONS)
    failed = outputs[1]
    assert type(failed.error) is expected
    assert isinstance(failed.error.__cause__, ZeroDivisionError) == (function is raises)
    assert failed.token_ids == well[1].token_ids[: 0 if when == "prompt" else 3]
    for i in (0, 2):
        assert outputs[i].error is None
        assert all(torch.equal(a, b) for a, b in zip(outputs[i].logits, well[i].logits, strict=True))
    assert patched.num_computed == len(patched.token_ids) - (len(PROMPTS[1]) if when == "prompt" else 1)
    patched.free()
    assert all_free(lm)


def test_after_a_patch_failed_no_hook_sees_that_sequence_in_that_pass() -> None:
    lm = lm_with()
    with (
        lm.sequence(PROMPTS[0]) as sequence,
        lm.capture("*", sequence=sequence) as acts,
        lm.patch("blocks.0.hook_resid_mid", raises, sequence=sequence),
    ):
        assert isinstance(lm.generate([sequence], **OPTIONS)[0].error, RequestFailed)
    assert "blocks.0.hook_resid_pre" in set(acts.of(0))
    assert not [point for point in acts.of(0) if point.startswith(("blocks.1", "ln_final", "blocks.0.mlp"))]


def test_a_capture_leaves_a_sequence_fit_for_others_and_a_patch_does_not() -> None:
    lm = lm_with()
    sequences = [lm.sequence(prompt) for prompt in PROMPTS]
    with lm.capture("*"), lm.patch("hook_embed", lambda values, at: values, sequence=sequences[1]):
        lm.step(sequences)
    assert [sequence.private for sequence in sequences] == [False, True, False]


# Decoders of the caller's ------------------------------------------------------------------------------


class Broken(SampleDecoder):
    """Raises in one of its methods from its third token on."""

    where = "plan"
    error: Exception = ZeroDivisionError("mine")

    def _break(self, where: str) -> None:
        if where == self.where and len(self.sequence) >= self.prompt_length + 2:
            raise self.error

    def plan(self) -> Any:
        self._break("plan")
        return super().plan()

    def advance(self, logits: Tensor) -> list[Event]:
        self._break("advance")
        return super().advance(logits)


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), InvalidPrompt("mine")], ids=["any error", "one of ours"])
@pytest.mark.parametrize("where", ["plan", "advance"])
def test_a_decoder_that_raises_ends_its_request_and_the_engine_lives(where: str, error: Exception) -> None:
    lm = lm_in_float64()
    expected = [lm.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS]
    engine = Engine(lm)
    prepared = engine.prepare(PROMPTS[1], {**OPTIONS})
    broken = Broken(prepared.sequence, prepared.params, lm.tokenizer)
    broken.where, broken.error = where, error
    requests = [
        engine.add_request(PROMPTS[0], **OPTIONS),
        engine.add(broken),
        engine.add_request(PROMPTS[2], **OPTIONS),
    ]
    results = run(engine)
    failure = results.ends[requests[1]].error
    assert failure is error if isinstance(error, HandloomError) else isinstance(failure, RequestFailed)
    assert failure is error or failure.__cause__ is error
    assert [results.tokens[request] for request in requests] == [expected[0], expected[1][:2], expected[2]]
    assert all_free(lm)


# The forward pass itself ---------------------------------------------------------------------------------


class Flaky:
    """A model whose forward pass raises the n-th time it is run."""

    def __init__(self, lm: LM, at: int, error: BaseException) -> None:
        self.forward_pass, self.calls, self.at, self.error = lm.transformer.forward, 0, at, error

    def forward(self, *args: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.forward_pass(*args)


@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt()], ids=["memory", "Ctrl-C"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_forward_pass_that_raises_comes_out_of_step_and_no_request_is_lost(at: int, error: BaseException) -> None:
    lm = lm_in_float64(30)
    expected = [lm.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS]
    engine, results, raised = Engine(lm, max_step_tokens=8), Results(), 0
    engine.runner.transformer = Flaky(lm, at, error)  # type: ignore[assignment]
    requests = [engine.add_request(prompt, **OPTIONS) for prompt in PROMPTS]
    impossible = engine.add_request(random_ids(9, 100), priority=1, **{**OPTIONS, "max_new_tokens": 100})
    for _ in range(100):
        try:
            results.take(engine.step())
        except type(error):
            raised += 1
    assert raised == 1
    assert [results.tokens[request] for request in requests] == expected
    assert results.ends[impossible].reason == "error", "its end was told although the step did not come to its own"
    assert not engine.has_work and all_free(lm)


def test_an_engine_whose_forward_pass_raised_can_be_closed() -> None:
    lm = lm_in_float64()
    engine = Engine(lm)
    engine.runner.transformer = Flaky(lm, 2, MemoryError())  # type: ignore[assignment]
    for prompt in PROMPTS:
        engine.add_request(prompt, **OPTIONS)
    engine.step()
    with pytest.raises(MemoryError):
        engine.step()
    engine.close()
    assert all_free(lm) and engine.step() == []


def test_choosing_that_raises_is_done_again_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_in_float64()
    expected = [lm.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS]
    engine, results = Engine(lm), Results()
    requests = [engine.add_request(prompt, **OPTIONS) for prompt in PROMPTS]
    with monkeypatch.context() as patched:
        patched.setattr(engine.scheduler, "choose", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    run(engine, results)
    assert [results.tokens[request] for request in requests] == expected
    assert all_free(lm)


@pytest.mark.parametrize("when", [1, 2])
def test_what_was_chosen_before_choosing_raised_is_told(monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    """Of accepted drafts, beside rules that read the tokens, one is chosen after the other."""
    draft_freely(monkeypatch)
    lm = lm_in_float64()
    own = {"max_new_tokens": 12, "eos_token_id": [], "repetition_penalty": 1.2}
    expected = [lm.generate(prompt, prompt_logprobs=0, **own) for prompt in PROMPTS]
    engine, results = Engine(lm), Results()
    logprobs: dict[int, list[float]] = {}
    requests = [
        add_with_oracle(engine, prompt, output.token_ids, wrong=0.0, prompt_logprobs=0, **own)
        for prompt, output in zip(PROMPTS, expected, strict=True)
    ]
    calls = 0

    def flaky(logits: Tensor, rows: Seq[Row]) -> Choice:
        nonlocal calls
        calls += 1
        if calls == when or calls == 5:
            raise MemoryError
        return choose(logits, rows)

    monkeypatch.setattr(engine.scheduler, "choose", flaky)
    raised = 0
    while engine.has_work:
        try:
            events = engine.step()
        except MemoryError:
            raised += 1
            continue
        results.take(events)
        for event in events:
            if isinstance(event, PromptLogprobsEvent):
                logprobs.setdefault(event.request_id, []).extend(event.logprobs)
    assert raised == 2
    assert [results.tokens[request] for request in requests] == [output.token_ids for output in expected]
    assert [logprobs[request] for request in requests] == [pytest.approx(o.prompt_logprobs) for o in expected]
    assert all_free(lm)
