"""The final norm, the vocabulary projection, and the choice of a token without writing the logits.

    logits = softcap * tanh((normalize(hidden) @ weight.T) / softcap)
    token  = argmax(logits / temperature + noise), logprob = logits[token] - log(sum(exp(logits)))

Each program owns BLOCK_V rows of the weight, the vocabulary's, and BLOCK_R rows of hidden states, padded:

                        hidden.T  [H, BLOCK_R]
                        |  k  |
    weight  tile 0   [--k--> ]    dot, accumulated over k in steps of BLOCK_K, in one order
    [V, H]  tile 1   [------ ]    then, in `lm_head`: the tile's logits are written, [R, V];
            ...                   in `lm_head_choose`: the tile's best score, its id and its logit, the highest logit
            tail     [---####]    and the sum of exp, per row (20 bytes instead of 4 * BLOCK_V)

A small last launch combines a row's tiles, in order: `draw.combine`. More than BLOCK_R rows: programs of one weight
tile follow each other, so that its second reader finds it in cache.

The norm is a launch of its own before: a tile would have to read all hidden states once more for their mean square,
2000 tiles of them for a vocabulary of 128k, while one launch is under 1% of the time that the weight takes.

To move: the weight, once (H * V elements); 2 * R * H * V FLOPs. Bound by memory to some hundred rows. The choice adds
about 150 operations a logit, hidden behind the weight's loads, and saves 8 bytes a logit and row.
Source: FlashSampling (arXiv 2603.15854). Logits are rounded to the weight's dtype, as a linear layer of PyTorch rounds
them: in bfloat16 the two best of 128k logits are often equal then, and the choice between equals is part of the tokens.

This module does not know where hidden states come from. Meaning: `reference.lm_head`, `reference.lm_head_choose`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .checks import FLOATS, check, check_device, require
from .draw import Parts, check_rows, choose_in_tile, combine, is_greedy
from .gumbel import gumbel_noise
from .norm import normalize
from .reference.norm import Norm
from .tiles import tanh
from .tuning import Problem, config


@triton.jit
def _tile_logits(
    hidden,
    weight,
    first_token,
    first_row,
    rows,
    vocab_size,
    width,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits [BLOCK_V, BLOCK_R] float32. Past an edge, the last token and the last row stand in."""
    token_ids = tl.minimum(first_token + tl.arange(0, BLOCK_V), vocab_size - 1).to(tl.int64)
    row_ids = tl.minimum(first_row + tl.arange(0, BLOCK_R), rows - 1).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    weights = weight + token_ids[:, None] * width + columns[None, :]
    states = hidden + row_ids[None, :] * width + columns[:, None]
    total = tl.zeros([BLOCK_V, BLOCK_R], tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            w = tl.load(weights)
            h = tl.load(states)
        else:
            w = tl.load(weights, mask=columns[None, :] < width - start, other=0.0)
            h = tl.load(states, mask=columns[:, None] < width - start, other=0.0)
        total = tl.dot(w, h, total, input_precision="ieee")
        weights += BLOCK_K
        states += BLOCK_K
    dtype: tl.constexpr = weight.dtype.element_ty
    total = total.to(dtype).to(tl.float32)
    if HAS_SOFTCAP:
        total = (softcap * tanh(total / softcap)).to(dtype).to(tl.float32)
    return total


@triton.jit
def _logits_kernel(
    hidden,
    weight,
    out,
    rows,
    vocab_size,
    width,
    row_tiles,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    first_token = program // row_tiles * BLOCK_V
    first_row = program % row_tiles * BLOCK_R
    logits = _tile_logits(
        hidden, weight, first_token, first_row, rows, vocab_size, width, softcap,
        HAS_SOFTCAP, EVEN, BLOCK_V, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    token_ids = first_token + tl.arange(0, BLOCK_V)[:, None]
    row_ids = first_row + tl.arange(0, BLOCK_R)[None, :]
    inside = (token_ids < vocab_size) & (row_ids < rows)
    tl.store(out + row_ids.to(tl.int64) * vocab_size + token_ids, logits, mask=inside)


@triton.jit
def _choose_kernel(
    hidden,
    weight,
    temperature,
    greedy,
    seeds,
    positions,
    best_of,
    ids_of,
    rows,
    vocab_size,
    width,
    row_tiles,
    tiles,
    softcap,
    HAS_NOISE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_GREEDY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program // row_tiles
    first_row = program % row_tiles * BLOCK_R
    logits = _tile_logits(
        hidden, weight, tile * BLOCK_V, first_row, rows, vocab_size, width, softcap,
        HAS_SOFTCAP, EVEN, BLOCK_V, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    token_ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)[:, None]
    logits = tl.where(token_ids < vocab_size, logits, float("-inf"))
    row_ids = first_row + tl.arange(0, BLOCK_R)[None, :]
    inside = row_ids < rows
    takes_best, divisor = is_greedy(row_ids, greedy, temperature, inside, HAS_GREEDY, HAS_TEMPERATURE)
    scores = logits
    if HAS_TEMPERATURE:
        scores = tl.div_rn(scores, tl.zeros_like(scores) + divisor)
    if HAS_NOISE:
        seed = tl.load(seeds + row_ids, mask=inside, other=0)
        noise = gumbel_noise(token_ids, seed, tl.load(positions + row_ids, mask=inside, other=0))
        scores = tl.where(takes_best, scores, scores + noise)
    place = row_ids.to(tl.int64) * tiles + tile
    choose_in_tile(scores, logits, token_ids, best_of + place, ids_of + place, inside, rows * tiles)


def lm_head(
    hidden: Tensor, norm: Norm, weight: Tensor, softcap: float | None, *, blocks: Mapping[str, int] | None = None
) -> Tensor:
    """`reference.lm_head`: hidden [R, H] and weight [V, H], contiguous, of one dtype (float32, float16 or bfloat16),
    softcap > 0, to new logits [R, V] float32, rounded to that dtype.

    blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    device = _check(hidden, weight, softcap)
    (rows, width), vocab_size = hidden.shape, weight.shape[0]
    out = torch.empty(rows, vocab_size, dtype=torch.float32, device=device)
    if rows == 0:
        return out
    chosen = blocks_for(weight, blocks)
    row_tiles, tiles = triton.cdiv(rows, chosen["BLOCK_R"]), triton.cdiv(vocab_size, chosen["BLOCK_V"])
    _logits_kernel[(row_tiles * tiles,)](
        normalize(hidden, norm),
        weight,
        out,
        rows,
        vocab_size,
        width,
        row_tiles,
        1.0 if softcap is None else softcap,
        HAS_SOFTCAP=softcap is not None,
        EVEN=width % chosen["BLOCK_K"] == 0,
        **chosen,
    )
    return out


def lm_head_choose(
    hidden: Tensor,
    norm: Norm,
    weight: Tensor,
    softcap: float | None,
    temperature: Tensor | None,
    greedy: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.lm_head_choose`: (token_ids [R] int64, logprobs [R] float32) of `draw` from the logits of `lm_head`,
    the very tokens, without writing the logits.

    hidden, weight, softcap as `lm_head`; temperature [R] float32, 0 for greedy rows; greedy [R] bool; seeds [R] int64,
    read as unsigned, and positions [R] int64 in [0, 2^31): None for both if every row is greedy. A row with a NaN or
    +inf logit has token id -1 and logprob NaN. blocks: overrides the block sizes of the tuning table.
    Raises KernelError.
    """
    device = _check(hidden, weight, softcap)
    (rows, width), vocab_size = hidden.shape, weight.shape[0]
    check_rows(rows, device, seeds, positions, temperature, greedy)
    chosen = blocks_for(weight, blocks)
    row_tiles, tiles = triton.cdiv(rows, chosen["BLOCK_R"]), triton.cdiv(vocab_size, chosen["BLOCK_V"])
    parts = Parts.empty(rows, tiles, 0, device)
    if rows:
        _choose_kernel[(row_tiles * tiles,)](
            normalize(hidden, norm),
            weight,
            temperature,
            greedy,
            seeds,
            positions,
            parts.values,
            parts.token_ids,
            rows,
            vocab_size,
            width,
            row_tiles,
            tiles,
            1.0 if softcap is None else softcap,
            HAS_NOISE=seeds is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_GREEDY=greedy is not None,
            HAS_SOFTCAP=softcap is not None,
            EVEN=width % chosen["BLOCK_K"] == 0,
            **chosen,
        )
    choice = combine(parts, seeds is None, temperature, greedy)
    return choice.token_ids, choice.logprobs


def _check(hidden: Tensor, weight: Tensor, softcap: float | None) -> torch.device:
    device = check_device("hidden", hidden)
    check("hidden", hidden, (None, None), FLOATS, device, strided=True)
    check("weight", weight, (None, hidden.shape[1]), hidden.dtype, device)
    require(weight.numel() > 0, f"weight has shape {list(weight.shape)}; it must have elements")
    require(softcap is None or softcap > 0, f"softcap is {softcap}; expected None or a number above 0")
    return device


def blocks_for(weight: Tensor, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK_V, BLOCK_R and BLOCK_K of a tile, never for a number of rows; whoever serves many rows at all times may
    override BLOCK_R (16 to 128) for all of them."""
    (vocab_size, width), size = weight.shape, weight.element_size()
    stages = 2 if tuning.is_hip() else 4
    default = {
        "BLOCK_V": 64,
        "BLOCK_R": 16,
        "BLOCK_K": 256 // size if size == 2 else 32,
        "num_warps": 4,
        "num_stages": stages if size == 2 else 3,
    }
    dtype = str(weight.dtype).removeprefix("torch.")
    return config("lm_head", weight.device, default, override, vocab_size=vocab_size, width=width, dtype=dtype)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune lm_head` tries."""
    for vocab_size, width in ((49_152, 576), (128_256, 2048), (151_936, 1024), (151_936, 4096), (128_256, 4096)):
        hidden = torch.randn(4, width, dtype=torch.bfloat16, device=device)
        weight = torch.randn(vocab_size, width, dtype=torch.bfloat16, device=device) / width**0.5
        norm = Norm("rms", torch.ones(width, dtype=torch.bfloat16, device=device), None, 1e-6)
        words = torch.arange(4, device=device)
        yield Problem(
            when={"vocab_size": vocab_size, "width": width, "dtype": "bfloat16"},
            candidates=[
                {"BLOCK_V": v, "BLOCK_R": 16, "BLOCK_K": k, "num_warps": w, "num_stages": s}
                for v in (64, 128)
                for k in (64, 128, 256)
                for w in (4, 8)
                for s in (3, 4, 6)
                if s * k * (v + 16) * 2 <= 220_000
            ],
            run=partial(lm_head_choose, hidden, norm, weight, None, None, None, words, words),
        )
