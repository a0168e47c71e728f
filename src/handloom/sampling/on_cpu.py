"""What the rules do to rows on a CPU, in numpy: in a few passes, and without torch's threads.

Rows are float32 [V], as views of tensors. Where transformers' own sums decide, they are made by torch's operators here
too, and of the same values in the same order, but for zeros in front.

This module does not know what a rule means, or devices.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = NDArray[np.float32]
Flags = NDArray[np.bool_] | NDArray[np.uint8]

_NOTHING = np.float32(-np.inf)
_BITS_OF_NOTHING = _NOTHING.view(np.int32)
_DOUBT = np.float32(2.0**-19)  # many times what a sum of probabilities changes by with the order of a few
_LANES = 128  # torch sums in lanes, a power of two and fewer than this


def forbid(row: Row, banned: Flags) -> None:
    """-inf where `banned`, of the same shape, bool or 0 and 1, is set: by arithmetic on bits, for a processor cannot
    predict branches of a mask without order."""
    keep = banned.view(np.uint8).astype(np.int32)
    keep -= 1
    bits = row.view(np.int32)
    bits ^= _BITS_OF_NOTHING
    bits &= keep
    bits ^= _BITS_OF_NOTHING


def forbid_below(row: Row, least: np.float32) -> None:
    """-inf in place of what is less than `least`."""
    forbid(row, row < least)


def possible(row: Row) -> Row:
    """The scores that are not -inf; the row itself where all are."""
    return row if row.min() > _NOTHING else row[row != _NOTHING]


def kth_highest(row: Row, k: int) -> np.float32:
    """The score that k - 1 others are not below; -inf where fewer are possible."""
    left = possible(row)  # many equal ones would take long to part
    return _NOTHING if len(left) < k else np.float32(np.partition(left, -k)[-k])


def nucleus(row: Row, mass: np.float32) -> tuple[np.float32, bool]:
    """The lowest score that top_p keeps once the least likely tokens, with at most `mass` together, are left out; and
    whether equal scores lie on both sides of the cut, so that the order of a sort decides. (nan, False) for NaN."""
    ascending = np.sort(possible(row))
    if not len(ascending):
        return _NOTHING, False
    ahead = (len(row) - len(ascending)) % _LANES  # of what is impossible, so much that lanes are as in the whole row
    summed = np.concatenate((np.full(ahead, _NOTHING), ascending)) if ahead else ascending
    total = _cumulative(summed)[ahead:]
    count = min(int(total.searchsorted(mass, side="right")), len(ascending) - 1)
    return ascending[count], count > 0 and bool(ascending[count] == ascending[count - 1])


def typical(row: Row, distance: Row, mass: np.float32) -> np.float32 | None:
    """The greatest distance that typical_p keeps, for the distances [V] of a row; None where only the order of torch's
    sort, among tokens at one distance, could tell."""
    keys = distance.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(row), dtype=np.uint64)
    keys.sort()
    nearest = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    scores, ordered = row[nearest], distance[nearest]
    ties = (ordered[1:] == ordered[:-1]) & (scores[1:] != scores[:-1])
    total = _cumulative(scores)
    last = min(int(np.count_nonzero(total < mass)), len(row) - 1)
    is_near = total[last] - mass < _DOUBT or (last > 0 and mass - total[last - 1] < _DOUBT)
    if is_near and ties.any():
        return None
    return np.float32(ordered[last])


def _cumulative(scores: Row) -> Row:
    """The probabilities added up."""
    total: Tensor = torch.from_numpy(scores).softmax(dim=-1).cumsum(dim=-1)
    return total.numpy()
