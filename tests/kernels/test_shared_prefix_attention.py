"""shared_prefix_attention.py: the same as reading the prefix once per sequence, and independent of the company."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.shared_prefix_attention import merge_attention, shared_prefix_attention
from kernel_testing import DEVICE, DTYPES, HALF, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw
from paged import Paged

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLIT": 32, "FOLD_SPLITS": 4}
OWN = {"BLOCK_N": 16, "SPLIT": 32, "FOLD_SPLITS": 4, "FOLD_ROWS": 4, "PROGRAMS": 2}


def behind_a_prefix(
    prefix: int,
    lengths: list[int],
    new: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
) -> list[Any]:
    """The arguments up to context_lens: the first sequence of a poisoned pool is the prefix, `lengths` follow it."""
    paged = Paged.make(
        lengths=[prefix, *lengths],
        new=[1, *new],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
    )
    q, k_pages, v_pages, table, starts, context_lens = (x.to(DEVICE) for x in paged.arguments())
    prefix_pages = table[0, : prefix // page_size].contiguous()
    return [q[1:], k_pages, v_pages, prefix_pages, prefix, table[1:], starts[1:] - 1, context_lens[1:]]


def attend(args: list[Any], scale: float = 0.3, **given: Any) -> Tensor:
    most = int((args[6][1:] - args[6][:-1]).max())
    return shared_prefix_attention(*args, scale, **{"max_query_len": most, "blocks": SMALL, "own_blocks": OWN, **given})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", ["plain", "softcap", "sinks", "both"])
def test_shared_prefix(features: str, dtype: torch.dtype) -> None:
    args = behind_a_prefix(96, [1, 40, 7, 16, 3], [1, 3, 2, 1, 3], dtype=dtype)
    softcap = 3.0 if features in ("softcap", "both") else None
    sinks = draw(4, dtype=dtype) if features in ("sinks", "both") else None
    ours = attend(args, softcap=softcap, sinks=sinks)
    assert_as_exact_as(reference.shared_prefix_attention, *args, 0.3, softcap, sinks, ours=ours)


@pytest.mark.parametrize("heads", [(3, 3), (8, 1), (20, 1)], ids=str)
def test_rows_of_all_sequences_fill_tiles(heads: tuple[int, int]) -> None:
    args = behind_a_prefix(32, [5, 5, 9], [5, 1, 3], heads, 16)
    assert_as_exact_as(reference.shared_prefix_attention, *args, 0.3, ours=attend(args))


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_widths(head_dim: int) -> None:
    args = behind_a_prefix(48, [6, 20], [1, 1], (2, 1), head_dim, HALF)
    assert_as_exact_as(reference.shared_prefix_attention, *args, 0.1, ours=attend(args, 0.1))


def test_more_splits_than_are_folded_at_once() -> None:
    args = behind_a_prefix(320, [4, 9], [1, 1], (2, 1), 16, page_size=64)
    assert_as_exact_as(reference.shared_prefix_attention, *args, 0.3, ours=attend(args))


def test_latent_pages() -> None:
    """One KV head whose values are the first columns of its keys."""
    args = behind_a_prefix(32, [6, 20], [1, 2], (6, 1), 48)
    args[2] = args[1][..., :32]
    assert_as_exact_as(reference.shared_prefix_attention, *args, 0.3, ours=attend(args))


def test_a_row_does_not_depend_on_its_company() -> None:
    q, k_pages, v_pages, prefix_pages, prefix, table, starts, lengths = behind_a_prefix(
        96, [5, 40, 7, 16, 3, 9, 30], [1] * 7
    )
    sinks = draw(4)

    def run(rows: slice) -> Tensor:
        part = starts[rows.start : rows.stop + 1] - rows.start
        args = [q[rows], k_pages, v_pages, prefix_pages, prefix, table[rows], part, lengths[rows]]
        return attend(args, sinks=sinks)

    assert_rows_do_not_depend_on_company(run, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 80), (5, 2, 128)], ids=str)
def test_merge(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, heads, width = shape
    first, second = (draw(tokens, heads * width, dtype=dtype) for _ in range(2))
    first_lse, second_lse = (draw(tokens, heads, scale=5) for _ in range(2))
    ours = merge_attention(first, first_lse, second, second_lse)
    assert_as_exact_as(reference.merge_attention, first, first_lse, second, second_lse, ours=ours)


def test_a_part_without_keys_has_no_weight() -> None:
    first, second, lse = draw(2, 32), torch.zeros(2, 32, device=DEVICE), draw(2, 2)
    nothing = torch.full((2, 2), -math.inf, device=DEVICE)
    for merge in (merge_attention, reference.merge_attention):
        out, merged = merge(first, lse, second, nothing)
        torch.testing.assert_close((out, merged), (first, lse))
        out, merged = merge(second, nothing, second, nothing)
        assert not out.any()
        assert torch.equal(merged, nothing)


def test_halves_merge_into_the_whole() -> None:
    """Attention over the older and over the newer keys of a sequence, merged."""
    paged = Paged.make(lengths=[64], new=[1], num_heads=4, num_kv_heads=2, head_dim=32)
    q, k_pages, v_pages, table, starts, _ = (x.to(DEVICE) for x in paged.arguments())
    half, whole = torch.tensor([32], device=DEVICE), torch.tensor([64], device=DEVICE)
    parts = [
        part
        for pages in (table[:, :2], table[:, 2:])
        for part in reference.paged_attention(q, k_pages, v_pages, pages, starts, half, 0.3, return_lse=True)
    ]
    out, lse = merge_attention(*parts)
    expected = reference.paged_attention(q, k_pages, v_pages, table, starts, whole, 0.3, return_lse=True)
    torch.testing.assert_close((out, lse), expected)


def test_no_rows_are_fine() -> None:
    args = behind_a_prefix(32, [5], [1])
    args[0], args[6] = args[0][:0], 0 * args[6]
    assert shared_prefix_attention(*args, 1.0, max_query_len=1).shape == (0, 128)
    out, lse = merge_attention(draw(0, 8), draw(0, 2), draw(0, 8), draw(0, 2))
    assert out.shape == (0, 8)
    assert lse.shape == (0, 2)


def test_what_does_not_fit_is_named() -> None:
    args = behind_a_prefix(32, [5, 6], [1, 1])
    wrong: list[tuple[dict[int, Any], dict[str, Any], str]] = [
        ({4: 31}, {}, "prefix_length is 31, and 2 pages of 16 tokens are filled by 32"),
        ({3: args[3][:0], 4: 0}, {}, "prefix_length is 0"),
        ({3: args[3][None]}, {}, "prefix_pages has shape"),
        ({0: args[0].double()}, {}, "q has dtype torch.float64"),
        ({}, {"max_query_len": 17}, "max_query_len is 17"),
        ({}, {"sinks": draw(5)}, "sinks has shape"),
        ({}, {"blocks": {**SMALL, "SPLIT": 24}}, "SPLIT = 24 is not a multiple of BLOCK_N = 16"),
    ]
    for change, given, message in wrong:
        with pytest.raises(KernelError, match=message):
            attend([change.get(i, x) for i, x in enumerate(args)], **given)
    first, lse = draw(2, 32), draw(2, 2)
    for bad, message in (
        ((first, lse, first[:1], lse), "second has shape"),
        ((first, lse.half(), first, lse), "first_lse has dtype"),
        ((first, lse, first.half(), lse), "second has dtype"),
        ((first, draw(2, 3), first, draw(2, 3)), "32 columns cannot be those of 3 heads"),
    ):
        with pytest.raises(KernelError, match=message):
            merge_attention(*bad)
