"""The exact threshold of top-k and top-p over a list of scores, or over a whole row, by halving an interval of keys.

A key is a score's bits as an integer that has the scores' order, so at most 32 halvings lead from any interval to the
key of one token. Masses are exp(score - highest) in units of 2^-40, integers: their sums have no order.

                low                     middle                   high
    keys         |------------------------|------------------------|
                              is there enough from here upwards?  yes: low = middle, no: high = middle - 1

One program does this for one row, on a list that it holds in registers (IN_LIST), or, when the list was too short, by
reading the row anew for each question. `selection` makes the lists.

This module does not know how a list came about.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST_ID = tl.constexpr(2147483647)  # no token id is as high
MINUS_INF = tl.constexpr(-2139095041)  # the key of -inf: nothing is below


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
def key_of(scores):
    """int32 in the order of the scores; the function is its own inverse, on bits."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def score_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(x):
    """exp(x) of x <= 0 in units of 2^-40, int64: 2^n exp(r) with |r| <= log(2) / 2, Taylor to the seventh power."""
    x = tl.maximum(x, -40.0)
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(n, -1.42860682030941723212e-6, tl.fma(n, -0.693145751953125, x))
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
            sums += tl.where(found, mass_of(scores - highest) if AS_MASS else 1, 0)
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
def _last_tie(stay, key, listed, row, IN_LIST: tl.constexpr, CHUNK: tl.constexpr):
    """The highest id among the `stay` lowest ids with this key."""
    low = (key * 0).to(tl.int32)
    high = low + row[1] - 1
    while low < high:
        middle = (low + high) >> 1
        enough = _ties_up_to(middle, key, listed, row, IN_LIST, CHUNK) >= stay
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


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
    if HAS_K:  # noqa: SIM102 (the outer one is decided when it is compiled)
        if rank > 0:
            key = _highest_key(rank, 0, low, high, listed, row, False, IN_LIST, CHUNK)
    if HAS_P:  # noqa: SIM102
        if p < 1.0:
            whole = above + below + _from_key(key, listed, row, True, IN_LIST, CHUNK)
            need = tl.maximum(tl.ceil(p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
            key = _highest_key(need, above, key, high, listed, row, True, IN_LIST, CHUNK)
            better = above + _from_key(key + 1, listed, row, True, IN_LIST, CHUNK)
            each = mass_of(score_of(key.to(tl.int32)) - row[3])
            stay = (need - better + each - 1) // each
            if stay < _ties_up_to(LAST_ID, key, listed, row, IN_LIST, CHUNK):
                last_id = _last_tie(stay, key, listed, row, IN_LIST, CHUNK)
    return key, last_id
