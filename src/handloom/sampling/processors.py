"""The rules that reshape scores before a token is chosen: one function per rule, in the order of application.

Each function takes `scores`, float32 [R, V], one value per row, and writes into `scores`. A row whose value
means "off" keeps every bit. On a CPU the results are those of transformers' `LogitsProcessor` classes, bit for
bit; on other devices a sum may differ in its last bit.

This module does not know requests, which rules a request has on, or the caller's own processors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FEW = 8  # with at most V // _FEW finite scores in a row, top_p sorts these alone


def repetition_penalty(scores: Tensor, penalties: Sequence[float], token_ids: Sequence[Sequence[int]]) -> None:
    """Negative scores times the penalty, others divided by it, once per distinct token of the row's sequence.

    `token_ids` has one sequence (prompt and generated) per row; ids that `scores` has no column for are passed
    over. Off: 1.0. Keskar et al., "CTRL", 2019 (arXiv 1909.05858), for both signs as in transformers.
    """
    for row, (penalty, sequence) in enumerate(zip(penalties, token_ids, strict=True)):
        if penalty == 1.0:
            continue
        seen = torch.tensor(sequence, dtype=torch.int64, device=scores.device)
        seen = seen[seen < scores.shape[1]]
        score = scores[row, seen]
        scores[row, seen] = torch.where(score < 0, score * penalty, score / penalty)


def min_length(
    scores: Tensor, minimums: Sequence[int], lengths: Sequence[int], eos_token_ids: Sequence[Sequence[int]]
) -> None:
    """End-of-sequence tokens to -inf while a row's length, prompt included, is below its minimum. Off: 0."""
    for row, (minimum, length, eos) in enumerate(zip(minimums, lengths, eos_token_ids, strict=True)):
        if length < minimum:
            scores[row, list(eos)] = -torch.inf


def min_new_tokens(
    scores: Tensor, minimums: Sequence[int], new_lengths: Sequence[int], eos_token_ids: Sequence[Sequence[int]]
) -> None:
    """End-of-sequence tokens to -inf while a row has generated fewer tokens than its minimum. Off: 0."""
    min_length(scores, minimums, new_lengths, eos_token_ids)


def temperature(scores: Tensor, temperatures: Sequence[float]) -> None:
    """Scores divided by the row's temperature, > 0. Off: 1.0."""
    if any(value != 1.0 for value in temperatures):
        scores.div_(_column(temperatures, scores))


def top_k(scores: Tensor, ks: Sequence[int]) -> None:
    """Scores below the row's k-th highest to -inf; ties with it stay. Off: 0."""
    on = [row for row, k in enumerate(ks) if 0 < k < scores.shape[1]]
    if not on:
        return
    part = _take(scores, on)
    last = torch.tensor([ks[row] - 1 for row in on], device=scores.device)[:, None]
    threshold = part.topk(max(ks[row] for row in on)).values.gather(1, last)
    part.masked_fill_(part < threshold, -torch.inf)
    _put(scores, on, part)


def top_p(scores: Tensor, ps: Sequence[float]) -> None:
    """The least likely tokens whose probabilities add up to at most 1 - p go to -inf; the best stays. Off: 1.0.

    Holtzman et al., "The curious case of neural text degeneration", 2020 (arXiv 1904.09751), summed as in
    transformers: ascending. Where another rule has left few tokens, only these are sorted, and the row that is
    summed still has the bits of a full sort. The full sort itself is needed only where equal scores lie on both
    sides of the cut: its order alone says which of them goes.
    """
    on = [row for row, p in enumerate(ps) if p < 1.0]
    if not on:
        return
    mass = _column([1 - p for p in ps], scores)
    counts = (scores > -torch.inf).sum(dim=-1, dtype=torch.int32).tolist()
    few = [row for row in on if 0 < counts[row] <= scores.shape[1] // _FEW]
    full = [row for row in on if row not in few]
    if few:
        part = _take(scores, few)
        tied = _cut_few(part, _take(mass, few), max(counts[row] for row in few))
        _put(scores, few, part)
        full += [row for row, is_tied in zip(few, tied, strict=True) if is_tied]
    if full:
        part = _take(scores, full)
        _cut_all(part, _take(mass, full))
        _put(scores, full, part)


def min_p(scores: Tensor, ps: Sequence[float | None]) -> None:
    """Tokens less likely than p times the most likely one to -inf. Off: None.

    Nguyen et al., "Turning up the heat: min-p sampling", 2024 (arXiv 2407.01082).
    """
    on = {row: p for row, p in enumerate(ps) if p is not None}
    if not on:
        return
    part = _take(scores, list(on))
    probabilities = part.softmax(dim=-1)
    threshold = probabilities.amax(dim=-1, keepdim=True) * _column(list(on.values()), scores)
    part.masked_fill_(probabilities < threshold, -torch.inf)
    _put(scores, list(on), part)


def _cut_all(scores: Tensor, mass: Tensor) -> None:
    """-inf into each row's least likely tokens whose probability together is at most `mass` [R, 1]."""
    ascending, token_ids = scores.sort(dim=-1)
    cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= mass
    cut[:, -1] = False
    scores.masked_fill_(torch.zeros_like(cut).scatter_(1, token_ids, cut), -torch.inf)


def _cut_few(scores: Tensor, mass: Tensor, width: int) -> list[bool]:
    """`_cut_all` for rows with at most `width` finite scores; a row is left alone where this is true:
    the cut falls between equal scores."""
    values, token_ids = (part.flip(-1) for part in scores.topk(width))
    ascending = torch.full_like(scores, -torch.inf)
    ascending[:, -width:] = values
    cut = (ascending.softmax(dim=-1).cumsum(dim=-1) <= mass)[:, -width:]
    cut[:, -1] = False
    edge = cut[:, :-1] & ~cut[:, 1:]
    tied = (edge & (values[:, :-1] == values[:, 1:])).any(dim=-1)
    cut &= ~tied[:, None]
    scores.scatter_(1, token_ids, values.masked_fill(cut, -torch.inf))
    left_alone: list[bool] = tied.tolist()
    return left_alone


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One float32 per row, [R, 1], on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _take(scores: Tensor, rows: list[int]) -> Tensor:
    """The rows named: `scores` itself where that is all of them in order, else a copy that `_put` writes back."""
    return scores if rows == list(range(scores.shape[0])) else scores[rows]


def _put(scores: Tensor, rows: list[int], part: Tensor) -> None:
    if part is not scores:
        scores[rows] = part
