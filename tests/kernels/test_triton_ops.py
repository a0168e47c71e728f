"""handloom.ops.triton_ops chooses kernels by each sequence's own tokens, and every launch leaves its tickets zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom.ops.triton_ops import FEW, TritonOps
from handloom_kernels import reference
from handloom_kernels.reference import Norm
from kernel_testing import DEVICE, HALF, assert_as_exact_as, draw
from paged import Paged

NEW = (1, 40, 16, 1, 17, 3)
LENGTHS = (600, 70, 90, 1, 30, 700)
OPTIONS: dict[str, tuple[int | None, float | None]] = {"plain": (None, None), "window, softcap": (50, 5.0)}


@pytest.fixture
def ops() -> TritonOps:
    return TritonOps(DEVICE)


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    paged = Paged.make(lengths=LENGTHS, new=NEW, num_heads=4, num_kv_heads=2, head_dim=16, dtype=HALF)
    return tuple(x.to(DEVICE) for x in paged.arguments())


def part_of(batch: tuple[Tensor, ...], kept: Sequence[int]) -> tuple[Tensor, ...]:
    """The same batch of fewer sequences."""
    q, k_pages, v_pages, table, starts, lengths = batch
    counts = torch.tensor([0, *(NEW[s] for s in kept)], device=DEVICE)
    rows = torch.cat([q[starts[s] : starts[s + 1]] for s in kept])
    return rows, k_pages, v_pages, table[list(kept)], counts.cumsum(0), lengths[list(kept)]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_mixed_batch_is_exact_and_gives_each_sequence_the_bits_it_has_in_any_company(
    name: str, ops: TritonOps, batch: tuple[Tensor, ...]
) -> None:
    def attend(args: tuple[Tensor, ...], counts: Sequence[int]) -> Tensor:
        return ops.paged_attention(*args, 0.25, *OPTIONS[name], query_lens=counts)

    together = attend(batch, NEW)
    assert_as_exact_as(reference.paged_attention, *batch, 0.25, *OPTIONS[name], ours=together)
    each = together.split(NEW)
    for kept in ((0,), (0, 3), (0, 2, 3, 5), (1, 4), (4,), (1, 3)):
        apart = attend(part_of(batch, kept), [NEW[s] for s in kept])
        for s, own in zip(kept, apart.split([NEW[s] for s in kept]), strict=True):
            assert torch.equal(own, each[s]), f"sequence {s} among {kept}"


def test_launches_share_tickets_and_leave_them_zero(
    ops: TritonOps, batch: tuple[Tensor, ...], monkeypatch: Any
) -> None:
    made: list[tuple[Any, ...]] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **given: made.append(shape) or zeros(*shape, **given))
    for kept in (range(6), (0, 5), (2, 3)):
        counts = [NEW[s] for s in kept]
        ops.paged_attention(*part_of(batch, kept), 0.25, query_lens=counts)
        assert not ops.tickets.any(), kept
    hidden, weight = draw(FEW, 64, dtype=HALF), draw(4 * 128, 64, dtype=HALF)
    norms = [Norm("rms", draw(width, dtype=HALF), None, 1e-5) for width in (64, 128)]
    pages = draw(2, 2, 16, 1, 128, dtype=HALF)
    slots = torch.arange(FEW, device=DEVICE)
    ops.norm_qkv(hidden, norms[0], weight, None, norms[1], norms[1], None, *pages, slots)
    assert not ops.tickets.any()
    assert not made, "a launcher made tickets of its own"


def test_more_tickets_than_are_kept_are_made_by_the_launcher(ops: TritonOps, batch: tuple[Tensor, ...]) -> None:
    args = part_of(batch, (0, 5))
    expected = ops.paged_attention(*args, 0.25, query_lens=(1, 3))
    ops.tickets = ops.tickets[:3]
    assert torch.equal(ops.paged_attention(*args, 0.25, query_lens=(1, 3)), expected)
