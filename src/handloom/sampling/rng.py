"""Random numbers that depend on (seed, position, token id) and on nothing else.

The generator is Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): a function of a counter and a key, without state. It is the function of Triton's `tl.philox`, so a
kernel can draw the same numbers. The key is the request's seed; the counter is (token id, position, 0, 0), where
position is the index, prompt included, of the token being chosen.

A token is drawn by the Gumbel-max trick: argmax(scores + Gumbel noise) has the distribution softmax(scores).
Each token of the vocabulary has its own noise, so a row's draw does not depend on the other rows of a batch,
on its place among them, or on how many tokens a filter removed.

This module does not know what a score means, which rules shaped it, or what a request is.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from handloom.ops import Perturb, perturb_on_cpu

_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_LOW_WORD = 0xFFFFFFFF
_LARGEST_UNIFORM = 1 - 2**-24  # the largest float32 below 1
_CPU_BLOCK = 16384  # elements: the five int64 buffers of a block stay in a core's second-level cache
_NOISE_RANGE = 25.8  # noise lies in [-2.82, 22.88]: a token further below the best score than this cannot win
_FEW = 4096  # a row with no more tokens than this is drawn together with others
_MARGIN, _RELATIVE_MARGIN = 2.0**-10, 2.0**-20  # far more than compiled sums of score and noise are off


def fresh_seed() -> int:
    """A seed from the operating system's entropy, in [0, 2^53): exact also as a JSON number."""
    return secrets.randbits(53)


def seed_of_sample(seed: int, sample: int) -> int:
    """The seed of a request's output number `sample`: the request's own for the first, else in [0, 2^53) by a hash."""
    if sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 11


def _half_round(multiplier: int, word: Tensor, neighbour: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """One of the two products of a round: (high word ^ neighbour ^ key, low word with unclean upper half).

    Products wrap in int64, which keeps all 64 bits right; only words that are multiplied again need be clean.
    Operands that are one value for all tokens stay small as long as they can.
    """
    product = word * multiplier
    high = product >> 32
    if neighbour.numel() < high.numel():
        high ^= neighbour ^ key
    else:
        high = high.bitwise_xor_(neighbour) if high.numel() == neighbour.numel() else high ^ neighbour
        high ^= key
    return high.bitwise_and_(_LOW_WORD), product


def _rounds(count: int, counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`count` rounds: (counter words, key words) after them; words 1 and 3 have an unclean upper half."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(count):
        (c0, c1), (c2, c3) = _half_round(_MULTIPLIER_B, c2, c1, k0), _half_round(_MULTIPLIER_A, c0, c3, k1)
        k0, k1 = k0 + _WEYL_A, k1 + _WEYL_B
    return [c0, c1, c2, c3], [k0, k1]


def philox_4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """The four random 32-bit words of four counter words and two key words.

    All are int64 tensors with values in [0, 2^32), of shape [N] or [1] (the same for all N); so is the result.
    """
    words, _ = _rounds(10, counter, key)
    return [word & _LOW_WORD for word in words]


def _first_word(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Word 0 of `philox_4x32_10`, without the work that only the other three words need."""
    (_, c1, c2, _), (k0, _) = _rounds(9, counter, key)
    return _half_round(_MULTIPLIER_B, c2, c1, k0)[0]


def seed_words(seeds: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeds in [0, 2^64) as Philox keys: (low words [R], high words [R]), int64."""
    low = torch.tensor([seed & _LOW_WORD for seed in seeds], dtype=torch.int64, device=device)
    high = torch.tensor([seed >> 32 for seed in seeds], dtype=torch.int64, device=device)
    return low, high


def gumbel_noise(key: Sequence[Tensor], positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [N], for N tokens.

    `key` is two tensors of `seed_words`, `token_ids` int64 [N]; key words and `positions` are int64 [N] or [1].
    With u the 32-bit random word: U = min((u + 0.5) 2^-32, 1 - 2^-24), noise = -log(-log1p(-U)). Large noise, which
    decides, comes from small U, where float32 is finest; the noise lies in [-2.82, 22.88].
    """
    count = token_ids.numel()
    block = _CPU_BLOCK if token_ids.device.type == "cpu" else max(count, 1)
    zero = torch.zeros(1, dtype=torch.int64, device=token_ids.device)
    noise = torch.empty(count, dtype=torch.float32, device=token_ids.device)
    for start in range(0, count, block):
        part = slice(start, start + block)
        position, low, high = (word if word.numel() == 1 else word[part] for word in (positions, *key))
        noise[part] = _first_word((token_ids[part], position, zero, zero), (low, high))
    uniform = noise.add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def sample(scores: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Draw one token id per row with probability softmax(scores).

    `scores` is float32 [R, V] without NaN or +inf, with at least one finite score in every row; it is left as it is.
    `seeds` are in [0, 2^64), `positions` in [0, 2^31). Equal sums go to the lowest token id. Noise is computed only
    for tokens that can win; rows with few of them are drawn together. Where compiled code is in memory, it finds the
    tokens whose sums are nearly the highest.
    """
    perturb = perturb_on_cpu() if scores.device.type == "cpu" else None
    if perturb is not None:
        return _sample_compiled(perturb, scores, seeds, positions)
    key = seed_words(seeds, scores.device)
    places = torch.tensor(positions, dtype=torch.int64, device=scores.device)
    alive = scores >= scores.amax(dim=-1, keepdim=True) - _NOISE_RANGE
    rows, token_ids = alive.nonzero(as_tuple=True)
    totals = scores[rows, token_ids]
    counts = alive.sum(dim=-1, dtype=torch.int32).tolist()
    chosen: list[int] = []
    start = 0
    for narrow, run in groupby(range(len(counts)), key=lambda row: counts[row] <= _FEW):
        for group in [list(run)] if narrow else ([row] for row in run):
            sizes = counts[group[0] : group[-1] + 1]
            part = slice(start, start := start + sum(sizes))
            own = slice(group[0], group[0] + 1) if len(group) == 1 else rows[part]  # one row: one key for all tokens
            totals[part] += gumbel_noise([word[own] for word in key], places[own], token_ids[part])
            chosen += token_ids[part][_best_of_each(totals[part], sizes)].tolist()
    return chosen


def _sample_compiled(perturb: Perturb, scores: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """`sample` by compiled sums, which are a little off: those that are the highest within that are made exactly."""
    table = scores.numpy()
    keys = [(seed & _LOW_WORD, seed >> 32, at) for seed, at in zip(seeds, positions, strict=True)]
    totals = perturb(table, table.max(axis=1) - np.float32(_NOISE_RANGE), np.array(keys))
    chosen: list[int] = []
    for row, own in enumerate(totals):
        token_id = int(own.argmax())
        highest = float(own[token_id])
        (near,) = np.nonzero(own >= highest - abs(highest) * _RELATIVE_MARGIN - _MARGIN)
        if len(near) > 1:
            low, high, position = torch.tensor(keys[row], device="cpu").split(1)
            token_ids = torch.from_numpy(near)
            exact = scores[row, token_ids] + gumbel_noise((low, high), position, token_ids)
            token_id = int(near[int(exact.argmax())])
        chosen.append(token_id)
    return chosen


def sample_without_replacement(scores: Tensor, seed: int, position: int, count: int) -> Tensor:
    """Draw `count` different indices, int64 [count], one after another with probability softmax(scores) of those left.

    `scores` is float32 [N] without NaN or +inf. Where fewer are possible, others fill up in the order of their scores.
    By Gumbel-top-k: Kool et al., "Stochastic beams and where to find them", 2019 (arXiv 1903.06059).
    """
    (indices,) = (scores >= scores.topk(count).values[-1] - _NOISE_RANGE).nonzero(as_tuple=True)
    place = torch.tensor([position], dtype=torch.int64, device=scores.device)
    totals = scores[indices] + gumbel_noise(seed_words([seed], scores.device), place, indices)
    return indices[totals.topk(count).indices]


def _best_of_each(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """`values` [N] are segments of the given sizes, one after another: the index in [0, N) of each one's maximum."""
    if len(sizes) == 1:
        return values.max(dim=0, keepdim=True).indices
    lengths = torch.tensor(sizes, device=values.device)
    table = values.new_full((len(sizes), max(sizes)), -torch.inf)
    table[torch.arange(max(sizes), device=values.device) < lengths[:, None]] = values
    return lengths.cumsum(0) - lengths + table.max(dim=-1).indices
