"""Temperature, then top-k, then top-p, then min-p, without sorting: what stays is found as one threshold per row.

Each rule keeps the tokens above some score, so all of them together are a lowest score that stays, and, where top-p
cuts through equal scores, a highest token id that stays among these. Scores are ordered by their bits, as integers,
and the threshold is exact: it is the score of a token, not a number near it.

    1 range    tiles of a row: highest and lowest score
    2 count    how many scores lie in each of BINS equal steps below the highest. The last tile to arrive reads off
               the bin of the k-th score, and bounds from both sides where the mass reaches p:

               highest |####|####|####|####|####|####|####|####|####| ...
               mass so far < p  ------>|<-- here it reaches p -->|          ^ the k-th score is here
                       summed          |         listed          |  summed  | listed

               (some hundred tokens at most, for a language model's scores and a vocabulary of 128k)

    3 gather   the listed tokens go to a list, the mass of the others into sums. The last tile to arrive halves the
               interval of possible thresholds over the list until one is left: first the k-th, then, with the mass
               that is left, p, then the token id among equals
    4 apply    everything below the threshold becomes -inf (`draw(cuts=...)` does this on the way instead)

Masses are exp(score - highest) as integers in units of 2^-40, summed exactly in any order: no sum depends on how it
was cut into tiles. Against float64, a cumulative probability is off by 2^-21 at most (2^-23 of each token's own, and
for 2^18 tokens as many units): tokens whose cumulative probability is closer to p than that may differ. The min-p
threshold is found in float64.

To move: three reads of the scores (one from memory, the rest mostly from the second-level cache); one more, and a
write, if `select`; rows that are off cost the first. A list that does not fit (LIST) is not used, the row itself is
read again at each of at most 32 halvings: exact, and slow, for rows where thousands of scores lie within 1/64 of the
threshold.

Sources: threshold search over float bits, FlashInfer's sampling kernels and Qrita (arXiv 2602.01518), here with a
histogram first. This module does not know where scores come from. Meaning: `reference.select`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, check, check_device, require
from .reference.sampling import Cuts
from .threshold import (
    LAST_ID,
    MINUS_INF,
    bin_of,
    bin_width,
    bracket,
    load_divisor,
    load_row,
    load_scores,
    mass_of,
    store_cut,
    threshold_of_row,
)
from .tiles import is_last
from .tuning import Problem, config

MAX_VOCABULARY = 1 << 22  # tokens whose masses, of at most 2^40 units each, still add up in int64
_STATE = 16  # int64 words of a row's state, see below
_COUNTED = tl.constexpr(0)  # ticket of the tiles that have counted
_GATHERED = tl.constexpr(1)  # ticket of the tiles that have gathered
_LISTED = tl.constexpr(2)  # tokens in the list
_MASS_ABOVE = tl.constexpr(3)  # of unlisted tokens above the listed ones
_MASS_BELOW = tl.constexpr(4)  # of unlisted tokens that top-k keeps, below
_RANK = tl.constexpr(5)  # of the k-th score within the list; 0: top-k keeps all
_FIRST = tl.constexpr(6)  # first bin where the mass may reach p
_LAST = tl.constexpr(7)  # last such bin
_K_BIN = tl.constexpr(8)  # bin of the k-th score; BINS: none


@triton.jit
def _range_kernel(
    logits,
    temperature,
    limits,
    counts,
    state,
    row_stride,
    vocab_size,
    tiles,
    limits_stride,
    HAS_TEMPERATURE: tl.constexpr,
    COUNTED: tl.constexpr,
    BINS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64)
    divisor, _ = load_divisor(temperature, row, HAS_TEMPERATURE)
    token_ids = tile * BLOCK + tl.arange(0, BLOCK)
    scores = load_scores(logits + row * row_stride, token_ids, vocab_size, divisor, HAS_TEMPERATURE)
    broken = tl.max(((scores != scores) | (scores == float("inf"))).to(tl.int32), axis=0)
    highest = tl.where(broken == 1, float("inf"), tl.max(scores, axis=0))
    lowest = tl.min(tl.where(scores == float("-inf"), float("inf"), scores), axis=0)
    tl.store(limits + row * tiles + tile, highest)
    tl.store(limits + limits_stride + row * tiles + tile, lowest)
    if COUNTED:
        own_bins, own_words = tl.where(tile == 0, BINS, 0), tl.where(tile == 0, STATE, 0)
        bins, words = tl.arange(0, BINS), tl.arange(0, STATE)
        tl.store(counts + row * BINS + bins, tl.zeros([BINS], tl.int32), mask=bins < own_bins)
        tl.store(state + row * STATE + words, tl.zeros([STATE], tl.int64), mask=words < own_words)


@triton.jit
def _count_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    limits,
    counts,
    state,
    row_stride,
    vocab_size,
    tiles,
    limits_stride,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    BINS: tl.constexpr,
    STATE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64)
    divisor, k, p, highest, lowest, _, searched = load_row(
        row, temperature, top_k, top_p, limits, vocab_size, tiles, limits_stride, HAS_TEMPERATURE, HAS_K, HAS_P, TILES
    )
    if searched:
        counts += row * BINS
        state += row * STATE
        width = bin_width(highest, lowest, BINS)
        token_ids = tile * BLOCK + tl.arange(0, BLOCK)
        scores = load_scores(logits + row * row_stride, token_ids, vocab_size, divisor, HAS_TEMPERATURE)
        count = tl.histogram(bin_of(scores, highest, width, BINS), BINS, mask=scores > float("-inf"))
        tl.atomic_add(counts + tl.arange(0, BINS), count, mask=count > 0, sem="relaxed")
        if is_last(state + _COUNTED, tiles):
            first, last, k_bin, rank = bracket(counts, k, p, width, BINS)
            tl.store(state + _FIRST, first.to(tl.int64))
            tl.store(state + _LAST, last.to(tl.int64))
            tl.store(state + _K_BIN, k_bin.to(tl.int64))
            tl.store(state + _RANK, rank.to(tl.int64))


@triton.jit
def _list_tile(state, scores, token_ids, bins, highest, list_scores, list_ids, HAS_P: tl.constexpr, LIST: tl.constexpr):
    """The tile's tokens in bins where the threshold may lie go to the row's list, the others' masses into sums."""
    first = tl.load(state + _FIRST)
    last = tl.load(state + _LAST)
    k_bin = tl.load(state + _K_BIN)
    alive = scores > float("-inf")
    listed = alive & (((bins >= first) & (bins <= last)) | (bins == k_bin))
    count = tl.sum(listed.to(tl.int32), axis=0)
    if count > 0:
        start = tl.atomic_add(state + _LISTED, count.to(tl.int64), sem="relaxed")
        place = start + tl.cumsum(listed.to(tl.int32), axis=0) - 1
        tl.store(list_scores + place, scores, mask=listed & (place < LIST))
        tl.store(list_ids + place, token_ids, mask=listed & (place < LIST))
    if HAS_P:
        mass = mass_of(scores, highest)
        above = tl.sum(tl.where(alive & (bins < first), mass, 0), axis=0)
        below = tl.sum(tl.where(alive & (bins > last) & (bins < k_bin), mass, 0), axis=0)
        tl.atomic_add(state + _MASS_ABOVE, above, mask=above > 0, sem="relaxed")
        tl.atomic_add(state + _MASS_BELOW, below, mask=below > 0, sem="relaxed")


@triton.jit
def _gather_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    limits,
    state,
    list_scores,
    list_ids,
    cut_scores,
    cut_ids,
    row_stride,
    vocab_size,
    tiles,
    limits_stride,
    grid_tiles,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    BINS: tl.constexpr,
    STATE: tl.constexpr,
    TILES: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % grid_tiles
    row = (program // grid_tiles).to(tl.int64)
    divisor, k, p, highest, lowest, fit, searched = load_row(
        row, temperature, top_k, top_p, limits, vocab_size, tiles, limits_stride, HAS_TEMPERATURE, HAS_K, HAS_P, TILES
    )
    if searched == 0:
        if tile == 0:
            nothing, every_id = tl.zeros_like(row) + MINUS_INF, tl.zeros_like(tile) + LAST_ID
            store_cut(nothing, every_id, highest, fit, min_p, cut_scores, cut_ids, row, HAS_MIN_P)
    elif HAS_K or HAS_P:
        logits += row * row_stride
        state += row * STATE
        list_scores += row * LIST
        list_ids += row * LIST
        token_ids = tile * BLOCK + tl.arange(0, BLOCK)
        scores = load_scores(logits, token_ids, vocab_size, divisor, HAS_TEMPERATURE)
        bins = bin_of(scores, highest, bin_width(highest, lowest, BINS), BINS)
        rank = tl.load(state + _RANK)
        _list_tile(state, scores, token_ids, bins, highest, list_scores, list_ids, HAS_P, LIST)
        if is_last(state + _GATHERED, tiles):
            # what other programs wrote in this launch is read past the first-level cache, which is not coherent
            size = tl.load(state + _LISTED, cache_modifier=".cg")
            above = tl.load(state + _MASS_ABOVE, cache_modifier=".cg")
            below = tl.load(state + _MASS_BELOW, cache_modifier=".cg")
            source = (logits, vocab_size, divisor, highest)
            key, last_id = threshold_of_row(
                list_scores, list_ids, size, rank, k, p, above, below, lowest, source,
                HAS_K, HAS_P, LIST, BLOCK,
            )  # fmt: skip
            store_cut(key, last_id, highest, fit, min_p, cut_scores, cut_ids, row, HAS_MIN_P)


@triton.jit
def _apply_kernel(
    logits,
    temperature,
    cut_scores,
    cut_ids,
    out,
    row_stride,
    vocab_size,
    tiles,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    divisor, _ = load_divisor(temperature, row, HAS_TEMPERATURE)
    token_ids = program % tiles * BLOCK + tl.arange(0, BLOCK)
    scores = load_scores(logits + row * row_stride, token_ids, vocab_size, divisor, HAS_TEMPERATURE)
    cut = tl.load(cut_scores + row)
    gone = (scores < cut) | ((scores == cut) & (token_ids > tl.load(cut_ids + row)))
    tl.store(out + row * vocab_size + token_ids, tl.where(gone, float("-inf"), scores), mask=token_ids < vocab_size)


def find_cuts(
    scores: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Cuts:
    """`reference.find_cuts`: where `select` cuts each row of scores [R, V] (float32, float16 or bfloat16, rows of any
    stride); min-p's cut may be a score that no token has. What `draw` and `apply_cuts` take, 8 bytes a row.

    temperature, top_p, min_p [R] float32, top_k [R] int32, on the device; None is off for every row.
    blocks: overrides the block sizes of the tuning table. Raises KernelError.
    """
    device, rows, vocab_size = _check(scores, temperature, top_k, top_p, min_p)
    cuts = Cuts(*(torch.empty(rows, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)))
    if rows == 0:
        return cuts
    chosen = blocks_for(scores, blocks)
    block, bins, capacity = chosen.pop("BLOCK"), chosen.pop("BINS"), chosen.pop("LIST")
    tiles = -(-vocab_size // block)
    require(rows * tiles < 2**29, f"{rows} rows of {vocab_size} scores are too many for one launch")
    searched = top_k is not None or top_p is not None
    limits = torch.empty(2, rows, tiles, dtype=torch.float32, device=device)
    counts = torch.empty(rows, bins if searched else 0, dtype=torch.int32, device=device)
    state = torch.empty(rows, _STATE if searched else 0, dtype=torch.int64, device=device)
    list_scores = torch.empty(rows, capacity if searched else 0, dtype=torch.float32, device=device)
    list_ids = torch.empty(rows, capacity if searched else 0, dtype=torch.int32, device=device)
    common = {"HAS_TEMPERATURE": temperature is not None, "BINS": bins, "STATE": _STATE, "BLOCK": block, **chosen}
    shape = (scores.stride(0), vocab_size, tiles, rows * tiles)
    _range_kernel[(rows * tiles,)](scores, temperature, limits, counts, state, *shape, COUNTED=searched, **common)
    rules = {"HAS_K": top_k is not None, "HAS_P": top_p is not None, "TILES": triton.next_power_of_2(tiles)}
    if searched:
        _count_kernel[(rows * tiles,)](
            scores, temperature, top_k, top_p, limits, counts, state, *shape, **rules, **common
        )
    grid_tiles = tiles if searched else 1
    _gather_kernel[(rows * grid_tiles,)](
        scores,
        temperature,
        top_k,
        top_p,
        min_p,
        limits,
        state,
        list_scores,
        list_ids,
        *cuts,
        *shape,
        grid_tiles,
        HAS_MIN_P=min_p is not None,
        LIST=capacity,
        **rules,
        **common,
    )
    return cuts


def apply_cuts(
    scores: Tensor, temperature: Tensor | None, cuts: Cuts, *, blocks: Mapping[str, int] | None = None
) -> Tensor:
    """`scores` [R, V] divided by the temperature, with -inf where `cuts` cut: a new float32 tensor.
    Raises KernelError."""
    device, rows, vocab_size = _check(scores, temperature, None, None, None)
    check("cuts.scores", cuts.scores, (rows,), torch.float32, device)
    check("cuts.token_ids", cuts.token_ids, (rows,), torch.int32, device)
    out = torch.empty(rows, vocab_size, dtype=torch.float32, device=device)
    if rows:
        chosen = blocks_for(scores, blocks)
        tiles = -(-vocab_size // chosen["BLOCK"])
        _apply_kernel[(rows * tiles,)](
            scores,
            temperature,
            *cuts,
            out,
            scores.stride(0),
            vocab_size,
            tiles,
            HAS_TEMPERATURE=temperature is not None,
            BLOCK=chosen.pop("BLOCK"),
            **{name: value for name, value in chosen.items() if name not in ("BINS", "LIST")},
        )
    return out


def select(
    scores: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.select`: arguments as `find_cuts`; a new tensor [R, V] float32. Raises KernelError."""
    cuts = find_cuts(scores, temperature, top_k, top_p, min_p, blocks=blocks)
    return apply_cuts(scores, temperature, cuts, blocks=blocks)


def _check(
    scores: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> tuple[torch.device, int, int]:
    device = check_device("scores", scores)
    check("scores", scores, (None, None), FLOATS, device, strided=True)
    rows, vocab_size = scores.shape
    require(0 < vocab_size <= MAX_VOCABULARY, f"scores have {vocab_size} columns; there must be 1 to {MAX_VOCABULARY}")
    for name, x, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        if x is not None:
            check(name, x, (rows,), dtype, device)
    return device, rows, vocab_size


def blocks_for(scores: Tensor, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK (scores of a tile), BINS (of a row's histogram), LIST (tokens that one program searches in registers)."""
    block = max(64, min(2048, triton.next_power_of_2(scores.shape[1])))
    default = {"BLOCK": block, "BINS": block, "LIST": block, "num_warps": max(1, block // 256)}
    return config("selection", scores.device, default, override, vocab_size=scores.shape[1])


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune selection` tries."""
    for vocab_size in (49_152, 128_256, 151_936, 262_144):
        scores = 3 * torch.randn(8, vocab_size, device=device)
        top_k = torch.full((8,), 50, dtype=torch.int32, device=device)
        top_p = torch.full((8,), 0.95, device=device)
        yield Problem(
            when={"vocab_size": vocab_size},
            candidates=[{"BLOCK": b, "BINS": b, "LIST": 2048, "num_warps": w} for b in (1024, 2048) for w in (4, 8)],
            run=partial(select, scores, None, top_k, top_p),
        )
