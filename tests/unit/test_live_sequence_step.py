"""Sequences that step together, lose their beginning, grow by embeddings or fork many times are still their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines import all_free, close, fresh_logits, lm_with
from handloom.errors import ContextOverflow, InvalidParam, InvalidPrompt, OutOfPages, UnsupportedOption
from handloom.lm import LM
from tiny_models import ragged_prompts, random_ids

LENGTHS = (9, 1, 30, 4)


@pytest.fixture(params=["llama", "gpt2", "gemma3_text"])
def lm(request: pytest.FixtureRequest) -> LM:
    return lm_with(family=request.param)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The positions of every forward pass of the llama."""
    seen: list[list[int]] = []
    transformer = lm_with().transformer
    forward = transformer.forward

    def watching(batch: Any, *rest: Any) -> torch.Tensor:
        seen.append(list(batch.positions))
        return forward(batch, *rest)

    monkeypatch.setattr(transformer, "forward", watching)
    return seen


def test_sequences_step_together_as_each_alone(lm: LM) -> None:
    past = ragged_prompts(1, LENGTHS)
    sequences = [lm.sequence(ids) for ids in past]
    for _ in range(4):
        logits = lm.step(sequences)
        assert logits.shape == (len(past), lm.spec.vocab_size)
        assert logits.dtype == torch.float32
        for sequence, ids, row in zip(sequences, past, logits, strict=True):
            assert close(row, fresh_logits(lm, ids))
            assert torch.equal(row, sequence.logits)
            sequence.append(row.argmax())
            ids.append(int(row.argmax()))


def test_a_step_is_one_forward_pass_over_what_is_pending(passes: list[list[int]]) -> None:
    lm = lm_with()
    first, second, third = (lm.sequence(ids) for ids in ragged_prompts(1, (3, 5, 2)))
    lm.step([first, second])
    first.append([7, 8])
    third.append(9)
    before = second.logits
    logits = lm.step([first, second, third])
    assert passes == [[0, 1, 2, 0, 1, 2, 3, 4], [3, 4, 0, 1, 2]]
    assert torch.equal(logits[1], before)


def test_a_step_of_more_tokens_than_a_pass_holds(passes: list[list[int]]) -> None:
    lm = lm_with(300, 16, max_context=2000)
    past = ragged_prompts(1, (700, 20, 400))
    for row, ids in zip(lm.step([lm.sequence(ids) for ids in past]), past, strict=True):
        assert close(row, fresh_logits(lm, ids))
    assert [len(positions) for positions in passes[:3]] == [512, 512, 96]


def test_a_forked_sequence_steps_beside_its_forks(lm: LM) -> None:
    past = random_ids(2, 10)
    root = lm.sequence(past)
    assert close(root.logits, fresh_logits(lm, past))
    branches = root.fork(3)
    for token, branch in enumerate(branches, 50):
        branch.append(token)
    logits = lm.step([root, *branches])
    assert close(logits[0], fresh_logits(lm, past))
    for token, row in enumerate(logits[1:], 50):
        assert close(row, fresh_logits(lm, [*past, token]))
    for sequence in (root, *branches):
        sequence.free()
    assert all_free(lm)


@pytest.mark.parametrize("count", [-1, True, 1.5, 10**9])
def test_a_number_of_forks_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(InvalidParam, match="expected an integer from 0"):
        lm_with().sequence([5]).fork(count)
    assert lm_with().sequence([5]).fork(0) == []


def test_what_cannot_step_together_is_refused_and_nothing_runs(passes: list[list[int]]) -> None:
    lm, other = lm_with(), lm_with()
    good, empty = lm.sequence([5, 6]), lm.sequence([5])
    empty.rewind(1)
    for bad, why in (
        ([], "one or more"),
        (good, "takes a list"),
        ([good, good], "twice; fork it"),
        ([good, empty], "sequence 1 is empty"),
        ([good, other.sequence([5])], "item 1 is not a sequence of this model"),
        ([good, [5, 6]], "item 1 is not a sequence of this model"),
    ):
        with pytest.raises(InvalidPrompt, match=why):
            lm.step(bad)  # type: ignore[arg-type]
    assert good.num_pending == 2
    assert passes == []


def test_a_step_without_pages_says_so_and_loses_nothing() -> None:
    lm = lm_with(num_pages=3, page_size=4)
    first, second = lm.sequence(random_ids(0, 8)), lm.sequence(random_ids(1, 8))
    with pytest.raises(OutOfPages, match="needs 2 more pages of 4 tokens for 8 tokens, and 1 of 3 are free"):
        lm.step([first, second])
    first.free()
    assert close(lm.step([second])[0], fresh_logits(lm, random_ids(1, 8)))


# Dropping the beginning ------------------------------------------------------------------------


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_what_is_left_after_truncation_is_a_sequence_from_position_0(lm: LM, count: int, computed: bool) -> None:
    past = random_ids(3, 10)
    sequence = lm.sequence(past)
    if computed:
        assert close(sequence.logits, fresh_logits(lm, past))
    branch = sequence.fork()
    sequence.truncate_left(count)
    assert sequence.token_ids == past[count:]
    assert close(sequence.logits, fresh_logits(lm, past[count:]))
    assert close(branch.logits, fresh_logits(lm, past)), "a fork keeps its beginning"


def test_truncation_to_nothing_and_beyond() -> None:
    lm = lm_with()
    sequence = lm.sequence([5, 6, 7])
    for count in (-1, 4):
        with pytest.raises(InvalidParam, match="the sequence has 3"):
            sequence.truncate_left(count)
    sequence.truncate_left(3)
    assert (len(sequence), all_free(lm)) == (0, True)
    sequence.append(8)
    assert close(sequence.logits, fresh_logits(lm, [8]))


# Embeddings ------------------------------------------------------------------------------------


def embedded(lm: LM, ids: list[int]) -> torch.Tensor:
    """What the embedding layer makes of ids: embeddings that stand for them exactly."""
    return lm.transformer.embedding[ids] * lm.spec.embedding_scale


def test_appended_embeddings_are_the_next_tokens(lm: LM) -> None:
    ids = random_ids(4, 12)
    sequence = lm.sequence(embedded(lm, ids[:5]))
    _ = sequence.logits
    sequence.append_embeddings(embedded(lm, ids[5:10]))
    assert close(sequence.logits, fresh_logits(lm, ids[:10]))
    branch = sequence.fork()
    branch.append(ids[10:])
    assert close(branch.logits, fresh_logits(lm, ids))
    branch.truncate_left(3)
    assert close(branch.logits, fresh_logits(lm, ids[3:]))
    branch.truncate_left(7)
    assert branch.num_embeddings == 0
    assert close(branch.logits, fresh_logits(lm, ids[10:]))


def test_embeddings_that_cannot_be_appended_are_refused_and_change_nothing() -> None:
    lm = lm_with(max_context=8)
    values = embedded(lm, random_ids(0, 5))
    sequence = lm.sequence(values)
    with pytest.raises(InvalidPrompt, match="expected"):
        sequence.append_embeddings(values[:, 1:])
    with pytest.raises(ContextOverflow, match=r"5 \+ 5 tokens exceed the context of 8"):
        sequence.append_embeddings(values)
    sequence.append(5)
    with pytest.raises(UnsupportedOption, match="before the first token id"):
        sequence.append_embeddings(values[:1])
    assert (len(sequence), sequence.num_embeddings) == (6, 5)
    with pytest.raises(UnsupportedOption, match="no probability"):
        _ = sequence.logprobs


# Log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 23])
def test_logprobs_of_every_token_but_the_first(lm: LM, length: int) -> None:
    ids = random_ids(5, length)
    expected = [fresh_logits(lm, ids[:at]).log_softmax(-1)[ids[at]].item() for at in range(1, length)]
    with lm.sequence(ids) as sequence:
        assert sequence.logprobs == pytest.approx(expected, rel=1e-4)
        assert (sequence.num_computed, all_free(lm)) == (0, True)


def test_logprobs_of_more_tokens_than_a_pass_holds() -> None:
    lm = lm_with(100, 16, max_context=2000)
    ids = random_ids(5, 700)
    assert lm.sequence(ids).logprobs == pytest.approx(lm.score(ids).logprobs, rel=1e-4)
