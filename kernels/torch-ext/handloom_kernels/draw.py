"""The choice of a token from scores: the highest (greedy), or a draw by the Gumbel-max trick; with log-probabilities.

    token   = argmax(score + noise)           noise 0 for greedy rows; equal sums go to the lowest token id
    logprob = logit[token] - log(sum(exp(logits)))      of the model's own logits, before any rule

A row is cut into tiles so that one long row uses the whole chip; a second, small launch combines a row's tiles in
their order:

           <-------------------------- vocabulary --------------------------->
    row 0  [ tile 0         | tile 1         | ...            | tail    #####]   one program each
              best, its id, its logit, max(logits), sum(exp(logits - max))
                     \\              |                |             /
                      row 0's program: token id, log-probability, the n most likely

To move: 4 bytes a score, and 4 a logit where these are another tensor. To compute: about 130 operations a token for
noise; tiles without a living score and greedy rows skip it. Where `cuts` are given, scores need never have been
written with their -inf: what `selection.find_cuts` found is applied on the way.

The form is FlashSampling's (arXiv 2603.15854): `lm_head.lm_head_choose` does the same on tiles of the projection.

This module does not know which rules shaped a score. Meaning: `reference.draw`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, check, check_device, require
from .gumbel import gumbel_noise, natural_log
from .reference.sampling import Choice, Cuts
from .threshold import key_of, score_of
from .tuning import Problem, config

MAX_TOP = 32
_NONE = tl.constexpr(2147483647)  # no token id is as high
_LOWEST_KEY = tl.constexpr(-9223372036854775808)
_MAX_KEYS = 2048  # of a row that are in registers at a time


@triton.jit
def choose_in_tile(scores, logits, token_ids, best_of, ids_of, keep, tile_stride):
    """Along dimension 0 of a tile [tokens, rows]: the best score, its token id, its logit, the highest logit and the
    sum of exp(logit - highest), to best_of [4, ...] and ids_of [...], which point to rows' places [1, rows].

    The sum is NaN, and the row will have no token, where a score is NaN or a logit NaN or +inf.
    """
    best = tl.max(scores, axis=0, keep_dims=True)
    token_id = tl.min(tl.where(scores == best, token_ids, _NONE), axis=0, keep_dims=True)
    logit = tl.max(tl.where(token_ids == token_id, logits, float("-inf")), axis=0, keep_dims=True)
    most = tl.max(logits, axis=0, keep_dims=True)
    total = tl.sum(tl.exp(logits - tl.where(most == float("-inf"), 0.0, most)), axis=0, keep_dims=True)
    broken = tl.max((scores != scores).to(tl.int32), axis=0, keep_dims=True)
    total = tl.where(broken == 1, float("nan"), total)
    tl.store(best_of, best, mask=keep)
    tl.store(best_of + tile_stride, logit, mask=keep)
    tl.store(best_of + 2 * tile_stride, most, mask=keep)
    tl.store(best_of + 3 * tile_stride, total, mask=keep)
    tl.store(ids_of, token_id, mask=keep)


@triton.jit
def is_greedy(row, greedy, temperature, mask, HAS_GREEDY: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    """(does the row take the highest score, what its scores are divided by)."""
    flag = row < 0
    divisor = tl.where(flag, 0.0, 1.0)
    if HAS_GREEDY:
        flag = tl.load(greedy + row, mask=mask, other=0).to(tl.int32) != 0
    if HAS_TEMPERATURE:
        divisor = tl.load(temperature + row, mask=mask, other=1.0)
        flag = flag | (divisor == 0.0)
        divisor = tl.where(flag, 1.0, divisor)
    return flag, divisor


@triton.jit
def token_keys(logits, token_ids):
    """int64 keys in the order of (logit, then lowest token id first): the highest is the most likely."""
    return (key_of(logits).to(tl.int64) << 32) | (token_ids ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _tile_kernel(
    scores,
    logits,
    seeds,
    positions,
    temperature,
    greedy,
    cut_scores,
    cut_ids,
    best_of,
    ids_of,
    keys,
    score_stride,
    logit_stride,
    vocab_size,
    tiles,
    tile_stride,
    HAS_NOISE: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_GREEDY: tl.constexpr,
    HAS_CUTS: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64)
    token_ids = tile * BLOCK + tl.arange(0, BLOCK)[:, None]
    inside = token_ids < vocab_size
    raw = tl.load(scores + row * score_stride + token_ids, mask=inside, other=float("-inf")).to(tl.float32)
    is_best, divisor = is_greedy(row, greedy, temperature, row >= 0, HAS_GREEDY, HAS_TEMPERATURE)
    score = raw
    if HAS_TEMPERATURE:
        score = tl.div_rn(score, tl.zeros_like(score) + divisor)
    if HAS_CUTS:
        cut = tl.load(cut_scores + row)
        last_tie = tl.load(cut_ids + row)
        score = tl.where((score < cut) | ((score == cut) & (token_ids > last_tie)), float("-inf"), score)
    if HAS_LOGITS:
        raw = tl.load(logits + row * logit_stride + token_ids, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_NOISE:
        alive = tl.max(tl.max(score, axis=0), axis=0) > float("-inf")
        if alive & (is_best == 0):
            score += gumbel_noise(token_ids, tl.load(seeds + row), tl.load(positions + row))
    place = row * tiles + tile + tl.zeros([1, 1], tl.int64)
    choose_in_tile(score, raw, token_ids, best_of + place, ids_of + place, place >= 0, tile_stride)
    if TOP > 0:
        best = tl.topk(token_keys(tl.reshape(raw, [BLOCK]), tl.reshape(token_ids, [BLOCK])), TOP)
        tl.store(keys + (row * tiles + tile) * TOP + tl.arange(0, TOP), best)


@triton.jit
def _best_of_tiles(best_of, ids_of, tiles, tile_stride, CHUNK: tl.constexpr):
    """(best score of a row, its token id, its logit, highest logit), from its tiles in their order."""
    best = float("-inf")
    logit = float("-inf")
    most = float("-inf")
    token_id = _NONE
    for start in range(0, tiles, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < tiles
        bests = tl.load(best_of + at, mask=inside, other=float("-inf"))
        ids = tl.load(ids_of + at, mask=inside, other=_NONE)
        logits = tl.load(best_of + tile_stride + at, mask=inside, other=float("-inf"))
        chunk_best = tl.max(bests, axis=0)
        chunk_id = tl.min(tl.where(bests == chunk_best, ids, _NONE), axis=0)
        chunk_logit = tl.max(tl.where(ids == chunk_id, logits, float("-inf")), axis=0)
        better = chunk_best > best
        best = tl.where(better, chunk_best, best)
        token_id = tl.where(better, chunk_id, token_id)
        logit = tl.where(better, chunk_logit, logit)
        highest = tl.load(best_of + 2 * tile_stride + at, mask=inside, other=float("-inf"))
        most = tl.maximum(most, tl.max(highest, axis=0))
    return best, token_id, logit, most


@triton.jit
def _sum_of_tiles(best_of, most, tiles, tile_stride, CHUNK: tl.constexpr):
    """The sum of a row's exp(logit - most)."""
    total = 0.0
    for start in range(0, tiles, CHUNK):
        at = start + tl.arange(0, CHUNK)
        highest = tl.load(best_of + 2 * tile_stride + at, mask=at < tiles, other=float("-inf"))
        sums = tl.load(best_of + 3 * tile_stride + at, mask=at < tiles, other=0.0)
        total += tl.sum(sums * tl.exp(highest - most), axis=0)
    return total


@triton.jit
def _highest_keys(keys, count, TOP: tl.constexpr, CHUNK: tl.constexpr):
    """The TOP highest of `count` keys in memory, falling; CHUNK of them at a time, so that registers always do."""
    found = tl.full([TOP], _LOWEST_KEY, tl.int64)
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        more = tl.topk(tl.load(keys + at, mask=at < count, other=_LOWEST_KEY), TOP)
        found = tl.topk(tl.reshape(tl.join(found, more), [2 * TOP]), TOP)
    return found


@triton.jit
def _combine_kernel(
    best_of,
    ids_of,
    keys,
    temperature,
    greedy,
    out_ids,
    out_logprobs,
    out_top_ids,
    out_top_logprobs,
    tiles,
    tile_stride,
    top_n,
    ALL_GREEDY: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_GREEDY: tl.constexpr,
    TOP: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best_of += row * tiles
    best, token_id, logit, most = _best_of_tiles(best_of, ids_of + row * tiles, tiles, tile_stride, CHUNK)
    total = _sum_of_tiles(best_of, most, tiles, tile_stride, CHUNK)
    is_best, _ = is_greedy(row, greedy, temperature, row >= 0, HAS_GREEDY, HAS_TEMPERATURE)
    if ALL_GREEDY:
        is_best = row >= 0
    forced = is_best & (best == float("inf"))
    well = (total == total) & (best > float("-inf")) & ((best < float("inf")) | forced)
    log_total = natural_log(tl.where(well, total, 1.0))
    tl.store(out_ids + row, tl.where(well, token_id, -1).to(tl.int64))
    tl.store(out_logprobs + row, tl.where(well, (logit - most) - log_total, float("nan")))
    if TOP > 0:
        top = _highest_keys(keys + row * tiles * TOP, tiles * TOP, TOP, KEYS)
        logprobs = (score_of((top >> 32).to(tl.int32)) - most) - log_total
        ids = (top & 0x7FFFFFFF) ^ 0x7FFFFFFF
        rank = tl.arange(0, TOP)
        tl.store(out_top_ids + row * top_n + rank, tl.where(well, ids, -1), mask=rank < top_n)
        tl.store(out_top_logprobs + row * top_n + rank, tl.where(well, logprobs, float("nan")), mask=rank < top_n)


class Parts(NamedTuple):
    """What a row's tiles say: values [4, R, tiles] float32 (best score, its logit, highest logit, sum of exp),
    token_ids [R, tiles] int32 of the best, keys [R, tiles * TOP] int64 of the most likely."""

    values: Tensor
    token_ids: Tensor
    keys: Tensor

    @classmethod
    def empty(cls, rows: int, tiles: int, top: int, device: torch.device) -> Parts:
        require(rows * tiles < 2**29, f"{rows} rows of {tiles} tiles are too many for one launch")
        values = torch.empty(4, rows, tiles, dtype=torch.float32, device=device)
        token_ids = torch.empty(rows, tiles, dtype=torch.int32, device=device)
        return cls(values, token_ids, torch.empty(rows, tiles * top, dtype=torch.int64, device=device))


def combine(
    parts: Parts, all_greedy: bool, temperature: Tensor | None, greedy: Tensor | None, top_n: int = 0
) -> Choice:
    """The second launch: from tiles to tokens."""
    rows, tiles = parts.token_ids.shape
    device, top = parts.values.device, parts.keys.shape[1] // tiles
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    top_ids = torch.empty(rows, top_n, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(rows, top_n, dtype=torch.float32, device=device)
    if rows:
        _combine_kernel[(rows,)](
            parts.values,
            parts.token_ids,
            parts.keys,
            temperature,
            greedy,
            token_ids,
            logprobs,
            top_ids,
            top_logprobs,
            tiles,
            rows * tiles,
            top_n,
            ALL_GREEDY=all_greedy,
            HAS_TEMPERATURE=temperature is not None,
            HAS_GREEDY=greedy is not None,
            TOP=top,
            KEYS=min(_MAX_KEYS, triton.next_power_of_2(tiles * top)),
            CHUNK=min(1024, triton.next_power_of_2(tiles)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return Choice(token_ids, logprobs, top_ids, top_logprobs)


def check_rows(
    rows: int,
    device: torch.device,
    seeds: Tensor | None,
    positions: Tensor | None,
    temperature: Tensor | None,
    greedy: Tensor | None,
) -> None:
    """Raise KernelError unless what each row says of its draw fits."""
    require((seeds is None) == (positions is None), "seeds and positions come together, or not at all")
    for name, x, dtype in (
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
        ("temperature", temperature, torch.float32),
        ("greedy", greedy, torch.bool),
    ):
        if x is not None:
            check(name, x, (rows,), dtype, device)


def draw(
    scores: Tensor,
    seeds: Tensor | None,
    positions: Tensor | None,
    temperature: Tensor | None = None,
    greedy: Tensor | None = None,
    logits: Tensor | None = None,
    cuts: Cuts | None = None,
    top_n: int = 0,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Choice:
    """`reference.draw`: one token per row of scores [R, V] (float32, float16 or bfloat16, rows of any stride).

    seeds [R] int64 (read as unsigned), positions [R] int64 in [0, 2^31): both, or neither where every row is greedy.
    temperature [R] float32, 0 for greedy rows; greedy [R] bool; logits [R, V], what log-probabilities are of, if not
    the scores; cuts of `find_cuts`; top_n in [0, 32]. All of them on the device: nothing is read by the host.
    A row with a NaN or +inf logit, a NaN score, no finite score, or +inf as the score of a row that is not greedy has
    token id -1 and log-probability NaN. blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    device = check_device("scores", scores)
    check("scores", scores, (None, None), FLOATS, device, strided=True)
    rows, vocab_size = scores.shape
    require(0 < vocab_size < 2**31 - 2**16, f"scores have {vocab_size} columns; there must be 1 to 2^31 - 2^16")
    require(0 <= top_n <= min(MAX_TOP, vocab_size), f"top_n is {top_n}; expected 0 to {min(MAX_TOP, vocab_size)}")
    check_rows(rows, device, seeds, positions, temperature, greedy)
    if logits is not None:
        check("logits", logits, (rows, vocab_size), FLOATS, device, strided=True)
    if cuts is not None:
        check("cuts.scores", cuts.scores, (rows,), torch.float32, device)
        check("cuts.token_ids", cuts.token_ids, (rows,), torch.int32, device)
    chosen = blocks_for(scores, blocks)
    tiles = -(-vocab_size // chosen["BLOCK"])
    top = max(8, triton.next_power_of_2(top_n)) if top_n else 0
    require(top <= chosen["BLOCK"], f"BLOCK is {chosen['BLOCK']}; it must be at least {top}")
    parts = Parts.empty(rows, tiles, top, device)
    if rows:
        _tile_kernel[(rows * tiles,)](
            scores,
            logits,
            seeds,
            positions,
            temperature,
            greedy,
            None if cuts is None else cuts.scores,
            None if cuts is None else cuts.token_ids,
            parts.values,
            parts.token_ids,
            parts.keys,
            scores.stride(0),
            0 if logits is None else logits.stride(0),
            vocab_size,
            tiles,
            rows * tiles,
            HAS_NOISE=seeds is not None,
            HAS_LOGITS=logits is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_GREEDY=greedy is not None,
            HAS_CUTS=cuts is not None,
            TOP=top,
            **chosen,
        )
    return combine(parts, seeds is None, temperature, greedy, top_n)


def blocks_for(scores: Tensor, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK (scores of a tile) and num_warps; a narrow vocabulary takes a tile no wider than need be."""
    block = max(64, min(1024, triton.next_power_of_2(scores.shape[1])))
    default = {"BLOCK": block, "num_warps": max(1, block // 256)}
    return config("draw", scores.device, default, override, vocab_size=scores.shape[1])


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune draw` tries."""
    for vocab_size in (49_152, 128_256, 151_936, 262_144):
        scores = 3 * torch.randn(8, vocab_size, device=device)
        seeds, positions = torch.arange(8, device=device), torch.arange(100, 108, device=device)
        yield Problem(
            when={"vocab_size": vocab_size},
            candidates=[{"BLOCK": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)],
            run=partial(draw, scores, seeds, positions),
        )
