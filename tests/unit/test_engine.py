"""The engine on a real tiny model: a request's tokens are its own, a failure is its own, and pages always come back."""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import Results, all_free, lm_with, loaded, poison, run
from handloom.cache.sequence import Sequence
from handloom.decoding import loop
from handloom.engine import Engine
from handloom.engine.prepare import resolve
from handloom.errors import HandloomError, InvalidParam, InvalidPrompt, NonFiniteLogits, OutOfPages, RequestFailed
from handloom.lm import LM
from tiny_models import VOCAB_SIZE, random_ids

PROMPTS = [random_ids(i, length) for i, length in enumerate((3, 40, 11, 1, 25))]
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 9},
    {"max_new_tokens": 14, "do_sample": True, "seed": 7, "top_k": 0},
    {"max_new_tokens": 5, "repetition_penalty": 1.7},
    {"max_new_tokens": 12, "temperature": 1.4, "top_p": 0.9, "seed": 2**63},
    {"max_new_tokens": 7, "min_new_tokens": 7, "min_p": 0.02, "seed": 0},
]


@cache
def alone(request: int, family: str = "llama") -> list[int]:
    """The tokens of PROMPTS[request] with OPTIONS[request], when nothing else runs."""
    tokens: list[int] = lm_with(family=family).generate(PROMPTS[request], **OPTIONS[request]).token_ids
    return tokens


def add_all(engine: Engine) -> list[int]:
    return [engine.add_request(p, **o) for p, o in zip(PROMPTS, OPTIONS, strict=True)]


@pytest.mark.parametrize(
    ("family", "budget"), [("llama", 1), ("llama", 7), ("llama", 512), ("gpt2", 7), ("gemma3_text", 7)]
)
def test_company_and_chunking_change_no_token(family: str, budget: int) -> None:
    lm = lm_with(family=family)
    engine = Engine(lm, max_step_tokens=budget, max_running=3)
    requests = add_all(engine)
    results = run(engine)
    assert [results.tokens[request] for request in requests] == [alone(i, family) for i in range(len(PROMPTS))]
    assert all_free(lm)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_the_size_of_a_page_changes_no_token(page_size: int) -> None:
    outputs = lm_with(400 // page_size, page_size).generate(PROMPTS, params=OPTIONS)
    assert [output.token_ids for output in outputs] == [alone(i) for i in range(len(PROMPTS))]


def test_requests_that_join_and_leave_midway_change_no_token_of_the_others() -> None:
    lm = lm_with()
    engine, results = Engine(lm), Results()
    first = engine.add_request(PROMPTS[1], **OPTIONS[1])
    for _ in range(3):
        results.take(engine.step())
    second = engine.add_request(PROMPTS[3], **OPTIONS[3])
    leaver = engine.add_request(PROMPTS[4], max_new_tokens=100)
    for _ in range(4):
        results.take(engine.step())
    assert engine.abort(leaver)
    third = engine.add_request(PROMPTS[2], **OPTIONS[2])
    run(engine, results)
    assert [results.tokens[request] for request in (first, second, third)] == [alone(1), alone(3), alone(2)]


@pytest.mark.parametrize("request_index", range(len(PROMPTS)))
def test_the_short_loop_is_the_engine(request_index: int) -> None:
    lm = lm_with()
    sequence = Sequence(lm.pool, PROMPTS[request_index])
    params = resolve(lm, sequence, OPTIONS[request_index])
    assert list(loop.generate(lm.transformer, lm.pool, PROMPTS[request_index], params)) == alone(request_index)
    assert all_free(lm)


def test_a_loop_that_is_left_early_frees_its_pages() -> None:
    lm = lm_with()
    params = resolve(lm, Sequence(lm.pool, [5]), {"max_new_tokens": 50})
    tokens = loop.generate(lm.transformer, lm.pool, PROMPTS[1], params)
    next(tokens)
    assert not all_free(lm)
    tokens.close()
    assert all_free(lm)


def test_the_seed_alone_decides_and_is_told() -> None:
    lm = lm_with()
    again = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "eos_token_id": []}
    outputs = lm.generate([PROMPTS[0]] * 4, params=[{"seed": 1}, {"seed": 1}, {"seed": 2}, {}], **again)
    assert outputs[0].token_ids == outputs[1].token_ids != outputs[2].token_ids
    told = lm.generate(PROMPTS[0], seed=outputs[3].seed, **again)
    assert told.token_ids == outputs[3].token_ids


# Failures ------------------------------------------------------------------------------------------


class Failing:
    """A logits processor that goes wrong when the sequence has `at` tokens."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self.at:
            return scores
        if self.how == "raises":
            raise ZeroDivisionError("mine")
        return torch.full_like(scores, {"nan": math.nan, "nothing left": -math.inf}[self.how])


@pytest.mark.parametrize("when", [0, 2], ids=["first token", "third token"])
@pytest.mark.parametrize(
    ("how", "error"), [("raises", RequestFailed), ("nan", NonFiniteLogits), ("nothing left", NonFiniteLogits)]
)
def test_a_processor_that_fails_fails_its_own_request(how: str, error: type[Exception], when: int) -> None:
    lm = lm_with()
    bad = {"max_new_tokens": 8, "logits_processor": [Failing(len(PROMPTS[0]) + when, how)]}
    outputs = lm.generate([PROMPTS[0], *PROMPTS], params=[bad, *OPTIONS])
    assert (outputs[0].finish_reason, type(outputs[0].error)) == ("error", error)
    assert len(outputs[0].token_ids) == when
    assert [output.token_ids for output in outputs[1:]] == [alone(i) for i in range(len(PROMPTS))]
    assert all_free(lm)
    with pytest.raises(error) as caught:
        lm.generate(PROMPTS[0], **bad)
    assert (how == "raises") == isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_criterion_that_raises_fails_its_own_request_after_its_token() -> None:
    lm = lm_with()

    def criterion(input_ids: torch.Tensor, scores: object) -> bool:
        raise ZeroDivisionError("mine")

    outputs = lm.generate(PROMPTS, params=[{**OPTIONS[0], "stopping_criteria": [criterion]}, *OPTIONS[1:]])
    assert isinstance(outputs[0].error, RequestFailed)
    assert outputs[0].token_ids == alone(0)[:1]
    assert [output.token_ids for output in outputs[1:]] == [alone(i) for i in range(1, len(PROMPTS))]
    assert all_free(lm)


@pytest.fixture
def poisoned() -> tuple[LM, int]:
    """A model of its own whose embedding of one token, which no prompt or output above has, is NaN; and the token."""
    used = {token for i, prompt in enumerate(PROMPTS) for token in (*prompt, *alone(i))}
    token = next(t for t in range(3, VOCAB_SIZE) if t not in used)
    lm = lm_with()
    weights = dict(lm.transformer.weights)
    weights["embed.weight"] = weights["embed.weight"].clone()
    weights["embed.weight"][token] = torch.nan
    return LM(type(lm.transformer)(lm.spec, weights, lm.backend), lm.tokenizer, lm.pool, name=lm.name), token


def test_a_row_of_nan_weights_fails_the_requests_that_meet_it_and_no_other(poisoned: tuple[LM, int]) -> None:
    lm, token = poisoned
    outputs = lm.generate([[5, token, 6], *PROMPTS, [token]], params=[OPTIONS[0], *OPTIONS, OPTIONS[1]])
    for failed in (outputs[0], outputs[-1]):
        assert isinstance(failed.error, NonFiniteLogits)
        assert failed.token_ids == []
    assert [output.token_ids for output in outputs[1:-1]] == [alone(i) for i in range(len(PROMPTS))]
    assert all_free(lm)


def test_pages_left_full_of_nan_harm_no_later_request(poisoned: tuple[LM, int]) -> None:
    lm, token = poisoned
    with pytest.raises(NonFiniteLogits):
        lm.generate([token] * 60, max_new_tokens=2)
    poison(lm.pool)
    assert lm.generate(PROMPTS[1], **OPTIONS[1]).token_ids == alone(1)


# Pages ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_request_ends_and_every_page_comes_back(data: st.DataObject) -> None:
    """Random lengths, pool sizes, budgets, arrivals and aborts: what finishes has its own tokens, what does not is
    aborted or has OutOfPages, and only where an empty pool would be too small."""
    page_size = data.draw(st.sampled_from((1, 4, 7)))
    num_pages = -(-data.draw(st.integers(10, 90)) // page_size)
    lm = lm_with(num_pages, page_size)
    engine = Engine(
        lm, max_step_tokens=data.draw(st.sampled_from((1, 3, 7, 512))), max_running=data.draw(st.integers(1, 4))
    )
    results, rng = Results(), random.Random(data.draw(st.integers(0, 99)))
    waiting = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6))
    asked: dict[int, int] = {}
    aborted: set[int] = set()
    for _ in range(3000):
        if waiting and rng.random() < 0.4:
            which = waiting.pop()
            asked[engine.add_request(PROMPTS[which], **OPTIONS[which])] = which
        if asked and rng.random() < 0.03:
            victim = rng.choice(list(asked))
            aborted |= {victim} if engine.abort(victim) else set()
        results.take(engine.step())
        held = sum(lm.pool.references(page) > 0 for page in range(num_pages))
        assert held == num_pages - lm.pool.num_free
        if not waiting and not engine.has_work:
            break
    else:
        raise AssertionError("no progress")
    assert all_free(lm)
    assert results.ends.keys() | aborted == asked.keys()
    for request, which in asked.items():
        tokens, expected = results.tokens.get(request, []), alone(which)
        if request in aborted:
            assert tokens == expected[: len(tokens)]
        elif results.ends[request].reason == "error":
            assert isinstance(results.ends[request].error, OutOfPages)
            assert len(PROMPTS[which]) + OPTIONS[which]["max_new_tokens"] > num_pages * page_size
        else:
            assert tokens == expected


def test_abort_frees_the_pages_of_waiting_and_running_requests_and_says_no_more_of_them() -> None:
    lm = lm_with()
    engine = Engine(lm, max_running=1)
    running, waiting = engine.add_request(PROMPTS[1], max_new_tokens=50), engine.add_request(PROMPTS[0])
    engine.step()
    assert engine.abort(waiting)
    assert engine.abort(running)
    assert all_free(lm)
    assert not engine.abort(running)
    assert not engine.abort(12345)
    assert (engine.has_work, engine.step()) == (False, [])


@pytest.mark.parametrize("prompts", [PROMPTS[1], PROMPTS[:3]], ids=["one", "several"])
def test_a_stream_left_early_frees_its_pages(prompts: Any) -> None:
    lm = lm_with()
    for count, _ in enumerate(lm.stream(prompts, max_new_tokens=50)):
        if count == 4:
            break
    assert all_free(lm)
    stream = lm.stream(prompts, max_new_tokens=50)
    next(stream)
    assert not all_free(lm)
    stream.close()
    assert all_free(lm)
    lm.stream(prompts)  # never started: nothing was taken
    assert all_free(lm)


def test_an_exception_in_the_callers_loop_frees_the_pages() -> None:
    lm = lm_with()
    stream = lm.stream(PROMPTS[1], max_new_tokens=50)
    with pytest.raises(ZeroDivisionError):
        for _ in stream:
            raise ZeroDivisionError
    stream.close()
    assert all_free(lm)


def test_a_stream_is_the_output_in_pieces() -> None:
    lm = lm_with()
    outputs = lm.generate(PROMPTS, params=OPTIONS)
    tokens: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    texts = dict.fromkeys(tokens, "")
    reasons = {}
    for piece in lm.stream(PROMPTS, params=OPTIONS):
        assert piece.index not in reasons
        texts[piece.index] += piece.text
        if piece.token_id is not None:
            tokens[piece.index].append(piece.token_id)
        else:
            reasons[piece.index] = piece.finish_reason
    assert list(tokens.values()) == [output.token_ids for output in outputs]
    assert list(texts.values()) == [output.text for output in outputs]
    assert [reasons[i] for i in tokens] == [output.finish_reason for output in outputs]


def test_one_bad_prompt_in_a_list_stops_the_call_before_anything_runs() -> None:
    lm = lm_with()
    for bad in ([VOCAB_SIZE], [-1]):
        with pytest.raises(InvalidPrompt):
            lm.generate([PROMPTS[0], bad], max_new_tokens=3)
        with pytest.raises(InvalidPrompt):
            lm.stream([PROMPTS[0], bad], max_new_tokens=3)
    with pytest.raises(InvalidParam, match="params has 1 entries for 2 prompts"):
        lm.generate([PROMPTS[0], PROMPTS[1]], params=[{}])
    for params in ([{}, None], ["ab", {}], {"seed": 1, "top_k": 2}):
        with pytest.raises(InvalidParam, match="params must be a list of dicts"):
            lm.generate([PROMPTS[0], PROMPTS[1]], params=params)
    with pytest.raises(HandloomError, match="prompt"):
        lm.generate(PROMPTS[0], prompt=PROMPTS[1])
    assert all_free(lm)


@pytest.mark.parametrize("limits", [{"max_step_tokens": 0}, {"max_running": 0}, {"max_step_tokens": -3}])
def test_an_engine_that_could_never_step_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InvalidParam, match="must be 1 or more"):
        Engine(loaded("llama"), **limits)


def test_closing_an_engine_ends_everything() -> None:
    lm = lm_with()
    engine = Engine(lm, max_running=2)
    add_all(engine)
    engine.step()
    engine.close()
    assert not engine.has_work
    assert all_free(lm)


def test_a_sequence_of_another_model_is_refused_and_neither_cache_is_touched() -> None:
    ours, other = lm_with(), lm_with()
    sequence, kept = other.sequence(PROMPTS[0]), ours.sequence(PROMPTS[0])
    expected = kept.logits
    assert sequence.logits.shape == expected.shape
    with pytest.raises(InvalidPrompt, match="another model"):
        ours.generate(sequence, max_new_tokens=2)
    assert torch.equal(kept.logits, expected)


def test_only_a_seed_that_gives_the_tokens_again_is_reported() -> None:
    lm = lm_with()
    assert lm.generate(PROMPTS[0], max_new_tokens=1).seed is None
    assert lm.generate(PROMPTS[0], max_new_tokens=1, do_sample=True, rng="torch").seed is None
    assert lm.generate(PROMPTS[0], max_new_tokens=1, do_sample=True, seed=5).seed == 5


def test_params_that_are_no_list_and_batches_without_a_mask_are_told_what_to_do() -> None:
    lm = lm_with()
    with pytest.raises(InvalidParam, match="must be a list of dicts"):
        lm.generate(PROMPTS[0], params={"seed": 1})
    with pytest.raises(InvalidPrompt, match="attention_mask"):
        lm.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_an_output_shows_its_text_and_what_else_was_asked_for_in_short() -> None:
    lm = lm_with()
    plain = repr(lm.generate(list(range(4, 44)), max_new_tokens=20))
    assert plain.startswith("Output(text=") and "finish_reason='length'" in plain and "None" not in plain
    assert len(plain) < 400
    rich = repr(lm.generate([5, 6], max_new_tokens=20, output_scores=True, output_hidden_states=True, logprobs=3))
    assert "scores=[tensor(" in rich and "hidden_states=[" in rich and len(rich) < 2000
