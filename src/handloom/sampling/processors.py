"""The rules that look at scores alone: temperature, and the ways of leaving out unlikely tokens. One function per rule.

Each function takes `scores`, float32 [R, V], one value per row, and writes into `scores`. A row whose value
means "off" keeps every bit. On a CPU the results are those of transformers' `LogitsProcessor` classes, bit for
bit; on other devices a sum may differ in its last bit.

This module does not know tokens seen before, requests, or which rules a request has on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from handloom.sampling import on_cpu

TOP_H_TOKENS = 100  # top_h looks at no more than these


def temperature(scores: Tensor, temperatures: Sequence[float]) -> None:
    """Scores divided by the row's temperature, > 0. Off: 1.0."""
    if scores.device.type != "cpu":
        if any(value != 1.0 for value in temperatures):
            scores.div_(_column(temperatures, scores))
        return
    with np.errstate(over="ignore"):
        for row, value in zip(scores.numpy(), temperatures, strict=True):
            if value != 1.0:
                row /= np.float32(value)


def top_h(scores: Tensor, hs: Sequence[float | None]) -> None:
    """Of the 100 highest scores, the best first, those stay whose part of the entropy adds up to h of it. Off: None.

    The best always stays; what lies below the 100 goes to -inf. Baghaei Potraghloo et al., "Top-H decoding", 2025
    (arXiv 2509.02510).
    """
    on = {row: h for row, h in enumerate(hs) if h is not None}
    if not on:
        return
    part = _take(scores, list(on))
    values, token_ids = part.topk(min(TOP_H_TOKENS, part.shape[1]))
    probabilities, entropy = _distribution(values)
    terms = -probabilities * probabilities.log()
    keep = terms.cumsum(dim=-1) <= entropy * _column(list(on.values()), scores)
    keep[:, 0] = True
    part.masked_fill_(~torch.zeros_like(part, dtype=torch.bool).scatter_(1, token_ids, keep), -torch.inf)
    _put(scores, list(on), part)


def top_k(scores: Tensor, ks: Sequence[int]) -> None:
    """Scores below the row's k-th highest to -inf; ties with it stay. Off: 0."""
    on = [row for row, k in enumerate(ks) if 0 < k < scores.shape[1]]
    if not on:
        return
    if scores.device.type == "cpu":
        table = scores.numpy()
        for row in on:
            on_cpu.forbid_below(table[row], on_cpu.kth_highest(table[row], ks[row]))
        return
    part = _take(scores, on)
    last = torch.tensor([ks[row] - 1 for row in on], device=scores.device)[:, None]
    threshold = part.topk(max(ks[row] for row in on)).values.gather(1, last)
    part.masked_fill_(part < threshold, -torch.inf)
    _put(scores, on, part)


def top_p(scores: Tensor, ps: Sequence[float]) -> None:
    """The least likely tokens whose probabilities add up to at most 1 - p go to -inf; the best stays. Off: 1.0.

    Holtzman et al., "The curious case of neural text degeneration", 2020 (arXiv 1904.09751), summed as in
    transformers: ascending. On a CPU the scores alone are sorted, which is quicker than to sort tokens by them, but
    where equal scores lie on both sides of the cut: the order of that sort says which of them goes.
    """
    full = [row for row, p in enumerate(ps) if p < 1.0]
    if scores.device.type == "cpu":
        table, full = scores.numpy(), []
        for row, mass in ((row, np.float32(1 - p)) for row, p in enumerate(ps) if p < 1.0):
            least, is_tied = on_cpu.nucleus(table[row], mass)
            if is_tied:
                full.append(row)
            else:
                on_cpu.forbid_below(table[row], least)
    if full:
        part = _take(scores, full)
        _cut_all(part, _column([1 - ps[row] for row in full], scores))
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
    _forbid(part, _less(probabilities, threshold))
    _put(scores, list(on), part)


def typical_p(scores: Tensor, masses: Sequence[float]) -> None:
    """The tokens whose surprise is nearest to the expected one stay, until they have the mass. Off: 1.0.

    Meister et al., "Locally typical sampling", 2022 (arXiv 2202.00666). Tokens as near as the last one stay too.
    """
    on = {row: mass for row, mass in enumerate(masses) if mass < 1.0}
    if not on:
        return
    part = _take(scores, list(on))
    logprobs = part.log_softmax(dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum(dim=-1, keepdim=True)
    distance = (-logprobs - entropy).abs_()
    column = _column(list(on.values()), scores)
    full = list(range(len(part)))
    if part.device.type == "cpu":
        farthest = [
            on_cpu.typical(*of) for of in zip(part.numpy(), distance.numpy(), column.numpy()[:, 0], strict=True)
        ]
        full = [row for row, most in enumerate(farthest) if most is None]
        for row, most in enumerate(farthest):
            if most is not None:
                on_cpu.forbid(part[row].numpy(), distance[row].numpy() > most)
    if full:
        own, apart = _take(part, full), _take(distance, full)
        _cut_atypical(own, apart, _take(column, full))
        _put(part, full, own)
    _put(scores, list(on), part)


def epsilon_cutoff(scores: Tensor, epsilons: Sequence[float]) -> None:
    """Tokens less likely than epsilon to -inf; the best stays. Off: 0.0.

    Hewitt et al., "Truncation sampling as language model desmoothing", 2022 (arXiv 2210.15191).
    """
    on = {row: epsilon for row, epsilon in enumerate(epsilons) if epsilon > 0.0}
    if not on:
        return
    part = _take(scores, list(on))
    unlikely = _less(part.softmax(dim=-1), _column(list(on.values()), scores))
    _forbid(part, unlikely & _less(part, part.amax(dim=-1, keepdim=True)))
    _put(scores, list(on), part)


def eta_cutoff(scores: Tensor, epsilons: Sequence[float]) -> None:
    """Tokens less likely than min(epsilon, sqrt(epsilon) e^-entropy) to -inf; the best stays. Off: 0.0.

    Hewitt et al., as `epsilon_cutoff`.
    """
    on = {row: epsilon for row, epsilon in enumerate(epsilons) if epsilon > 0.0}
    if not on:
        return
    part, epsilon = _take(scores, list(on)), _column(list(on.values()), scores)
    _, entropy = _distribution(part)
    unlikely = _less(part.softmax(dim=-1), torch.minimum(epsilon, epsilon.sqrt() * (-entropy).exp()))
    _forbid(part, unlikely & _less(part, part.amax(dim=-1, keepdim=True)))
    _put(scores, list(on), part)


def keeping(rule: Callable[..., None]) -> Callable[..., None]:
    """A rule of this module that leaves each row at least `keeps` [R] tokens, those that transformers' class leaves."""
    best = _BEST[rule]

    def apply(scores: Tensor, values: Sequence[float], keeps: Sequence[int]) -> None:
        before = {row: scores[row].clone() for row, keep in enumerate(keeps) if keep > 1}
        rule(scores, values)
        for row, own in before.items():
            token_ids = best(own, min(keeps[row], len(own)))
            scores[row, token_ids] = own[token_ids]

    return apply


def _highest(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of `scores` [V], and what is as high as the last of them."""
    return (scores >= scores.topk(count).values[-1]).nonzero().flatten()


def _last_ascending(scores: Tensor, count: int) -> Tensor:
    return scores.sort().indices[-count:]


def _most_likely(scores: Tensor, count: int) -> Tensor:
    return scores.softmax(dim=-1).topk(count).indices


def _most_typical(scores: Tensor, count: int) -> Tensor:
    logprobs = scores.log_softmax(dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum(dim=-1, keepdim=True)
    return (-logprobs - entropy).abs_().sort().indices[:count]


_BEST: dict[Callable[..., None], Callable[[Tensor, int], Tensor]] = {
    top_k: _highest,
    top_p: _last_ascending,
    min_p: _most_likely,
    typical_p: _most_typical,
    epsilon_cutoff: _highest,
    eta_cutoff: _highest,
}


def renormalize_logits(scores: Tensor, flags: Sequence[bool]) -> None:
    """Scores become log-probabilities; a row that is all -inf stays so. Off: False."""
    on = [row for row, flag in enumerate(flags) if flag]
    if not on:
        return
    own = _take(scores, on)
    if own.device.type == "cpu":
        table = own.numpy()
        empty = [at for at, first in enumerate(table[:, 0]) if first == -np.inf and table[at].max() == -np.inf]
        torch.log_softmax(own, dim=-1, out=own)
        for at in empty:
            table[at] = -np.inf
    else:
        own = own.log_softmax(dim=-1).masked_fill_(own.amax(dim=-1, keepdim=True).isneginf(), -torch.inf)
    _put(scores, on, own)


def _distribution(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities [R, N], entropy [R, 1] in nats), summed as torch.distributions.Categorical does."""
    logprobs = scores - scores.logsumexp(dim=-1, keepdim=True)
    probabilities = logprobs.softmax(dim=-1)
    terms = logprobs.clamp(min=torch.finfo(logprobs.dtype).min) * probabilities
    return probabilities, -terms.sum(dim=-1, keepdim=True)


def _cut_all(scores: Tensor, mass: Tensor) -> None:
    """-inf into each row's least likely tokens whose probability together is at most `mass` [R, 1]."""
    ascending, token_ids = scores.sort(dim=-1)
    cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= mass
    cut[:, -1] = False
    scores.masked_fill_(torch.zeros_like(cut).scatter_(1, token_ids, cut), -torch.inf)


def _cut_atypical(scores: Tensor, distance: Tensor, mass: Tensor) -> None:
    """-inf into each row's tokens that are farther than those that have `mass` [R, 1] together, the nearest first."""
    ascending, token_ids = distance.sort(dim=-1)
    total = scores.gather(1, token_ids).softmax(dim=-1).cumsum(dim=-1)
    last = (total < mass).sum(dim=-1, keepdim=True).clamp_(max=scores.shape[1] - 1)
    cut = ascending > ascending.gather(1, last)
    cut[:, 0] = False
    scores.masked_fill_(torch.zeros_like(cut).scatter_(1, token_ids, cut), -torch.inf)


def _less(a: Tensor, b: Tensor) -> Tensor:
    return a < b if a.device.type != "cpu" else torch.from_numpy(a.numpy() < b.numpy())


def _forbid(scores: Tensor, mask: Tensor) -> None:
    """-inf where the mask [R, V] is."""
    if scores.device.type != "cpu":
        scores.masked_fill_(mask, -torch.inf)
    else:
        on_cpu.forbid(scores.numpy(), mask.numpy())


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One float32 per row, [R, 1], on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _take(scores: Tensor, rows: list[int]) -> Tensor:
    """The rows named: `scores` itself where that is all of them in order, else a copy that `_put` writes back."""
    return scores if rows == list(range(scores.shape[0])) else scores[rows]


def _put(scores: Tensor, rows: list[int], part: Tensor) -> None:
    if part is scores:
        return
    if len(rows) == len(scores):
        scores.copy_(part)
    else:
        scores[rows] = part
