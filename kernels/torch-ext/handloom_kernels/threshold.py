"""The exact threshold of top-k and top-p in one row: bounds from a histogram, then halving an interval of keys.

A key is a score's bits as an integer that has the scores' order, so at most 32 halvings lead from any interval to the
key of one token. Masses are exp(score - highest) in units of 2^-40, integers: their sums have no order.

                low                     middle                   high
    keys         |------------------------|------------------------|
                              is there enough from here upwards?  yes: low = middle, no: high = middle - 1

One program does this for one row, on a list that it holds in registers (IN_LIST), or, when the list was too short, by
reading the row anew for each question.

This module does not know how a row is shared among programs: that is `selection`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST_ID = tl.constexpr(2147483647)  # no token id is as high
MINUS_INF = tl.constexpr(-2139095041)  # the key of -inf: nothing is below
UNIT = tl.constexpr(2.0**-40)  # of mass
RANGE = tl.constexpr(32.0)  # what lies further below the highest score shares the last bin, and weighs nothing


@triton.jit
def load_scores(logits, token_ids, vocab_size, divisor, HAS_TEMPERATURE: tl.constexpr):
    value = tl.load(logits + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    if HAS_TEMPERATURE:
        value = tl.div_rn(value, tl.zeros_like(value) + divisor)
    return value


@triton.jit
def load_divisor(temperature, row, HAS_TEMPERATURE: tl.constexpr):
    """(what the row's scores are divided by, is the row greedy)."""
    divisor = 1.0
    greedy = row < 0
    if HAS_TEMPERATURE:
        divisor = tl.load(temperature + row)
        greedy = divisor == 0.0
        divisor = tl.where(greedy, 1.0, divisor)
    return divisor, greedy


@triton.jit
def load_row(
    row,
    temperature,
    top_k,
    top_p,
    limits,
    vocab_size,
    tiles,
    stride,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    TILES: tl.constexpr,
):
    """What every program must know of its row: (what scores are divided by; k, 0 if off; p, 1 if off; highest and
    lowest finite score; may it be cut: not greedy, all scores well; must its threshold be searched)."""
    divisor, greedy = load_divisor(temperature, row, HAS_TEMPERATURE)
    k = 0
    p = 1.0
    if HAS_K:
        k = tl.load(top_k + row)
        k = tl.where((k < 0) | (k >= vocab_size), 0, k)
    if HAS_P:
        p = tl.load(top_p + row)
    at = tl.arange(0, TILES)
    highest = tl.max(tl.load(limits + row * tiles + at, mask=at < tiles, other=float("-inf")), axis=0)
    lowest = tl.min(tl.load(limits + stride + row * tiles + at, mask=at < tiles, other=float("inf")), axis=0)
    fit = (highest > float("-inf")) & (highest < float("inf")) & (greedy == 0)
    return divisor, k, p, highest, lowest, fit, fit & ((k > 0) | (p < 1.0))


@triton.jit
def key_of(scores):
    """int32 in the order of the scores; the function is its own inverse, on bits."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def score_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(scores, highest):
    """exp(score - highest) in units of 2^-40, int64; anything for a score of -inf.

    2^n exp(r) with |r| <= log(2) / 2, by Taylor to the seventh power; what the difference lost to rounding (Knuth's
    two-sum) is added to r. Off by less than 2^-23 of itself, and one unit.
    """
    x = scores - highest
    back = x - scores
    lost = (scores - (x - back)) - (highest + back)
    lost = tl.where(x > -40.0, lost, 0.0)
    x = tl.maximum(x, -40.0)
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(n, -1.42860682030941723212e-6, tl.fma(n, -0.693145751953125, x)) + lost
    power = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    power = tl.fma(r, power, 1.0 / 120)
    power = tl.fma(r, power, 1.0 / 24)
    power = tl.fma(r, power, 1.0 / 6)
    power = tl.fma(r, power, 0.5)
    power = tl.fma(r, power, 1.0)
    power = tl.fma(r, power, 1.0)
    unit = ((n.to(tl.int32) + (127 + 40)) << 23).to(tl.float32, bitcast=True)
    return (power * unit).to(tl.int64)


@triton.jit
def bin_width(highest, lowest, BINS: tl.constexpr):
    """The width of a bin."""
    return tl.maximum(tl.minimum(highest - lowest, RANGE), 1e-30) / BINS


@triton.jit
def bin_of(scores, highest, width, BINS: tl.constexpr):
    return tl.minimum((highest - scores) * (1.0 / width), BINS - 1.0).to(tl.int32)


@triton.jit
def bracket(counts, k, p, width, BINS: tl.constexpr):
    """From the counts of a row's bins: (first, last bin in which p may be reached; bin of the k-th score, BINS if there
    is none; rank of the k-th score among those that must be listed, which lie in these bins, 0 if there is none).

    The mass of a bin lies between what its two ends would weigh (a token loses less than a unit to rounding, see
    `mass_of`), so the mass down to a bin, and that from it on, have bounds. The threshold lies further down than a bin
    where the most that the mass so far can be is below p of the least that the whole can be, or the least that is left
    is above 1 - p of the most; and likewise for the other side. What is left knows better where p is near 1, what is
    above where it is near 0. 1/1000 is more than all rounding.
    """
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins, cache_modifier=".cg")
    so_far = tl.cumsum(count, axis=0)
    k_bin = tl.where((k > 0) & (k < tl.sum(count, axis=0)), tl.sum((so_far < k).to(tl.int32), axis=0), BINS)

    most = tl.where(bins <= k_bin, count.to(tl.float32) * tl.exp(-bins.to(tl.float32) * width), 0.0)
    inner = (bins < k_bin) & (bins < BINS - 1)
    lower_end = tl.maximum(tl.exp(-(bins + 1).to(tl.float32) * width) - UNIT, 0.0)
    least = tl.where(inner, count.to(tl.float32) * lower_end, 0.0)
    whole_most = 1.001 * tl.sum(most, axis=0)
    whole_least = 0.999 * tl.sum(least, axis=0)
    above_is_short = tl.cumsum(most, axis=0) < p * whole_least
    above_may_be_short = tl.cumsum(least, axis=0) < p * whole_most
    rest_is_long = tl.cumsum(least, axis=0, reverse=True) > (1.0 - p) * whole_most
    rest_may_be_long = tl.cumsum(most, axis=0, reverse=True) > (1.0 - p) * whole_least
    first = tl.maximum(tl.sum(above_is_short.to(tl.int32), axis=0), tl.sum(rest_is_long.to(tl.int32), axis=0) - 1)
    last = tl.minimum(
        tl.sum(above_may_be_short.to(tl.int32), axis=0), tl.sum(rest_may_be_long.to(tl.int32), axis=0) - 1
    )
    first = tl.where(p < 1.0, tl.minimum(tl.maximum(first, 0), k_bin), BINS)
    last = tl.where(p < 1.0, tl.minimum(tl.maximum(last, 0), k_bin), -1)

    unlisted = tl.sum(tl.where((bins < k_bin) & ((bins < first) | (bins > last)), count, 0), axis=0)
    rank = tl.where(k_bin < BINS, k - unlisted, 0)
    return first, last, k_bin, rank


@triton.jit
def _from_key(threshold, listed, row, AS_MASS: tl.constexpr, IN_LIST: tl.constexpr, CHUNK: tl.constexpr):
    """How many tokens, or what mass of tokens, have a key of at least `threshold` (int64).

    listed: (keys, masses, token ids) in registers; row: (logits, vocab_size, divisor, highest score) in memory.
    """
    if IN_LIST:
        keys, masses, _ = listed
        found = keys >= threshold.to(tl.int32)
        total = tl.sum(tl.where(found, masses if AS_MASS else 1, 0), axis=0)
    else:
        logits, vocab_size, divisor, highest = row
        sums = tl.zeros([CHUNK], tl.int64 if AS_MASS else tl.int32)
        for start in range(0, vocab_size, CHUNK):
            scores = load_scores(logits, start + tl.arange(0, CHUNK), vocab_size, divisor, True)
            found = (key_of(scores) >= threshold.to(tl.int32)) & (scores > float("-inf"))
            sums += tl.where(found, mass_of(scores, highest) if AS_MASS else 1, 0)
        total = tl.sum(sums, axis=0)
    return total.to(tl.int64)


@triton.jit
def _ties_up_to(last_id, key, listed, row, IN_LIST: tl.constexpr, CHUNK: tl.constexpr):
    """How many tokens with this key have an id of at most `last_id`."""
    if IN_LIST:
        keys, _, token_ids = listed
        total = tl.sum(((keys == key.to(tl.int32)) & (token_ids <= last_id)).to(tl.int32), axis=0)
    else:
        logits, vocab_size, divisor, _ = row
        sums = tl.zeros([CHUNK], tl.int32)
        for start in range(0, vocab_size, CHUNK):
            token_ids = start + tl.arange(0, CHUNK)
            same = key_of(load_scores(logits, token_ids, vocab_size, divisor, True)) == key.to(tl.int32)
            sums += (same & (token_ids <= last_id)).to(tl.int32)
        total = tl.sum(sums, axis=0)
    return total


@triton.jit
def _highest_key(
    enough, offset, low, high, listed, row, AS_MASS: tl.constexpr, IN_LIST: tl.constexpr, CHUNK: tl.constexpr
):
    """The highest key in [low, high] from which upwards there is `enough`, `offset` included; `low` is known to do."""
    while low < high:
        middle = (low + high + 1) >> 1
        found = offset + _from_key(middle, listed, row, AS_MASS, IN_LIST, CHUNK)
        low = tl.where(found >= enough, middle, low)
        high = tl.where(found >= enough, high, middle - 1)
    return low


@triton.jit
def _last_tie(missing, each, key, listed, row, IN_LIST: tl.constexpr, CHUNK: tl.constexpr):
    """The lowest id with which the tokens of this key, of mass `each`, make up the mass that is missing."""
    low = (key * 0).to(tl.int32)
    high = low + row[1] - 1
    while low < high:
        middle = (low + high) >> 1
        enough = each * _ties_up_to(middle, key, listed, row, IN_LIST, CHUNK) >= missing
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


@triton.jit
def _up_to_mass(p, above, below, key, last_id, high, listed, row, IN_LIST: tl.constexpr, CHUNK: tl.constexpr):
    """`threshold_of` under top-p, from what top-k keeps: the keys in [key, high]."""
    if p < 1.0:
        whole = above + below + _from_key(key, listed, row, True, IN_LIST, CHUNK)
        need = tl.maximum(tl.ceil(p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
        key = _highest_key(need, above, key, high, listed, row, True, IN_LIST, CHUNK)
        missing = need - above - _from_key(key + 1, listed, row, True, IN_LIST, CHUNK)
        each = mass_of(score_of(key.to(tl.int32)), row[3])
        if each * (_ties_up_to(LAST_ID, key, listed, row, IN_LIST, CHUNK) - 1) >= missing:
            last_id = _last_tie(missing, each, key, listed, row, IN_LIST, CHUNK)
    return key, last_id


@triton.jit
def threshold_of(
    rank,
    p,
    above,
    below,
    low,
    high,
    listed,
    row,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    IN_LIST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(lowest key that top-k and top-p keep, highest token id kept among its equals), int64 and int32.

    rank: of the k-th score among those searched, 0 if top-k keeps all; p: 1 if top-p does; above, below: masses of
    what is not searched and stays under top-k; low, high: the keys of what is searched lie between, int64.
    """
    key = low
    last_id = (low * 0).to(tl.int32) + LAST_ID
    if HAS_K:
        key = _highest_key(rank, 0, low, tl.where(rank > 0, high, low), listed, row, False, IN_LIST, CHUNK)
    if HAS_P:
        key, last_id = _up_to_mass(p, above, below, key, last_id, high, listed, row, IN_LIST, CHUNK)
    return key, last_id


@triton.jit
def threshold_of_list(
    list_scores,
    list_ids,
    size,
    rank,
    p,
    above,
    below,
    row,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    LIST: tl.constexpr,
):
    """`threshold_of` for a list of `size` tokens in memory, at most LIST; an empty one cuts nothing."""
    at = tl.arange(0, LIST)
    scores = tl.load(list_scores + at, mask=at < size, other=float("-inf"), cache_modifier=".cg")
    token_ids = tl.load(list_ids + at, mask=at < size, other=LAST_ID, cache_modifier=".cg")
    keys = key_of(scores)
    lowest = tl.min(tl.where(at < size, keys, LAST_ID), axis=0)
    low = tl.where(size > 0, lowest, MINUS_INF).to(tl.int64)
    listed = (keys, tl.where(at < size, mass_of(scores, row[3]), 0), token_ids)
    high = key_of(row[3]).to(tl.int64)
    return threshold_of(rank, p, above, below, low, high, listed, row, HAS_K, HAS_P, True, LIST)


@triton.jit
def threshold_of_row(
    list_scores,
    list_ids,
    size,
    rank,
    k,
    p,
    above,
    below,
    lowest,
    row,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    LIST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`threshold_of` from a row's list, or from the row itself if the list, of LIST places, was too short."""
    if size <= LIST:
        key, last_id = threshold_of_list(list_scores, list_ids, size, rank, p, above, below, row, HAS_K, HAS_P, LIST)
    else:
        low, high = key_of(lowest).to(tl.int64), key_of(row[3]).to(tl.int64)
        rank = tl.where(rank > 0, k, 0).to(tl.int64)
        none = rank * 0
        key, last_id = threshold_of(rank, p, none, none, low, high, (), row, HAS_K, HAS_P, False, CHUNK)
    return key, last_id


@triton.jit
def store_cut(key, last_id, highest, fit, min_p, cut_scores, cut_ids, row, HAS_MIN_P: tl.constexpr):
    """The row's cut, raised to what min-p asks of a row that is fit: score >= highest + log(min_p), in float64."""
    if HAS_MIN_P:
        share = tl.load(min_p + row)
        if fit & (share > 0.0):
            least = highest.to(tl.float64) + tl.log(tl.minimum(share, 1.0).to(tl.float64))
            nearest = least.to(tl.float32)
            least_key = key_of(nearest).to(tl.int64) + (nearest.to(tl.float64) < least).to(tl.int64)
            last_id = tl.where(least_key > key, LAST_ID, last_id)
            key = tl.maximum(key, least_key)
    tl.store(cut_scores + row, score_of(key.to(tl.int32)))
    tl.store(cut_ids + row, last_id)
