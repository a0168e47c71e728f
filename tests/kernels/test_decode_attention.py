"""decode_attention.py: exact with every feature, and independent of company, programs and queries of the same call."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import decode_attention as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from kernel_testing import DEVICE, DTYPES, HALF, ON_GPU, assert_as_exact_as, draw
from paged import Paged

SMALL = {"BLOCK_N": 16, "SPLIT": 32, "FOLD_SPLITS": 4, "FOLD_ROWS": 4, "PROGRAMS": 2}
FEATURES = [{}, {"window": 40}, {"softcap": 3.0}, {"sinks": True}, {"alibi_slopes": True}]
EVERYTHING = {"window": 50, "softcap": 5.0, "sinks": True, "alibi_slopes": True}


def batch(
    lengths: list[int],
    new: list[int],
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (32, 32),
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """The arguments up to context_lens; where keys and values differ in width their pages are strided."""
    paged = Paged.make(
        lengths=lengths,
        new=new,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=max(widths),
        page_size=page_size,
        dtype=dtype,
    )
    q, k_pages, v_pages, *rest = (x.to(DEVICE) for x in paged.arguments())
    return q[..., : widths[0]], k_pages[..., : widths[0]], v_pages[..., : widths[1]], *rest


def options(features: dict[str, Any], num_heads: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random tensors for the features that need one."""
    given = dict(features)
    if "sinks" in given:
        given["sinks"] = draw(num_heads, dtype=dtype)
    if "alibi_slopes" in given:
        given["alibi_slopes"] = 0.1 * draw(num_heads).abs()
    return given


def positional(args: tuple[Tensor, ...], scale: float, given: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of the reference in order."""
    names = ("window", "softcap", "sinks", "alibi_slopes", "k_scales", "v_scales")
    return (*args, scale, *(given.get(name) for name in names))


def decode(args: tuple[Tensor, ...], scale: float = 0.3, blocks: dict[str, int] = SMALL, **given: Any) -> Any:
    most = int((args[4][1:] - args[4][:-1]).max())
    return kernels.decode_attention(*args, scale, **{"max_query_len": most, **given}, blocks=blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [*FEATURES, EVERYTHING], ids=lambda given: " ".join(given) or "plain")
def test_decode(features: dict[str, Any], dtype: torch.dtype) -> None:
    args = batch([1, 63, 100], [1, 3, 1], dtype=dtype)
    given = options(features, 4, dtype)
    ours = decode(args, return_lse=True, **given)
    assert_as_exact_as(partial(reference.paged_attention, return_lse=True), *positional(args, 0.3, given), ours=ours)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 2), (6, 2), (20, 1)], ids=str)
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_queries_and_heads_fill_tiles_of_rows(queries: int, heads: tuple[int, int]) -> None:
    args = batch([40], [queries], heads, (16, 16))
    assert_as_exact_as(reference.paged_attention, *args, 0.3, ours=decode(args))


@pytest.mark.parametrize(
    "widths", [(8, 8), (20, 16), (64, 64), (80, 80), (96, 64), (112, 112), (128, 128), (192, 128), (256, 256)], ids=str
)
def test_widths_that_are_no_powers_of_two(widths: tuple[int, int]) -> None:
    args = batch([33], [2], (2, 1), widths, dtype=HALF)
    assert_as_exact_as(reference.paged_attention, *args, 0.1, ours=decode(args, 0.1))


@pytest.mark.parametrize("page_size", [1, 2, 8, 24, 32, 128])
def test_pages_of_any_size(page_size: int) -> None:
    args = batch([100, 5], [1, 2], page_size=page_size)
    assert_as_exact_as(reference.paged_attention, *args, 0.3, ours=decode(args))


def test_more_splits_than_are_folded_at_once() -> None:
    args = batch([1000], [1], (2, 1), (16, 16))
    assert_as_exact_as(reference.paged_attention, *args, 0.3, ours=decode(args))


def test_values_that_are_columns_of_the_keys_are_read_once() -> None:
    """Latent attention; the columns beyond the values are a second, narrower part."""
    q, k_pages, _, *rest = batch([70], [2], (20, 1), (48, 48))
    args = (q, k_pages, k_pages[..., :32], *rest)
    assert kernels.tile_widths(*args[1:3])["V_IN_K"]
    out = decode(args)
    assert_as_exact_as(reference.paged_attention, *args, 0.3, ours=out)
    apart = (q, k_pages, k_pages[..., :32].clone(), *rest)
    assert not kernels.tile_widths(*apart[1:3])["V_IN_K"]
    assert torch.equal(decode(apart), out)


@pytest.mark.parametrize("codes", [torch.int8] + [torch.float8_e4m3fn] * ON_GPU, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(codes: torch.dtype, dtype: torch.dtype) -> None:
    q, k_pages, v_pages, *rest = batch([100, 7], [1, 3], dtype=dtype)
    pages = [torch.randint(-100, 101, x.shape).to(DEVICE, codes) for x in (k_pages, v_pages)]
    scales = [0.01 * draw(*x.shape[:3]).abs() for x in pages]
    args = (q, *pages, *rest)
    given = {"k_scales": scales[0], "v_scales": scales[1]}
    assert_as_exact_as(reference.paged_attention, *positional(args, 0.3, given), ours=decode(args, **given))


@pytest.mark.parametrize("features", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_sequence_does_not_depend_on_its_company(features: dict[str, Any]) -> None:
    counts, lengths = [1, 0, 3, 1], [40, 9, 100, 7]
    args = batch(lengths, counts)
    given = options(features, 4)
    together = decode(args, **given).split(counts)
    q, k_pages, v_pages, table, starts, context_lens = args
    for s in (0, 2, 3):
        own = q[starts[s] : starts[s + 1]]
        ends = torch.tensor([0, len(own)], device=DEVICE)
        alone = (own, k_pages, v_pages, table[s : s + 1], ends, context_lens[s : s + 1])
        assert torch.equal(decode(alone, **given), together[s])


@pytest.mark.parametrize("features", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_query_does_not_depend_on_the_others_of_its_sequence(features: dict[str, Any]) -> None:
    """Alone it may see fewer splits and begin with another one, when the others' windows begin earlier."""
    args = batch([98], [4])
    given = options(features, 4)
    together = decode(args, **given)
    q, k_pages, v_pages, table, _, lengths = args
    one = torch.tensor([0, 1], device=DEVICE)
    for i in range(4):
        alone = (q[i : i + 1], k_pages, v_pages, table, one, lengths - 3 + i)
        assert torch.equal(decode(alone, **given), together[i : i + 1])


def test_nothing_depends_on_how_the_work_is_dealt_out() -> None:
    args = batch([100, 3], [2, 1])
    out = decode(args)
    assert torch.equal(decode(args), out)
    assert torch.equal(decode(args, return_lse=True)[0], out)
    for programs in (1, 100):
        assert torch.equal(decode(args, blocks={**SMALL, "PROGRAMS": programs}), out)
    narrow = (*args[:3], args[3][:, :7], *args[4:])
    wide = (*args[:3], F.pad(args[3], (0, 50), value=2**40), *args[4:])
    assert torch.equal(decode(narrow), out)
    assert torch.equal(decode(wide), out)


def test_one_split_written_at_once_is_what_folding_gives() -> None:
    """A table with room for one split leaves nothing to fold."""
    args = batch([30], [2], page_size=32)
    more = (*args[:3], F.pad(args[3], (0, 3)), *args[4:])
    sinks = draw(4)
    assert torch.equal(decode(args, sinks=sinks), decode(more, sinks=sinks))


def test_pages_before_the_window_are_not_looked_up() -> None:
    args = batch([200], [2])
    expected = decode(args, window=40)
    args[3][0, : (200 - 2 - 40 + 1) // 16] = 2**40
    assert torch.equal(decode(args, window=40), expected)


def test_tickets_can_be_given_again() -> None:
    args = batch([100, 40], [2, 1])
    tickets = torch.zeros(2 * 4 * 2, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        assert torch.equal(decode(args, tickets=tickets), decode(args))
        assert not tickets.any()


@pytest.mark.parametrize("given", [{}, {"window": 20}], ids=["plain", "window"])
def test_sequences_with_more_queries_are_left_as_they_are(given: dict[str, Any]) -> None:
    """Among them one whose rows would fill a tile of the others."""
    counts = [3, 1, 7, 2]
    args = batch([40, 100, 70, 5], counts, (2, 1))
    expected = decode(args, **given).split(counts)
    out = torch.full((13, 64), 7.0, device=DEVICE)
    assert decode(args, **given, max_query_len=2, out=out) is out
    for s, rows in enumerate(out.split(counts)):
        assert torch.equal(rows, expected[s] if counts[s] <= 2 else torch.full_like(rows, 7.0)), s


def test_strides_and_integers_of_either_size() -> None:
    q, k_pages, v_pages, table, starts, lengths = batch([50, 20], [1, 2])
    expected = decode((q, k_pages, v_pages, table, starts, lengths))
    fused = torch.cat((draw(3, 1, 32), q, draw(3, 2, 32)), dim=1)[:, 1:5]
    apart = torch.stack((k_pages, v_pages), dim=3)
    args = (fused, apart[..., 0, :], apart[..., 1, :], F.pad(table, (0, 3)).int()[:, : table.shape[1]], starts.int())
    assert torch.equal(decode((*args, lengths)), expected)
    assert torch.equal(decode((q, k_pages, v_pages, table, starts, lengths.int())), expected)


def test_the_same_as_torchs_own() -> None:
    args = batch([90], [1], (8, 2), (64, 64), page_size=128)
    q, k_pages, v_pages, table, *_ = args
    k, v = (pages[table[0, 0], :90].transpose(0, 1)[None] for pages in (k_pages, v_pages))
    expected = F.scaled_dot_product_attention(q[:, :, None], k, v, scale=0.125, enable_gqa=True)
    torch.testing.assert_close(decode(args, 0.125), expected.reshape(1, -1), rtol=1e-5, atol=1e-5)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    q, k_pages, v_pages, *rest = batch([100], [1])
    args = (100 * q, 30 * k_pages, v_pages, *rest)
    assert_as_exact_as(reference.paged_attention, *args, 0.3, ours=decode(args))


def test_a_query_without_keys_gives_nothing() -> None:
    args = batch([40, 20], [1, 1])
    args[5][1] = 0
    out, lse = decode(args, return_lse=True)
    assert not out[1].any()
    assert lse[1].eq(-math.inf).all()
    assert torch.equal(out[0], decode(batch_of_first(args))[0])


def batch_of_first(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first sequence alone, which has one query."""
    q, k_pages, v_pages, table, starts, lengths = args
    return q[:1], k_pages, v_pages, table[:1], starts[:2], lengths[:1]


def test_no_queries_are_fine() -> None:
    q, k_pages, v_pages, table, starts, lengths = batch([5], [1])
    out, lse = kernels.decode_attention(
        q[:0], k_pages, v_pages, table, 0 * starts, lengths, 1.0, max_query_len=1, return_lse=True
    )
    assert out.shape == (0, 128)
    assert lse.shape == (0, 4)


def test_what_does_not_fit_is_named() -> None:
    args = batch([40, 20], [1, 2])
    q, k_pages, v_pages, table, starts, _ = args
    int8 = torch.zeros(k_pages.shape, dtype=torch.int8, device=DEVICE)
    scales = torch.ones(k_pages.shape[:3], device=DEVICE)
    wrong: list[tuple[dict[int, Any], dict[str, Any], str]] = [
        ({0: q.double()}, {}, "q has dtype torch.float64"),
        ({0: q[:, :3]}, {}, "q has 3 heads, which 2 KV heads cannot share equally"),
        ({1: k_pages.half()}, {}, "k_pages has dtype torch.float16"),
        ({1: k_pages[..., :16]}, {}, r"k_pages has shape .* expected \[any, any, any, 32\]"),
        ({1: k_pages.transpose(2, 3).contiguous().transpose(2, 3)}, {}, "k_pages has strides .* the last must be 1"),
        ({2: v_pages[:2]}, {}, "v_pages has shape"),
        ({1: int8, 2: int8}, {}, "k_pages has dtype torch.int8"),
        ({1: int8, 2: int8}, {"k_scales": scales}, "k_scales and v_scales are given together"),
        ({1: int8, 2: int8}, {"k_scales": scales, "v_scales": scales[:1]}, "v_scales has shape"),
        ({3: table[:1]}, {}, "page_table has shape"),
        ({3: table.float()}, {}, "page_table has dtype torch.float32"),
        ({4: starts[1:]}, {}, "cu_seqlens has shape"),
        ({}, {"window": 0}, "window is 0"),
        ({}, {"softcap": 0.0}, "softcap is 0.0"),
        ({}, {"sinks": draw(3)}, "sinks has shape"),
        ({}, {"alibi_slopes": draw(4, 1)}, "alibi_slopes has shape"),
        ({}, {"max_query_len": 17}, "max_query_len is 17; there may be 1 to 16"),
        ({}, {"max_query_len": 1}, "3 queries of 2 sequences are more than max_query_len = 1 each"),
        ({}, {"tickets": torch.zeros(1, dtype=torch.int32, device=DEVICE)}, "tickets has 1 elements; 4 are needed"),
        ({}, {"out": draw(3, 64)}, r"out has shape \[3, 64\]; expected \[3, 128\]"),
        ({}, {"out": draw(3, 128, dtype=torch.float16)}, "out has dtype torch.float16"),
        ({}, {"scale": 0.0}, "scale is 0.0; it must be positive"),
        ({}, {"blocks": {**SMALL, "SPLIT": 24}}, "SPLIT = 24 is not a multiple of BLOCK_N = 16"),
    ]
    for change, given, message in wrong:
        changed = tuple(change.get(i, x) for i, x in enumerate(args))
        with pytest.raises(KernelError, match=message):
            kernels.decode_attention(*changed, **{"scale": 0.3, "max_query_len": 2, "blocks": SMALL, **given})
