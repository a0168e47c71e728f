"""Decoders of the caller's: those of the docs do what they say, in any company; what one does wrong ends it alone."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import handloom as hl
from engines import Results, all_free, lm_in_float64, lm_with, run
from handloom.decoding.decoder import Event, SampleFinishedEvent
from handloom.decoding.samples import SamplesDecoder
from handloom.engine import Engine
from handloom.errors import HandloomError, InvalidParam, RequestFailed, UnsupportedOption
from handloom.lm import LM
from tiny_models import random_ids

PAGE = Path(__file__).parents[2] / "docs" / "custom_decoder.md"
PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 1))]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [], "output_logits": True}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def page() -> Any:
    """The names that the page's classes have."""
    names: dict[str, Any] = {}
    for block in blocks():
        if "class " in block:
            exec(block, names)
    return SimpleNamespace(**names)


def test_what_the_page_calls_runs(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = next(block for block in blocks() if "lm.generate" in block)
    names = {"lm": lm_with(), "Lookahead": page.Lookahead}
    exec(calls, names)
    output = names["output"]
    assert len(output.token_ids) == 12 or output.finish_reason == "eos"
    assert output.text == names["lm"].decode(output.token_ids, skip_special_tokens=True)
    assert {line[0] for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()} == {"0", "1"}


def two_ahead(lm: LM, prompt: list[int], count: int, eos: list[int]) -> list[int]:
    """The oracle: each of the three likeliest tokens tried by a forward pass of its own."""

    def after(*tokens: int) -> Tensor:
        with lm.sequence([*prompt, *tokens]) as sequence:
            return sequence.logits.log_softmax(-1)

    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in eos):
        first = after(*tokens).topk(3)
        best = [after(*tokens, token).max() for token in first.indices.tolist()]
        tokens.append(int(first.indices[int((first.values + torch.stack(best)).argmax())]))
    return tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 5}, {"spill_bytes": 0}], ids=str)
def test_the_pages_lookahead_is_right_in_company_in_chunks_and_where_pages_run_out(
    page: Any, family: str, limits: dict[str, Any]
) -> None:
    lm = lm_in_float64(12, family=family)
    eos = [*range(4, 331, 60)]
    asked = {"max_new_tokens": 9, "eos_token_id": eos}
    plain = lm.generate(PROMPTS[1], max_new_tokens=12, eos_token_id=[]).token_ids
    engine = Engine(lm, **limits)
    requests = [engine.add_request(prompt, custom_decoder=page.Lookahead, **asked) for prompt in PROMPTS]
    other = engine.add_request(PROMPTS[1], max_new_tokens=12, eos_token_id=[])
    results = run(engine)
    assert engine.stats().num_preempted > 0, "nobody was stopped"
    for prompt, request in zip(PROMPTS, requests, strict=True):
        assert results.tokens[request] == two_ahead(lm_in_float64(family=family), prompt, 9, eos)
    assert results.tokens[other] == plain
    assert all_free(lm)


def test_the_pages_best_of_gives_the_likeliest_sample_and_streams_it(page: Any) -> None:
    lm = lm_with()
    options = {"max_new_tokens": 8, "temperature": 1.5, "eos_token_id": [*range(4, 331, 25)], "seed": 3}
    samples = lm.generate(PROMPTS[0], num_return_sequences=4, logprobs=0, **options)
    best = max(samples, key=lambda output: sum(output.logprobs) / len(output.logprobs))
    output = lm.generate(PROMPTS[0], custom_decoder=page.BestOf, **options)
    assert (output.token_ids, output.text, output.finish_reason) == (best.token_ids, best.text, best.finish_reason)
    pieces = list(lm.stream([PROMPTS[1], PROMPTS[0]], params=[{}, {"custom_decoder": page.BestOf}], **options))
    assert [piece.token_id for piece in pieces if piece.index == 1][:-1] == best.token_ids
    assert all_free(lm)


# Mistakes --------------------------------------------------------------------------------------------


class Plain:
    """Greedy, as small as it gets; `wrong` is called in one of its methods after the second token, with the decoder."""

    def __init__(self, sequence: Any, params: Any, tokenizer: Any) -> None:
        self.sequence, self.params = sequence, params
        self.max_length = len(sequence) + params.max_new_tokens
        self.start, self.calls = len(sequence), Counter[str]()

    def _wrong(self, where: str) -> Any:
        """What the test makes of this method, or None."""
        self.calls[where] += 1
        at, wrong = MISTAKE
        return wrong(self) if at == where and (len(self.sequence) >= self.start + 2 or where == "sequences") else None

    @property
    def sequences(self) -> Any:
        wrong = self._wrong("sequences") if self.calls["advance"] > 1 else None
        return [self.sequence] if wrong is None else wrong

    def plan(self) -> Any:
        wrong = self._wrong("plan")
        return [hl.Work(self.sequence, self.sequence.num_pending, "last")] if wrong is None else wrong

    def advance(self, logits: Tensor) -> Any:
        wrong = self._wrong("advance")
        if wrong is not None:
            return wrong
        token_id = int(logits[0].argmax())
        self.sequence.append(token_id)
        events: list[Event] = [hl.TokenEvent(token_id)]
        if len(self.sequence) == self.max_length:
            events.append(hl.FinishedEvent("length"))
        return events

    def close(self) -> None:
        if self._wrong("close") is None:
            self.sequence.free()


def nothing(_: Any) -> None:
    return None


MISTAKE: tuple[str, Callable[[Any], Any]] = ("", nothing)


def raises(_: Any) -> Any:
    raise ZeroDivisionError("mine")


def appends(token_id: Any) -> Callable[[Any], None]:
    def append(decoder: Any) -> None:
        decoder.sequence.token_ids[-1] = token_id

    return append


def runs_away(decoder: Any) -> Any:
    decoder.sequence.token_ids += [5] * 300
    return [hl.Work(decoder.sequence, decoder.sequence.num_pending, "last")]


def elsewhere(decoder: Any) -> Any:
    from handloom.cache.sequence import Sequence

    return [hl.Work(Sequence(decoder.sequence.pool, [5, 6]), 2, "last")]


def another_pool(decoder: Any) -> Any:
    return [lm_with(3).sequence([5])]


MISTAKES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "plans nothing": ("plan", lambda _: [], "plans no work"),
    "plans None": ("plan", lambda _: 5, "raised TypeError"),
    "plans no Work": ("plan", lambda _: [5], "no Work"),
    "plans with a raise": ("plan", raises, "raised ZeroDivisionError"),
    "plans elsewhere": ("plan", elsewhere, "not among its `sequences`"),
    "plans twice": ("plan", lambda d: [hl.Work(d.sequence, 1, "last")] * 2, "the same one twice"),
    "plans too much": ("plan", lambda d: [hl.Work(d.sequence, 2, "last")], "2 tokens .* in which 1 are pending"),
    "plans none of them": ("plan", lambda d: [hl.Work(d.sequence, 0, "last")], "0 tokens"),
    "plans past its max_length": (
        "plan",
        runs_away,
        r"planned to run token 3\d\d .*; the most are \d\d, of its max_len",
    ),
    "plans a fraction": ("plan", lambda d: [hl.Work(d.sequence, 0.5, "last")], "0.5 tokens"),
    "plans odd logits": ("plan", lambda d: [hl.Work(d.sequence, 1, "first")], "logits='first'"),
    "plans an odd hook": ("plan", lambda d: [hl.Work(d.sequence, 1, "last", "hook")], "hook='hook'"),
    "an id past the vocabulary": ("plan", appends(331), "token 331; ids are integers from 0 to 330"),
    "a negative id": ("plan", appends(-1), "token -1"),
    "a tensor for an id": ("plan", appends(torch.tensor(5)), "ids are integers"),
    "advances with a raise": ("advance", raises, "raised ZeroDivisionError"),
    "advances to None": ("advance", lambda _: 5, "raised TypeError"),
    "returns no event": ("advance", lambda _: ["token"], "no event"),
    "returns an odd token": ("advance", lambda _: [hl.TokenEvent("a")], "token_id is no int"),
    "returns an odd text": ("advance", lambda _: [hl.TokenEvent(5, None)], "text is no str"),
    "returns an odd reason": ("advance", lambda _: [hl.FinishedEvent("done")], "none of eos, stop_string"),
    "another output": ("advance", lambda _: [hl.TokenEvent(5, sample=1)], "has 1 outputs"),
    "an end of another output": ("advance", lambda _: [SampleFinishedEvent(-1, "eos")], "has 1 outputs"),
    "goes on after the end": (
        "advance",
        lambda _: [hl.FinishedEvent("eos"), hl.TokenEvent(5)],
        "after a Finished",
    ),
    "has no sequences": ("sequences", raises, "raised ZeroDivisionError"),
    "has odd sequences": ("sequences", lambda _: [5], "which is none of this model's"),
    "has others' sequences": ("sequences", another_pool, "which is none of this model's"),
    "closes with a raise": ("close", raises, "raised ZeroDivisionError.* when it was closed"),
}


@pytest.fixture
def mistake(request: pytest.FixtureRequest) -> Any:
    global MISTAKE
    where, wrong, words = MISTAKES[request.param]
    MISTAKE = where, wrong
    yield where, words
    MISTAKE = "", nothing


@pytest.mark.parametrize("mistake", MISTAKES, indirect=True)
@pytest.mark.filterwarnings("error")
def test_a_mistake_ends_its_request_with_a_typed_error_and_no_other(mistake: tuple[str, str]) -> None:
    where, words = mistake
    lm = lm_with()
    expected = lm.generate(PROMPTS, **OPTIONS)
    params: list[dict[str, Any]] = [{}, {"custom_decoder": Plain}, {}]
    outputs = lm.generate(PROMPTS, params=params, **OPTIONS)
    failed = outputs[1]
    assert isinstance(failed.error, HandloomError)
    assert re.search(words, str(failed.error)), str(failed.error)
    assert failed.finish_reason == "error"
    assert failed.token_ids == expected[1].token_ids[: 6 if where == "close" else len(failed.token_ids)]
    for i in (0, 2):
        assert outputs[i].error is None
        assert all(torch.equal(a, b) for a, b in zip(outputs[i].logits, expected[i].logits, strict=True))
    assert all_free(lm)
    assert lm.generate(PROMPTS[1], **OPTIONS).token_ids == expected[1].token_ids


def test_without_a_mistake_it_is_greedy_and_its_mistakes_are_raised_for_one_prompt() -> None:
    global MISTAKE
    lm = lm_with()
    assert lm.generate(PROMPTS[1], custom_decoder=Plain, **OPTIONS).token_ids == (
        lm.generate(PROMPTS[1], **OPTIONS).token_ids
    )
    MISTAKE = "advance", raises
    with pytest.raises(RequestFailed, match="raised ZeroDivisionError") as caught:
        lm.generate(PROMPTS[1], custom_decoder=Plain, **OPTIONS)
    MISTAKE = "", nothing
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert all_free(lm)


@pytest.mark.parametrize("how", ["abort", "another error"])
def test_closing_that_raises_after_the_end_is_a_warning_and_frees_the_pages(how: str) -> None:
    class Bad(Plain):
        def advance(self, logits: Tensor) -> Any:
            return super().advance(logits) if how == "abort" else raises(self)

        def close(self) -> None:
            raises(self)

    lm = lm_with()
    engine = Engine(lm)
    request = engine.add_request(PROMPTS[0], custom_decoder=Bad, **OPTIONS)
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError.* when it was closed, after its request had ended"):
        events = engine.step()
        if how == "abort":
            assert engine.abort(request)
        else:
            assert isinstance(events[-1].error, RequestFailed)
    assert all_free(lm)


@pytest.mark.parametrize(
    ("custom", "error", "words"),
    [
        (5, InvalidParam, "custom_decoder=5"),
        (lambda *_: 1 // 0, RequestFailed, "raised ZeroDivisionError"),
        (lambda *_: None, InvalidParam, "has no method plan"),
        (lambda *_: SimpleNamespace(plan=list, advance=list, close=list), InvalidParam, "has max_length=None"),
        (
            lambda *_: SimpleNamespace(plan=list, advance=list, close=list, max_length=5, num_outputs=0),
            InvalidParam,
            "has num_outputs=0",
        ),
        (lambda *_: SimpleNamespace(plan=list, advance=list, close=list, max_length=5), RequestFailed, "sequences"),
    ],
)
def test_what_is_no_decoder_is_refused_before_anything_runs(custom: Any, error: type[Exception], words: str) -> None:
    lm = lm_with()
    with pytest.raises(error, match=words):
        lm.generate(PROMPTS[0], custom_decoder=custom)
    assert all_free(lm)


def test_a_sequence_of_the_callers_is_refused_and_nobody_runs_anothers() -> None:
    lm = lm_with()
    with lm.sequence(PROMPTS[0]) as sequence, pytest.raises(UnsupportedOption, match="custom_decoder"):
        lm.generate(sequence, custom_decoder=Plain)
    engine = Engine(lm)
    shared: list[Any] = []

    class Same(Plain):
        def __init__(self, sequence: Any, params: Any, tokenizer: Any) -> None:
            shared.append(sequence)
            super().__init__(shared[0], params, tokenizer)

    first = engine.add_request(PROMPTS[0], custom_decoder=Same, **OPTIONS)
    second = engine.add_request(PROMPTS[0], custom_decoder=Same, **OPTIONS)
    results = run(engine)
    assert results.ends[first].error is None
    assert isinstance(results.ends[second].error, RequestFailed)
    assert "another request runs the same sequence" in str(results.ends[second].error)


def test_one_that_is_ready_made_and_several_outputs_of_its_own() -> None:
    lm = lm_with()
    engine = Engine(lm)

    class Several(SamplesDecoder):
        """A mode of handloom's, as a caller may change it."""

    prepared = engine.prepare(PROMPTS[0], {**OPTIONS, "num_return_sequences": 3, "seed": 1, "temperature": 1.0})
    request = engine.add(Several(prepared.sequence, prepared.params, lm.tokenizer))
    results = Results()
    results.take(event for event in engine.run() if not isinstance(event, SampleFinishedEvent))
    assert len(results.tokens[request]) == 18
    expected = lm.generate(PROMPTS[0], num_return_sequences=3, seed=1, temperature=1.0, **OPTIONS)
    outputs = lm.generate(
        PROMPTS[0], custom_decoder=Several, num_return_sequences=3, seed=1, temperature=1.0, **OPTIONS
    )
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_nothing_is_warned_of_where_nothing_is_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm_with().generate(PROMPTS[0], custom_decoder=Plain, **OPTIONS)
