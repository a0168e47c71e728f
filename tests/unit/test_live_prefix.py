"""Sequences as objects use the prefix cache: fewer tokens are computed, and the logits are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import all_free, lm_in_float64
from handloom.lm import LM
from tiny_models import random_ids

PAGE_SIZE = 4
PROMPT = random_ids(0, 22)


class Counted:
    """Tokens of the forward passes of a model, since they were last asked for."""

    def __init__(self, lm: LM) -> None:
        self._forward, self._count = lm.transformer.forward, 0
        lm.transformer.forward = self  # type: ignore[assignment, method-assign]

    def __call__(self, batch: Any, *rest: Any) -> Tensor:
        self._count += len(batch.input_ids)
        return self._forward(batch, *rest)

    def since(self) -> int:
        count, self._count = self._count, 0
        return count


@pytest.fixture
def lm() -> Iterator[LM]:
    """A model whose every page must be free again after the test."""
    lm = lm_in_float64()
    yield lm
    assert all_free(lm)


def logits_of(ids: list[int]) -> Tensor:
    """By a model that has seen nothing before."""
    with lm_in_float64().sequence(ids) as sequence:
        return sequence.logits


@pytest.mark.parametrize("more", [0, 1, 9])
def test_a_second_sequence_computes_what_is_new_and_reads_the_same_logits(lm: LM, more: int) -> None:
    computed, ids = Counted(lm), PROMPT + random_ids(1, more)
    with lm.sequence(PROMPT) as first, lm.sequence(ids) as second:
        assert torch.equal(first.logits, logits_of(PROMPT)) and computed.since() == 22
        assert torch.equal(second.logits, logits_of(ids)) and computed.since() == 2 + more
        assert second.page_table[:5] == first.page_table[:5]
        assert torch.equal(lm.sequence(random_ids(2, 22)).logits, logits_of(random_ids(2, 22)))
        assert computed.since() == 22


def test_sequences_and_requests_share_with_each_other(lm: LM) -> None:
    expected = lm_in_float64().generate(PROMPT, max_new_tokens=5, eos_token_id=[]).token_ids
    computed = Counted(lm)
    with lm.sequence(PROMPT) as sequence:
        _ = sequence.logits
    computed.since()
    assert lm.generate(PROMPT, max_new_tokens=5, eos_token_id=[]).token_ids == expected
    assert computed.since() == 2 + 4
    with lm.sequence(PROMPT + expected) as sequence:
        assert torch.equal(sequence.logits, logits_of(PROMPT + expected))
        assert computed.since() == 27 - 24


def test_sequences_that_step_together_store_one_prompt_once_and_part_where_they_differ(lm: LM) -> None:
    sequences = [lm.sequence(PROMPT) for _ in range(3)]
    lm.step(sequences)
    assert len({page for sequence in sequences for page in sequence.page_table[:5]}) == 5
    for i, sequence in enumerate(sequences):
        sequence.rewind(4)
        sequence.append(random_ids(5 + i, 7))
    for i, logits in enumerate(lm.step(sequences)):
        assert torch.equal(logits, logits_of(PROMPT[:18] + random_ids(5 + i, 7)))
    for sequence in sequences:
        sequence.free()


def test_what_hooks_must_see_is_computed_and_what_they_changed_is_on_offer_to_nobody(lm: LM) -> None:
    computed, expected = Counted(lm), logits_of(PROMPT)
    with lm.sequence(PROMPT) as first, lm.sequence(PROMPT) as second, lm.sequence(PROMPT) as third:
        with lm.patch("blocks.0.hook_resid_post", lambda values, at: values * 2):
            assert not torch.equal(first.logits, expected)
        computed.since()
        assert torch.equal(second.logits, expected) and computed.since() == 22
        with lm.capture("blocks.0.hook_resid_post") as acts:
            assert torch.equal(third.logits, expected) and computed.since() == 22
        assert len(acts["blocks.0.hook_resid_post"]) == 22


def test_edited_evicted_and_embedded_sequences_neither_take_nor_give(lm: LM) -> None:
    embedded = lm.transformer.embedding[torch.tensor(PROMPT)]
    with lm.sequence(PROMPT) as edited, lm.sequence(PROMPT) as evicted, lm.sequence(embedded) as third:
        for sequence in (edited, evicted):
            _ = sequence.logits
        lm.pool.forget_cached()
        edited.set_kv(0, 0, k=edited.kv(0, 0, 8)[0] * 3)
        evicted.evict(2, 6)
        computed = Counted(lm)
        for sequence in (edited, evicted):
            sequence.append(random_ids(3, 12))
            _ = sequence.logits
        assert torch.equal(third.logits, logits_of(PROMPT)) and computed.since() == 12 + 12 + 22
        with lm.sequence(PROMPT) as plain:
            assert torch.equal(plain.logits, logits_of(PROMPT)) and computed.since() == 22


def test_a_sequence_that_grows_token_by_token_looks_up_nothing(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with lm.sequence(PROMPT) as sequence:
        _ = sequence.logits
        monkeypatch.setattr(lm.pool.prefixes, "find", lambda *_: 1 // 0)
        for token in random_ids(4, 9):
            sequence.append(token)
            _ = sequence.logits
