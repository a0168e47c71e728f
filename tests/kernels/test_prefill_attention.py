"""prefill_attention.py: exact over every feature, and the same bits in whatever chunks and company a query comes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.prefill_attention import prefill_attention
from kernel_testing import DEVICE, DTYPES, assert_as_exact_as, draw
from paged import Paged

SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window below a tile": {"window": 5},
    "window of tiles": {"window": 40},
    "window beyond": {"window": 1000},
    "softcap": {"softcap": 4.0},
    "sinks": {"sinks": 3},
    "alibi": {"alibi_slopes": 0.3},
    "all": {"window": 20, "softcap": 4.0, "sinks": 3, "alibi_slopes": 0.3},
}


def ragged(dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[Tensor, ...]:
    """Whole prompts, a chunk after a cached prefix, a single token; every slot that no sequence owns is NaN."""
    given = {"lengths": (63, 37, 50, 1), "new": (63, 20, 1, 1), "num_heads": 6, "num_kv_heads": 2, "head_dim": 16}
    return tuple(x.to(DEVICE) for x in Paged.make(**{**given, **shape}, dtype=dtype).arguments())


def with_tensors(options: dict[str, Any], num_heads: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The options, with one number per head where a scale is given for them."""
    per_head = {name: draw(num_heads, dtype=dtype, scale=options[name]) for name in ("sinks",) if name in options}
    if "alibi_slopes" in options:
        per_head["alibi_slopes"] = draw(num_heads, dtype=dtype, scale=options["alibi_slopes"]).abs()
    return {**options, **per_head}


def assert_exact(arguments: tuple[Any, ...], blocks: dict[str, int] | None = SMALL, **options: Any) -> None:
    """Output and log-sum-exp, against the reference in float64. Gives the optional arguments by position."""
    names = ("window", "softcap", "sinks", "alibi_slopes", "k_scales", "v_scales")
    arguments = (*arguments, arguments[0].shape[-1] ** -0.5, *(options.get(name) for name in names))
    ours = prefill_attention(*arguments, return_lse=True, blocks=blocks)
    assert_as_exact_as(partial(reference.paged_attention, return_lse=True), *arguments, ours=ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_feature(name: str, dtype: torch.dtype) -> None:
    assert_exact(ragged(dtype), **with_tensors(OPTIONS[name], 6, dtype))


@pytest.mark.parametrize("page_size", [1, 8, 64])
@pytest.mark.parametrize("name", ["causal", "all"])
def test_pages_smaller_and_larger_than_a_tile(name: str, page_size: int) -> None:
    assert_exact(ragged(page_size=page_size), **with_tensors(OPTIONS[name], 6))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (5, 1), (20, 1), (34, 2)], ids=str)
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    assert_exact(ragged(num_heads=heads[0], num_kv_heads=heads[1], lengths=(23, 9), new=(23, 4)))


@pytest.mark.parametrize("head_dim", [5, 16, 24, 64, 80, 96, 112, 128, 256])
def test_widths(head_dim: int) -> None:
    shape = {"lengths": (20, 3), "new": (20, 2), "num_heads": 2, "num_kv_heads": 1}
    assert_exact(ragged(head_dim=head_dim, **shape))


def test_values_of_another_width() -> None:
    q, k, v, *rest = ragged(head_dim=24)
    assert_exact((q, k, v[..., :10].contiguous(), *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latent_attention(dtype: torch.dtype) -> None:
    q, pages, _, *rest = ragged(dtype, head_dim=576, num_heads=4, num_kv_heads=1, lengths=(20, 18), new=(3, 18))
    assert_exact((q, pages, pages[..., :512], *rest), blocks=None)


def test_the_default_tiles() -> None:
    assert_exact(ragged(lengths=(150, 20), new=(150, 3), num_heads=4, num_kv_heads=1), blocks=None)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype, codes: torch.dtype) -> None:
    q, k, _, *rest = ragged(dtype)
    scales = [(draw(*k.shape[:3]).abs() + 0.5) / 100 for _ in "kv"]
    pages = [(draw(*k.shape) * 30).to(codes) for _ in "kv"]
    for each in scales:
        each[k[..., 0].isnan()] = torch.nan  # the slots that no sequence owns
    assert_exact((q, *pages, *rest), k_scales=scales[0], v_scales=scales[1])


def test_pages_of_an_interleaved_pool_and_queries_of_a_wider_projection() -> None:
    q, k, v, table, *rest = ragged()
    pool = torch.stack((k, v), dim=1)
    projected = torch.cat((q, q, q), dim=1)
    wide = torch.cat((table, table), dim=1)
    strided = (projected[:, 6:12], pool[:, 0], pool[:, 1], wide[:, : table.shape[1]], *rest)
    expected = prefill_attention(q, k, v, table, *rest, 0.25, blocks=SMALL)
    assert torch.equal(prefill_attention(*strided, 0.25, blocks=SMALL), expected)
    narrow = [x.int() for x in (table, *rest)]
    assert torch.equal(prefill_attention(q, k, v, *narrow, 0.25, blocks=SMALL), expected)


def test_pages_before_the_window_are_never_looked_up() -> None:
    q, k, v, table, starts, lengths = ragged(lengths=(60, 40), new=(4, 3), page_size=8)
    expected = prefill_attention(q, k, v, table, starts, lengths, 0.25, 20, blocks=SMALL)
    table[0, : (60 - 4 - 19) // 8] = table[1, : (40 - 3 - 19) // 8] = 1 << 30
    assert torch.equal(prefill_attention(q, k, v, table, starts, lengths, 0.25, 20, blocks=SMALL), expected)


def test_torch_agrees() -> None:
    q, k, v, *rest = ragged(lengths=(45,), new=(45,))
    dense = [pages[rest[0][0]].flatten(0, 1)[:45].transpose(0, 1)[None] for pages in (k, v)]
    theirs = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *dense, is_causal=True, enable_gqa=True)
    ours = prefill_attention(q, k, v, *rest, 0.25, blocks=SMALL)
    torch.testing.assert_close(ours.view_as(q), theirs[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "window of tiles", "all"])
def test_chunks_and_company_change_no_bit(name: str, dtype: torch.dtype) -> None:
    content = [draw(2, n, 1, 16, dtype=dtype).cpu() for n in (50, 30)]
    prompt, other = (draw(n, 3, 16, dtype=dtype) for n in (50, 30))
    options = with_tensors(OPTIONS[name], 3, dtype)

    def rows(*sequences: tuple[int, int, Tensor]) -> Tensor:
        """Outputs and log-sum-exps of (which content, how much of it, queries)."""
        keys, values = ([content[which][i, :length] for which, length, _ in sequences] for i in (0, 1))
        paged = Paged.lay_out([queries.cpu() for *_, queries in sequences], keys, values, page_size=8)
        arguments = (x.to(DEVICE) for x in paged.arguments())
        out, lse = prefill_attention(*arguments, 0.25, **options, return_lse=True, blocks=SMALL)
        return torch.cat((out.float(), lse), dim=1)

    whole = rows((0, 50, prompt))
    assert torch.equal(rows((0, 50, prompt)), whole), "another run"
    assert torch.equal(rows((1, 13, other[:3]), (0, 50, prompt), (1, 30, other))[3:53], whole), "with company"
    for cut in (1, 13, 32):
        chunks = [rows((0, cut, prompt[:cut])), rows((1, 21, other[7:9]), (0, 50, prompt[cut:]))[2:]]
        assert torch.equal(torch.cat(chunks), whole), f"cut at {cut}"


def test_sequences_without_queries_and_queries_without_keys() -> None:
    q, k, v, table, starts, lengths = ragged()
    expected = prefill_attention(q, k, v, table, starts, lengths, 0.25, blocks=SMALL)
    table = torch.cat((table[:1], table[:1], table[1:], table[:1]))
    starts = torch.cat((starts[:2], starts[1:], starts[-1:] + 1))
    lengths = torch.cat((lengths[:1], lengths[:1], lengths[1:], lengths[:1] * 0))
    out, lse = prefill_attention(
        torch.cat((q, q[:1])), k, v, table, starts, lengths, 0.25, return_lse=True, blocks=SMALL
    )
    assert torch.equal(out[:-1], expected)
    assert not out[-1].any()
    assert (lse[-1] == -torch.inf).all()


def test_no_queries_are_fine() -> None:
    q, *rest = ragged()
    rest[3] = rest[3] * 0
    assert prefill_attention(q[:0], *rest, 0.25).shape == (0, 96)


def test_what_does_not_fit_is_named() -> None:
    q, k, v, table, starts, lengths = ragged()
    good = {"q": q, "k_pages": k, "v_pages": v, "page_table": table, "cu_seqlens": starts, "context_lens": lengths}
    scales = torch.ones(k.shape[:3], device=DEVICE)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"q": q.double()}, "q has dtype torch.float64"),
        ({"q": q[:, :5]}, "q has 5 heads, which 2 KV heads cannot share"),
        ({"k_pages": k[..., :8]}, r"k_pages has shape .* expected \[any, any, any, 16\]"),
        ({"k_pages": k[:, :12], "v_pages": v[:, :12]}, "page_size is 12; it must be a power of two"),
        ({"v_pages": v[:, :8]}, "v_pages has shape"),
        ({"v_pages": v[..., ::2]}, "v_pages has strides .* the last must be 1"),
        ({"page_table": table.half()}, "page_table has dtype torch.float16"),
        ({"cu_seqlens": starts[:-1]}, r"cu_seqlens has shape \[4\]; expected \[5\]"),
        ({"page_table": table[:3]}, r"page_table has shape \[3, .*expected \[4, any\]"),
        ({"scale": -1.0}, "scale is -1.0; it must be positive"),
        ({"window": 0}, "window is 0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"sinks": draw(5)}, r"sinks has shape \[5\]; expected \[6\]"),
        ({"alibi_slopes": draw(2, 3)}, "alibi_slopes has shape"),
        ({"k_scales": scales}, "k_scales and v_scales"),
        ({"k_scales": scales, "v_scales": scales}, "k_pages has dtype torch.float32; this kernel takes torch.int8"),
        ({"page_table": table[:0], "cu_seqlens": starts[:1], "context_lens": lengths[:0]}, "belong to none"),
    ]
    for change, message in wrong:
        with pytest.raises(KernelError, match=message):
            prefill_attention(**{**good, "scale": 0.25, **change})
