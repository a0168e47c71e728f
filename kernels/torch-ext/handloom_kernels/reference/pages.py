"""Keys and values in pages: writing, quantising, copying.

This module does not know who owns a page or what attention is.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def largest_code(dtype: torch.dtype) -> float:
    """127 for int8, 448 for float8_e4m3fn, 240 for float8_e4m3fnuz: codes are symmetric around 0."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes [..., D] of one of QUANTISED, scales [...] float32) of x [..., D], with x close to codes * scales.

    One scale per vector: the largest absolute value / largest_code. Rounds to the nearest code, ties to the even one; a
    vector of zeros has scale 0 and codes 0.
    """
    x32, limit = x.float(), largest_code(dtype)
    scales = x32.abs().amax(-1) / limit
    codes = (x32 / scales.where(scales > 0, 1)[..., None]).clamp(-limit, limit)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


def write_pages(x: Tensor, pages: Tensor, slot_mapping: Tensor, scales: Tensor | None = None) -> None:
    """Write x [N, num_kv_heads, D] to the slots slot_mapping [N] (page * page_size + offset; -1: nowhere).

    Args: pages [num_pages, page_size, num_kv_heads, D], rounded to their dtype, or if they are QUANTISED the codes,
    whose scales go into scales [num_pages, page_size, num_kv_heads] float32.
    """
    kept = slot_mapping >= 0
    slots, x = slot_mapping[kept], x[kept]
    if scales is None:
        pages.view(-1, *pages.shape[2:])[slots] = x.to(pages.dtype)
        return
    codes, own = quantize_kv(x, pages.dtype)
    pages.view(-1, *pages.shape[2:])[slots] = codes
    scales.view(-1, scales.shape[-1])[slots] = own


def copy_pages(pages: Tensor, source: Tensor, target: Tensor, num_tokens: Tensor | None = None) -> None:
    """Copy pages source [M] to pages target [M], in place and in every layer: after a fork, or for a beam.

    Args: pages [num_layers, 2, num_pages, page_size, ...]; num_tokens [M]: the slots of each page to copy, from its
    first on; all of them by default. A page may be copied many times; the targets are distinct and none is a source.
    Where the source is -1 nothing is copied.
    """
    for i in range(len(source)):
        if source[i] >= 0:
            end = pages.shape[3] if num_tokens is None else int(num_tokens[i])
            pages[:, :, target[i], :end] = pages[:, :, source[i], :end]
