"""The rules against saying again what was said: penalties per token, and no n-gram twice.

Each function takes `scores`, float32 [R, V] contiguous, and one value per row, and writes into `scores`. A row whose
value means "off" keeps every bit; elsewhere the results are those of transformers' classes, bit for bit.

What these rules must know of a sequence is kept up to date token by token (`SeenTokens`, `NgramTable`), so that a
step costs what the rule changes and not what the context holds. Both are functions of the token ids read.

This module does not know requests or which rules a request has on.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Hashable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LONGEST_TUPLE = 16  # a longer beginning of an n-gram is kept as its digest, or a table would hold n times the context


class TokenTensor:
    """Token ids as a tensor that grows."""

    def __init__(self) -> None:
        self._buffer = torch.empty(64, dtype=torch.int64, device="cpu")
        self._size = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            return
        size = self._size + len(token_ids)
        if size > len(self._buffer):
            self._buffer = torch.cat(
                (self._buffer[: self._size], torch.empty(2 * size, dtype=torch.int64, device="cpu"))
            )
        self._buffer[self._size : size] = torch.tensor(token_ids, dtype=torch.int64, device="cpu")
        self._size = size

    @property
    def ids(self) -> Tensor:
        """int64 [n], valid until more are added."""
        return self._buffer[: self._size]

    def read(self, token_ids: Sequence[int], start: int) -> None:
        """Take in token_ids[start:]."""
        self.extend(token_ids[start:])


class SeenTokens(TokenTensor):
    """The distinct ids of the tokens read, in order of first appearance."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def read(self, token_ids: Sequence[int], start: int) -> None:
        """Take in those of token_ids[start:] that are new."""
        new = [token for token in dict.fromkeys(token_ids[start:]) if token not in self._known]
        self._known.update(new)
        self.extend(new)


class NgramTable:
    """Which tokens have followed which n - 1 tokens: what no_repeat_ngram_size forbids to follow them again.

    Paulus et al., "A deep reinforced model for abstractive summarization", 2017 (arXiv 1705.04304).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._next: dict[Hashable, dict[int, None]] = {}

    def read(self, token_ids: Sequence[int], start: int) -> None:
        """Take in the n-grams that end in token_ids[start:]."""
        length = self.size - 1
        recent = array("q", token_ids[max(0, start - length) :])
        for end in range(length, len(recent)):
            self._next.setdefault(self._key(recent[end - length : end]), {})[recent[end]] = None

    def completing(self, token_ids: Sequence[int]) -> Collection[int]:
        """The tokens after which the sequence would end in an n-gram that was read."""
        length = self.size - 1
        if len(token_ids) < length:
            return ()
        return self._next.get(self._key(array("q", token_ids[len(token_ids) - length :])), ())

    def _key(self, before: array[int]) -> Hashable:
        if len(before) < _LONGEST_TUPLE:
            return tuple(before)
        return blake2b(before, digest_size=16).digest()


def repetition_penalty(scores: Tensor, penalties: Sequence[float], token_ids: Sequence[Sequence[int] | Tensor]) -> None:
    """Negative scores times the penalty, others divided by it, once per distinct token of the row's sequence.

    `token_ids` are the tokens (prompt and generated) of each row, repeated or not; ids that `scores` has no column for
    are passed over. Off: 1.0. Keskar et al., "CTRL", 2019 (arXiv 1909.05858), for both signs as in transformers.
    """
    on = {row: penalty for row, penalty in enumerate(penalties) if penalty != 1.0}
    if not on:
        return
    if scores.device.type == "cpu":
        for row, penalty in on.items():
            _penalize(scores[row].numpy(), np.float32(penalty), np.asarray(token_ids[row], dtype=np.int64))
        return
    seen = flat_indices({row: token_ids[row] for row in on}, scores)
    # a tensor also where it is one number: a GPU divides by a number of Python's with other bits
    alone = next(iter(on.values())) if len(on) == 1 else None
    factors = torch.tensor(penalties if alone is None else alone, dtype=torch.float32, device=scores.device)
    factors = factors if alone is not None else factors[seen // scores.shape[1]]
    flat = scores.view(-1)
    score = flat.index_select(0, seen)
    flat.scatter_(0, seen, torch.where(score < 0, score * factors, score / factors))


def _penalize(row: NDArray[np.float32], penalty: np.float32, token_ids: NDArray[np.int64]) -> None:
    if len(token_ids) and token_ids.max() >= len(row):
        token_ids = token_ids[token_ids < len(row)]
    score = row[token_ids]
    with np.errstate(over="ignore"):
        row[token_ids] = np.where(score < 0, score * penalty, score / penalty)


def encoder_repetition_penalty(
    scores: Tensor, penalties: Sequence[float], prompts: Sequence[Sequence[int] | Tensor]
) -> None:
    """`repetition_penalty` the other way round, over the prompt alone: above 1.0 its tokens come more often. Off: 1.0.

    transformers names it after the encoder, and without one means the prompt.
    """
    repetition_penalty(scores, [1 / penalty for penalty in penalties], prompts)


def forbid(scores: Tensor, token_ids: Sequence[Sequence[int] | Tensor]) -> None:
    """Each row's tokens to -inf; ids that `scores` has no column for are passed over."""
    named = {row: ids for row, ids in enumerate(token_ids) if len(ids)}
    if named:
        scores.view(-1).scatter_(0, flat_indices(named, scores), -torch.inf)


def flat_indices(token_ids: dict[int, Sequence[int] | Tensor], scores: Tensor) -> Tensor:
    """Where the rows' token ids lie in `scores.view(-1)`, int64 [n]; ids that have no column are left out."""
    vocab_size = scores.shape[1]
    starts: int | Tensor
    parts = [torch.as_tensor(ids, dtype=torch.int64, device="cpu") for ids in token_ids.values()]
    if len(parts) == 1:
        ids, starts = parts[0], next(iter(token_ids)) * vocab_size
    else:
        ids, counts = torch.cat(parts), torch.tensor([len(part) for part in parts], device="cpu")
        starts = (torch.tensor(list(token_ids), device="cpu") * vocab_size).repeat_interleave(counts)
    flat = ids if isinstance(starts, int) and not starts else ids + starts
    if len(ids) and int(ids.max()) >= vocab_size:
        flat = flat[ids < vocab_size]
    return flat.to(scores.device)
