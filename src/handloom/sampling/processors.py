"""The rules that look at scores alone: temperature, and the ways of leaving out unlikely tokens. One function per rule.

Each function takes `scores`, float32 [R, V], one value per row, and writes into `scores`. A row whose value
means "off" keeps every bit. On a CPU the results are those of transformers' `LogitsProcessor` classes, bit for
bit; on other devices a sum may differ in its last bit.

This module does not know tokens seen before, requests, or which rules a request has on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOP_H_TOKENS = 100  # top_h looks at no more than these
_FEW = 8  # with at most V // _FEW finite scores in a row, top_p sorts these alone


def temperature(scores: Tensor, temperatures: Sequence[float]) -> None:
    """Scores divided by the row's temperature, > 0. Off: 1.0."""
    if any(value != 1.0 for value in temperatures):
        scores.div_(_column(temperatures, scores))


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
    distance, token_ids = (-logprobs - entropy).abs_().sort(dim=-1)
    total = part.gather(1, token_ids).softmax(dim=-1).cumsum(dim=-1)
    last = (total < _column(list(on.values()), scores)).sum(dim=-1, keepdim=True).clamp_(max=part.shape[1] - 1)
    cut = distance > distance.gather(1, last)
    cut[:, 0] = False
    part.masked_fill_(torch.zeros_like(cut).scatter_(1, token_ids, cut), -torch.inf)
    _put(scores, list(on), part)


def epsilon_cutoff(scores: Tensor, epsilons: Sequence[float]) -> None:
    """Tokens less likely than epsilon to -inf; the best stays. Off: 0.0.

    Hewitt et al., "Truncation sampling as language model desmoothing", 2022 (arXiv 2210.15191).
    """
    on = {row: epsilon for row, epsilon in enumerate(epsilons) if epsilon > 0.0}
    if not on:
        return
    part = _take(scores, list(on))
    unlikely = part.softmax(dim=-1) < _column(list(on.values()), scores)
    part.masked_fill_(unlikely & (part < part.amax(dim=-1, keepdim=True)), -torch.inf)
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
    unlikely = part.softmax(dim=-1) < torch.minimum(epsilon, epsilon.sqrt() * (-entropy).exp())
    part.masked_fill_(unlikely & (part < part.amax(dim=-1, keepdim=True)), -torch.inf)
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


def _first_descending(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True)[:count]


def _most_typical(scores: Tensor, count: int) -> Tensor:
    logprobs = scores.log_softmax(dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum(dim=-1, keepdim=True)
    return (-logprobs - entropy).abs_().sort().indices[:count]


_BEST: dict[Callable[..., None], Callable[[Tensor, int], Tensor]] = {
    top_k: _highest,
    top_p: _last_ascending,
    min_p: _first_descending,
    typical_p: _most_typical,
    epsilon_cutoff: _highest,
    eta_cutoff: _highest,
}


def renormalize_logits(scores: Tensor, flags: Sequence[bool]) -> None:
    """Scores become log-probabilities; a row that is all -inf stays so. Off: False."""
    on = [row for row, flag in enumerate(flags) if flag]
    if on:
        own = _take(scores, on)
        _put(scores, on, torch.where(own.isneginf(), own, own.log_softmax(dim=-1)))


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
    if part is scores:
        return
    if len(rows) == len(scores):
        scores.copy_(part)
    else:
        scores[rows] = part
