"""The rules about named tokens and lengths: biased, banned, forced, allowed, not yet, from now on.

Each function takes `scores`, float32 [R, V], and one value per row, and writes into `scores`. A row whose value
means "off" keeps every bit; elsewhere the results equal those of transformers' classes.

This module does not know requests or which rules a request has on.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from handloom.sampling.options import LARGEST_FACTOR
from handloom.sampling.repetition import forbid

Biases = Sequence[tuple[tuple[int, ...], float]]


class BiasTable:
    """Biases of token sequences, laid out so that those due at a step are found by looking up the last tokens."""

    def __init__(self, biases: Biases) -> None:
        single = {sequence[0]: bias for sequence, bias in biases if len(sequence) == 1}
        self._single = (
            torch.tensor(list(single), dtype=torch.int64, device="cpu"),
            torch.tensor(list(single.values()), dtype=torch.float32, device="cpu"),
        )
        self._after: dict[int, dict[tuple[int, ...], dict[int, float]]] = {}  # by length of what comes before
        for (*before, last), bias in biases:
            if before:
                self._after.setdefault(len(before), {}).setdefault(tuple(before), {})[last] = bias

    def due(self, token_ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(token ids int64 [n], biases float32 [n]) that count for the next token; ids within one pair are distinct."""
        yield self._single
        for length, table in self._after.items():
            found = table.get(tuple(token_ids[-length:]))
            if found is not None:
                yield (
                    torch.tensor(list(found), device="cpu"),
                    torch.tensor(list(found.values()), dtype=torch.float32, device="cpu"),
                )


def sequence_bias(scores: Tensor, tables: Sequence[BiasTable | None], token_ids: Sequence[Sequence[int]]) -> None:
    """Adds its bias to each token that would complete a sequence of the row's table. Off: None."""
    on = {row: table for row, table in enumerate(tables) if table is not None}
    if not on:
        return
    bias = scores.new_zeros(len(on), scores.shape[1])
    for own, (row, table) in zip(bias, on.items(), strict=True):
        for ids, values in table.due(token_ids[row]):
            own[ids.to(own.device)] += values.to(own.device)
    if len(on) == scores.shape[0]:
        scores += bias
    else:
        scores[list(on)] += bias


def diversity_penalty(scores: Tensor, penalties: Sequence[float], taken: Sequence[Sequence[int]]) -> None:
    """Takes the penalty from each token, times how often other groups of beams have chosen it at this step. Off: 0.0.

    Vijayakumar et al., "Diverse beam search", 2016 (arXiv 1610.02424).
    """
    for row, (penalty, token_ids) in enumerate(zip(penalties, taken, strict=True)):
        if penalty and token_ids:
            counts = Counter(token_ids)
            scores[row, list(counts)] -= penalty * torch.tensor(list(counts.values()), device=scores.device)


def min_length(
    scores: Tensor, minimums: Sequence[int], lengths: Sequence[int], eos_token_ids: Sequence[Sequence[int]]
) -> None:
    """End-of-sequence tokens to -inf while a row's length is below its minimum. Off: 0.

    Lengths with the prompt are min_length, without it min_new_tokens.
    """
    columns = zip(minimums, lengths, eos_token_ids, strict=True)
    forbid(scores, [eos if length < minimum else () for minimum, length, eos in columns])


class OnlyAllowed:
    """All tokens to -inf but those that function(batch_id, token_ids int64 [n]) returns, given what comes before.

    Where none of them was possible they are equally so: a constraint weighs more than a ban. De Cao et al.,
    "Autoregressive entity retrieval", 2021 (arXiv 2010.00904). A logits processor: called for one row.
    """

    def __init__(self, function: Callable[[int, Tensor], Any]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return "prefix_allowed_tokens_fn"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] after input_ids int64 [1, n], in place. Raises ValueError where the function returns no list of
        ids, the scores being as they were."""
        allowed = torch.as_tensor(self.function(0, input_ids[0]), device=scores.device)
        if allowed.dim() != 1 or not len(allowed) or allowed.is_floating_point() or allowed.dtype == torch.bool:
            raise ValueError(f"a list of one or more token ids is needed, not {reprlib.repr(allowed.tolist())}")
        low, high = (int(id_) for id_ in allowed.aminmax())
        if low < 0 or high >= scores.shape[1]:
            raise ValueError(f"token ids from {low} to {high} are not all in [0, {scores.shape[1]}), the vocabulary")
        row, allowed = scores[0], allowed.long()
        possible = row[allowed].add_(0.0)  # -0.0 to 0.0, as transformers' mask does
        row.add_(-torch.inf)
        row[allowed] = possible
        if bool(row.amax().isneginf()):
            row[allowed] = 0
        return scores


def forced_bos_token_id(scores: Tensor, token_ids: Sequence[int | None], lengths: Sequence[int]) -> None:
    """The one token to 0 and all others to -inf where a row's sequence has exactly one token. Off: None."""
    columns = zip(token_ids, lengths, strict=True)
    _force(scores, [() if id_ is None or length != 1 else (id_,) for id_, length in columns])


def forced_eos_token_id(scores: Tensor, token_ids: Sequence[Sequence[int]], rooms: Sequence[int]) -> None:
    """These tokens to 0 and all others to -inf where a row has room for one token more. Off: none."""
    _force(scores, [ids if room == 1 else () for ids, room in zip(token_ids, rooms, strict=True)])


def remove_invalid_values(scores: Tensor, flags: Sequence[bool]) -> None:
    """NaN to 0, infinities to the largest finite numbers. Off: False."""
    for row, flag in enumerate(flags):
        if flag:
            torch.nan_to_num(scores[row], nan=0.0, out=scores[row])


def exponential_decay_length_penalty(
    scores: Tensor,
    penalties: Sequence[tuple[int, float] | None],
    new_lengths: Sequence[int],
    eos_token_ids: Sequence[Sequence[int]],
) -> None:
    """With (start, factor), end-of-sequence scores rise by |score| (factor^past - 1) after `start` tokens. Off: None.

    `past` counts the tokens after `start`; the power ends at 1e30. Scores that are not finite stay.
    """
    for row, (penalty, new_length, eos) in enumerate(zip(penalties, new_lengths, eos_token_ids, strict=True)):
        if penalty is None or new_length <= penalty[0]:
            continue
        score = scores[row, list(eos)]
        rise = score.abs() * (_power(penalty[1], new_length - penalty[0]) - 1)
        scores[row, list(eos)] = torch.where(score.isfinite(), score + rise, score)


def begin_suppress_tokens(
    scores: Tensor, token_ids: Sequence[Sequence[int] | Tensor], at_begin: Sequence[bool]
) -> None:
    """These tokens to -inf for the first token that a row generates. Off: none."""
    forbid(scores, [ids if begin else () for ids, begin in zip(token_ids, at_begin, strict=True)])


def _force(scores: Tensor, token_ids: Sequence[Sequence[int]]) -> None:
    for row, ids in enumerate(token_ids):
        if ids:
            scores[row] = -torch.inf
            scores[row, list(ids)] = 0


def _power(base: float, exponent: int) -> float:
    try:
        return min(base**exponent, LARGEST_FACTOR)
    except OverflowError:
        return LARGEST_FACTOR
