"""A LiveSequence is its tokens: whatever was appended, rewound, forked or generated, its logits are those of a fresh
forward pass, and its pages come back."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from engines import all_free, close, fresh_logits, lm_with
from handloom.errors import ContextOverflow, InvalidParam, InvalidPrompt, OutOfPages
from handloom.live import LiveSequence
from tiny_models import random_ids

FAMILIES = ["llama", "gpt2", "gemma3_text"]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": []}


class LiveSequences(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(family=st.sampled_from(FAMILIES), page_size=st.sampled_from((1, 4, 16)))
    def load(self, family: str, page_size: int) -> None:
        self.lm = lm_with(600 // page_size, page_size, family)
        self.alive: list[tuple[LiveSequence, list[int]]] = []

    def past(self, sequence: LiveSequence) -> list[int]:
        return next(tokens for held, tokens in self.alive if held is sequence)

    @rule(target=sequences, seed=st.integers(0, 99), length=st.integers(1, 20))
    def start(self, seed: int, length: int) -> LiveSequence:
        tokens = random_ids(seed, length)
        self.alive.append((self.lm.sequence(tokens), tokens))
        return self.alive[-1][0]

    @rule(sequence=sequences)
    def read(self, sequence: LiveSequence, look: bool = True) -> None:
        if look and len(sequence):
            assert close(sequence.logits, fresh_logits(self.lm, self.past(sequence)))
            assert sequence.num_pending == 0

    @rule(sequence=sequences, seed=st.integers(0, 99), count=st.integers(0, 9), look=st.booleans())
    def append(self, sequence: LiveSequence, seed: int, count: int, look: bool) -> None:
        tokens = random_ids(seed, count)
        sequence.append(tokens if count != 1 else tokens[0])
        self.past(sequence).extend(tokens)
        self.read(sequence, look)

    @rule(sequence=sequences, count=st.integers(0, 12), look_before=st.booleans(), look=st.booleans())
    def rewind(self, sequence: LiveSequence, count: int, look_before: bool, look: bool) -> None:
        self.read(sequence, look_before)
        count = min(count, len(sequence))
        sequence.rewind(count)
        del self.past(sequence)[len(sequence) :]
        self.read(sequence, look)

    @rule(sequence=sequences, count=st.integers(0, 12), look=st.booleans())
    def truncate_left(self, sequence: LiveSequence, count: int, look: bool) -> None:
        count = min(count, len(sequence))
        sequence.truncate_left(count)
        del self.past(sequence)[:count]
        self.read(sequence, look)

    @rule()
    def step(self) -> None:
        together = [(sequence, tokens) for sequence, tokens in self.alive if tokens]
        if together:
            logits = self.lm.step([sequence for sequence, _ in together])
            for row, (_, tokens) in zip(logits, together, strict=True):
                assert close(row, fresh_logits(self.lm, tokens))

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: LiveSequence) -> LiveSequence:
        self.alive.append((sequence.fork(), list(self.past(sequence))))
        return self.alive[-1][0]

    @rule(sequence=sequences)
    def generate(self, sequence: LiveSequence) -> None:
        if len(sequence) and len(sequence) < 100:
            new = self.lm.generate(sequence, **GREEDY).token_ids
            assert new == lm_with(family=self.lm.name).generate(self.past(sequence), **GREEDY).token_ids
            self.past(sequence).extend(new)

    @rule(sequence=sequences)
    def free(self, sequence: LiveSequence) -> None:
        sequence.free()

    @rule(sequence=consumes(sequences))
    def drop(self, sequence: LiveSequence) -> None:
        sequence.free()
        self.alive = [entry for entry in self.alive if entry[0] is not sequence]

    @invariant()
    def every_page_is_held_by_a_living_sequence(self) -> None:
        if hasattr(self, "alive"):
            held = {page for sequence, _ in self.alive for page in sequence.page_table}
            assert self.lm.pool.num_free == self.lm.pool.num_pages - len(held)
            assert all(sequence.token_ids == tokens for sequence, tokens in self.alive)

    def teardown(self) -> None:
        for sequence, tokens in getattr(self, "alive", []):
            if tokens:
                assert close(sequence.logits, fresh_logits(self.lm, tokens))


TestLiveSequences = LiveSequences.TestCase
TestLiveSequences.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, derandomize=True, database=None
)


def test_logits_after_more_tokens_than_a_step_runs() -> None:
    lm = lm_with(200, 16, "llama", max_context=2000)
    tokens = random_ids(1, 1300)
    with lm.sequence(tokens) as sequence:
        assert close(sequence.logits, fresh_logits(lm, tokens))
        assert sequence.logits.shape == (lm.spec.vocab_size,)
        assert sequence.logits.dtype == torch.float32


def test_generation_continues_in_place_and_reads_no_token_twice() -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(3, 10))
    _ = sequence.logits
    seen: list[int] = []
    forward = lm.transformer.forward

    def counting(batch: Any, kv: Any) -> torch.Tensor:
        seen.extend(batch.positions)
        return forward(batch, kv)

    lm.transformer.forward = counting  # type: ignore[method-assign]
    try:
        output = lm.generate(sequence, **GREEDY)
    finally:
        del lm.transformer.forward
    assert sequence.token_ids == random_ids(3, 10) + output.token_ids
    assert seen == [9, 10, 11, 12, 13], "the last token again, for its logits, and each new one once"


def test_pages_return_on_free_with_and_garbage_collection() -> None:
    lm = lm_with()
    first = lm.sequence(random_ids(0, 9))
    _ = first.logits
    first.free()
    first.free()
    assert all_free(lm)
    with lm.sequence(random_ids(0, 9)) as second:
        _ = second.logits
        branch = second.fork()
        assert not all_free(lm)
    assert not all_free(lm)
    del branch
    gc.collect()
    assert all_free(lm)
    with pytest.raises(ZeroDivisionError), lm.sequence([5]) as third:
        _ = third.logits
        raise ZeroDivisionError
    assert all_free(lm)


def test_a_freed_sequence_keeps_its_tokens_and_can_be_computed_again() -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(0, 9))
    before = sequence.logits.clone()
    sequence.free()
    sequence.rewind(0)
    assert close(sequence.logits, before)


def test_a_text_is_its_tokens_spelled_out() -> None:
    lm = lm_with()
    with lm.sequence("Once upon a loom") as sequence:
        assert sequence.text == "Once upon a loom"
        sequence.append(lm.encode(" again").token_ids)
        assert sequence.text == "Once upon a loom again"
        assert sequence.fork().text == sequence.text


@pytest.mark.parametrize("bad", [-1, 331, 2**63, 1.5, True, "a", None])
def test_what_is_no_token_id_is_refused_and_changes_nothing(bad: Any) -> None:
    lm = lm_with()
    sequence = lm.sequence([5, 6])
    for ids in (bad, [7, bad]):
        with pytest.raises(InvalidPrompt):
            sequence.append(ids)
    assert sequence.token_ids == [5, 6]


def test_the_context_is_a_limit_with_numbers() -> None:
    sequence = lm_with(max_context=10).sequence(random_ids(0, 9))
    with pytest.raises(ContextOverflow, match=r"9 \+ 2 tokens exceed the context of 10"):
        sequence.append([5, 6])
    sequence.append(5)
    assert len(sequence) == 10


def test_an_empty_sequence_has_no_logits_and_nothing_to_continue() -> None:
    lm = lm_with()
    sequence = lm.sequence([5, 6, 7])
    _ = sequence.logits
    sequence.rewind(3)
    for act in (lambda: sequence.logits, lambda: lm.generate(sequence, **GREEDY)):
        with pytest.raises(InvalidPrompt, match="empty"):
            act()
    with pytest.raises(InvalidParam, match="cannot rewind 1 tokens: the sequence has 0"):
        sequence.rewind(1)
    sequence.append([8, 9])
    assert close(sequence.logits, fresh_logits(lm, [8, 9]))


def test_out_of_pages_says_so_and_the_sequence_survives() -> None:
    lm = lm_with(num_pages=3, page_size=4)
    first, second = lm.sequence(random_ids(0, 8)), lm.sequence(random_ids(1, 8))
    _ = first.logits
    with pytest.raises(OutOfPages, match="needs 2 more pages of 4 tokens for 8 tokens, and 1 of 3 are free"):
        _ = second.logits
    first.free()
    assert close(second.logits, fresh_logits(lm, random_ids(1, 8)))


# In the middle of generation -----------------------------------------------------------------------


def test_reading_logits_in_the_middle_of_a_stream_changes_no_token() -> None:
    lm = lm_with()
    expected = lm.generate(random_ids(3, 10), **GREEDY).token_ids
    sequence = lm.sequence(random_ids(3, 10))
    tokens: list[int] = []
    for piece in lm.stream(sequence, **GREEDY):
        if piece.token_id is not None:
            tokens.append(piece.token_id)
            assert close(sequence.logits, fresh_logits(lm, random_ids(3, 10) + tokens))
    assert tokens == expected


@pytest.mark.parametrize("pages", [200, 4], ids=["room", "no room"])
def test_a_fork_in_the_middle_of_a_stream_is_a_sequence_of_its_own(pages: int) -> None:
    """With no room for the copy of a shared page the request fails with OutOfPages, and nothing else does."""
    lm = lm_with(pages, 4)
    prompt = random_ids(3, 10)
    expected = lm_with().generate(prompt, **GREEDY).token_ids
    sequence = lm.sequence(prompt)
    forks: list[LiveSequence] = []
    tokens: list[int] = []
    try:
        for piece in lm.stream(sequence, **GREEDY):
            if piece.token_id is not None:
                tokens.append(piece.token_id)
                forks += [sequence.fork()] if len(tokens) == 2 else []
    except OutOfPages:
        assert pages == 4
        assert tokens == expected[: len(tokens)]
    else:
        assert pages == 200
        assert tokens == expected
        assert lm.generate(forks[0], **{**GREEDY, "max_new_tokens": 3}).token_ids == expected[2:]
    assert forks[0].token_ids[:12] == prompt + expected[:2]
    sequence.free()
    forks[0].free()
    assert all_free(lm)


def test_tokens_put_in_and_taken_back_in_the_middle_of_a_stream_steer_it() -> None:
    lm = lm_with()
    prompt = random_ids(3, 10)
    sequence = lm.sequence(prompt)
    for count, _ in enumerate(lm.stream(sequence, **GREEDY)):
        if count == 1:
            sequence.rewind(2)
            sequence.append([50, 51])
    steered = lm_with().generate([*prompt, 50, 51], **{**GREEDY, "max_new_tokens": 3}).token_ids
    assert sequence.token_ids == [*prompt, 50, 51, *steered]


@pytest.mark.parametrize("edit", ["emptied", "filled"])
def test_a_sequence_made_unusable_in_the_middle_of_a_stream_fails_alone(edit: str) -> None:
    lm = lm_with(max_context=40)
    other = random_ids(4, 6)
    expected = lm.generate(other, **GREEDY).token_ids
    sequence = lm.sequence(random_ids(3, 10))
    ends = {}
    tokens: list[int] = []
    for piece in lm.stream([sequence, other], **GREEDY):
        if len(tokens) == 2 and not ends:
            if edit == "emptied":
                sequence.rewind(len(sequence))
            else:
                sequence.append([5] * (40 - len(sequence)))
        if piece.finish_reason is not None:
            ends[piece.index] = type(piece.error)
        elif piece.index == 1:
            assert piece.token_id is not None
            tokens.append(piece.token_id)
    assert ends == {0: InvalidPrompt if edit == "emptied" else ContextOverflow, 1: type(None)}
    assert tokens == expected


def test_the_same_sequence_twice_in_one_call_is_refused_and_a_fork_is_not() -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(3, 10))
    with pytest.raises(InvalidPrompt, match="fork it"):
        lm.generate([sequence, sequence], **GREEDY)
    assert sequence.token_ids == random_ids(3, 10)
    first, second = lm.generate([sequence, sequence.fork()], **GREEDY)
    assert first.token_ids == second.token_ids
    assert len(sequence) == 15


def test_prompt_logprobs_of_a_computed_sequence_are_those_of_its_whole_prompt() -> None:
    lm = lm_with()
    prompt = random_ids(3, 10)
    expected = lm.generate(prompt, **GREEDY, prompt_logprobs=1)
    sequence = lm.sequence(prompt)
    _ = sequence.logits
    output = lm.generate(sequence, **GREEDY, prompt_logprobs=1)
    assert output.token_ids == expected.token_ids
    assert len(output.prompt_logprobs) == 9
    assert output.prompt_logprobs == pytest.approx(expected.prompt_logprobs, rel=1e-5)


def test_a_sequence_that_was_left_mid_stream_goes_on() -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(3, 10))
    expected = lm.generate(random_ids(3, 10), **GREEDY).token_ids
    stream = lm.stream(sequence, **GREEDY)
    next(stream)
    next(stream)
    stream.close()
    assert sequence.token_ids[10:] == expected[:2]
    held = len(sequence.page_table)
    assert held == lm.pool.num_pages - lm.pool.num_free == -(-sequence.num_computed // lm.pool.page_size)
    rest = lm.generate(sequence, **{**GREEDY, "max_new_tokens": 3})
    assert rest.token_ids == expected[2:]


def test_logits_are_the_callers_to_edit_and_a_chosen_token_may_be_a_tensor_or_a_numpy_integer() -> None:
    lm = lm_with()
    sequence = lm.sequence([1, 2, 3])
    before = sequence.logits
    sequence.logits[:] = float("-inf")
    assert torch.equal(sequence.logits, before)
    sequence.append(before.argmax())
    sequence.append(np.int64(2))
    sequence.append(torch.tensor([4, 5]))
    assert sequence.token_ids == [1, 2, 3, int(before.argmax()), 2, 4, 5]
