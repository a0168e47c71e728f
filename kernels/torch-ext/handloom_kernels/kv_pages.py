"""The pages of the KV cache: copies of whole pages, and the codes of quantised ones.

A fork writes to a page that others read, so it gets a copy first; beams do the same many at a time. One launch copies
all pages in all layers, as words of up to 8 bytes whatever the dtype is, so that every bit arrives:

    storage [num_layers, 2, num_pages, page_size, ...]
                                page 3 = source         page 5 = target
    layer 0, K   ... | [ tile 0 | tile 1 | tile 2 ] | ... | [        |        |        ] | ...
                          program (3 pair, 0) -------------------^
    layer 0, V   ... | [ tile 0 | tile 1 | tile 2 ] | ... program (3 pair + tile, 1); layer 1, K: (3 pair + tile, 2)

To move: every byte of the copied slots, once in and once out. Bound by memory.

Codes (int8, float8) are x / scale rounded to the nearest, with one scale for each token and KV head: the largest
absolute value / the largest code.

This module does not know who owns a page, or when one is copied.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, INTS, check, check_codes, check_device, require
from .reference.pages import QUANTISED
from .tuning import Problem, config

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
BLOCK = 1024


@triton.jit
def largest_bits(x):
    """The largest absolute value of each row of a float32 tile, as the whole number with the same bits.

    As whole numbers absolute values have the order they have as floats, and NaN is above them all: it is not lost.
    """
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)


@triton.jit
def codes_of(x, scale, limit, dtype: tl.constexpr):
    """The codes of a float32 tile whose rows have these scales, as float32: `reference.quantize_kv`."""
    codes = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0)[:, None])
    codes = tl.maximum(tl.minimum(codes, limit), -limit)
    if dtype == tl.int8:
        # beside 1.5 * 2^23 a float32 has no bits for a fraction: rounds to nearest, ties to even
        codes = (codes + 12582912.0) - 12582912.0
    return codes


@triton.jit
def _copy_pages_kernel(
    words,
    source,
    target,
    num_tokens,
    num_pages,
    PAGE_SIZE: tl.constexpr,
    TOKEN_WORDS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PAGE_WORDS: tl.constexpr = PAGE_SIZE * TOKEN_WORDS
    TILES: tl.constexpr = (PAGE_WORDS + BLOCK - 1) // BLOCK
    pair = (tl.program_id(0) // TILES).to(tl.int64)
    words += tl.program_id(1).to(tl.int64) * num_pages * PAGE_WORDS
    start = (tl.program_id(0) % TILES).to(tl.int64) * BLOCK
    from_page = tl.load(source + pair).to(tl.int64)
    tokens = PAGE_SIZE
    if not WHOLE:
        tokens = tl.minimum(tl.load(num_tokens + pair), PAGE_SIZE)
    end = tokens * TOKEN_WORDS
    if from_page >= 0 and start < end:
        to_page = tl.load(target + pair).to(tl.int64)
        offsets = start + tl.arange(0, BLOCK)
        value = tl.load(words + from_page * PAGE_WORDS + offsets, mask=offsets < end)
        tl.store(words + to_page * PAGE_WORDS + offsets, value, mask=offsets < end)


def check_pages(
    k_pages: Tensor, v_pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, device: torch.device
) -> bool:
    """Are the pages quantised? Raises KernelError unless they are K and V pages of one dtype, with scales just then.

    k_pages [num_pages, page_size, num_kv_heads, D], v_pages [..., Dv]; k_scales, v_scales [num_pages, page_size,
    num_kv_heads] float32; contiguous.
    """
    check("k_pages", k_pages, (None, None, None, None), (*FLOATS, *QUANTISED), device)
    check("v_pages", v_pages, (*k_pages.shape[:3], None), k_pages.dtype, device)
    check_codes("k_pages", k_pages)
    quantised = k_pages.dtype in QUANTISED
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        said = "is missing" if quantised else "is given"
        require((scales is not None) == quantised, f"{name} {said}, and the pages have dtype {k_pages.dtype}")
        if scales is not None:
            check(name, scales, k_pages.shape[:3], torch.float32, device)
    return quantised


def copy_pages(
    pages: Tensor,
    source: Tensor,
    target: Tensor,
    num_tokens: Tensor | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> None:
    """`reference.copy_pages`, in place: pages source [M] to pages target [M], in every layer.

    Args: pages [num_layers, 2 (1 where K and V are stored apart), num_pages, page_size, ...], contiguous, of any dtype,
    scales of quantised pages too; source, target [M] int64 or int32, on the same device, where the source is -1 nothing
    is copied; num_tokens [M]: the slots of each page to copy, from its first on, all by default. A page may be copied
    many times. The targets must be distinct and none of them a source: that is not checked, which would make the host
    wait, and breaking it leaves a mixture. blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    device = check_device("pages", pages)
    require(pages.dim() >= 4, f"pages has shape {list(pages.shape)}; expected [layers, 2, num_pages, page_size, ...]")
    check("pages", pages, pages.shape, (*FLOATS, *QUANTISED, *WORDS.values()), device)
    check("source", source, (None,), INTS, device)
    check("target", target, tuple(source.shape), INTS, device)
    if num_tokens is not None:
        check("num_tokens", num_tokens, tuple(source.shape), INTS, device)
    if pages.numel() == 0 or len(source) == 0:
        return
    num_pages, page_size = pages.shape[2:4]
    token_bytes = math.prod(pages.shape[4:]) * pages.element_size()
    offset = pages.storage_offset() * pages.element_size()
    word = next(size for size in WORDS if token_bytes % size == 0 and offset % size == 0)
    words = pages.view(-1).view(WORDS[word])
    page_words = page_size * token_bytes // word
    chosen = blocks_for(pages, page_words, blocks)
    # a page as long as a context has more tiles than the 65535 programs that a grid's later axes may have
    grid = (len(source) * triton.cdiv(page_words, chosen["BLOCK"]), pages.shape[0] * pages.shape[1])
    _copy_pages_kernel[grid](
        words,
        source,
        target,
        source if num_tokens is None else num_tokens,
        num_pages,
        PAGE_SIZE=page_size,
        TOKEN_WORDS=token_bytes // word,
        WHOLE=num_tokens is None,
        **chosen,
    )


def blocks_for(pages: Tensor, page_words: int, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK (words of a tile) and num_warps for pages of this size."""
    block = min(BLOCK, triton.next_power_of_2(page_words))
    default = {"BLOCK": block, "num_warps": max(1, min(4, block // 128))}
    return config("kv_pages", pages.device, default, override, page_words=page_words)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune kv_pages` tries."""
    for num_kv_heads, head_dim in ((3, 64), (8, 64), (8, 128)):
        pages = torch.randn(16, 2, 64, 16, num_kv_heads, head_dim, dtype=torch.bfloat16, device=device)
        source, target = torch.arange(32, device=device).view(2, 16)
        yield Problem(
            when={"page_words": 16 * num_kv_heads * head_dim * 2 // 8},
            candidates=[{"BLOCK": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)],
            run=partial(copied, pages, source, target),
        )


def copied(pages: Tensor, source: Tensor, target: Tensor, *, blocks: Mapping[str, int] | None = None) -> Tensor:
    """`copy_pages`, and the pages it wrote, so that candidates can be compared."""
    copy_pages(pages, source, target, blocks=blocks)
    return pages
