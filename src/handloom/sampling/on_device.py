"""Tokens that a device chooses by itself: greedily, or drawn after temperature, top-k, top-p and min-p.

Captured decode steps choose so. The other steps on such a device do, too, for the rows that are simple enough: two ways
to compute a probability differ in its last bits, and a request's tokens must not depend on who else is in its step.

This module does not know sequences, pages, or how a step is captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from handloom.ops import Chooser
from handloom.sampling import sampler
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import RequestRules, Row
from handloom.sampling.sampler import Choice

ON_DEVICE = frozenset({"temperature", "top_k", "top_p", "min_p"})
Values = tuple[float, int, float, float]


def needs_host(params: GenerationParams, rules: RequestRules) -> str | None:
    """Why the tokens of a request are chosen on the host; None where the device can."""
    if params.do_sample and params.rng != "counter":
        return f"a request draws by rng={params.rng!r}"
    if rules.own:
        return "a request has logits processors of the caller's"
    others = sorted(set(rules.active) - ON_DEVICE)
    if others:
        return f"a request has {others[0]} on"
    if params.do_sample and params.min_tokens_to_keep > 1:
        return "a request has min_tokens_to_keep on"
    if params.output_scores or params.output_logits:
        return "a request asks for scores or logits"
    return "a request asks for the logprobs of other tokens" if params.logprobs else None


def values_of(params: GenerationParams) -> Values:
    """Temperature (0: the most likely token), top_k (off at 0), top_p (off at 1) and min_p (off at 0) of a request."""
    if not params.do_sample:
        return 0.0, 0, 1.0, 0.0
    return params.temperature, params.top_k, params.top_p, params.min_p or 0.0


def cuts(values: Values) -> bool:
    """Whether top-k, top-p or min-p is on."""
    return values[1:] != (0, 1.0, 0.0)


def signed(seed: int) -> int:
    """The int64 with the bits of a seed in [0, 2^64)."""
    return seed - 2**64 if seed >= 2**63 else seed


class DeviceChoice:
    """`sampler.choose` for a device: rows that it can choose for, it chooses for."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> Choice:
        """Choose one token per row of `logits` [R, V]. Rows without one are looked at by the host, which says why."""
        ours = [at for at, row in enumerate(rows) if needs_host(row.params, row.rules) is None]
        if not ours:
            return sampler.choose(logits, rows)
        token_ids, logprobs = self._draw(logits if len(ours) == len(rows) else logits[ours], [rows[at] for at in ours])
        nothing: list[None] = [None] * len(rows)
        choice = Choice([-1] * len(rows), [*nothing], [*nothing], [*nothing], [*nothing], [*nothing])
        for at, token_id, logprob in zip(ours, token_ids, logprobs, strict=True):
            choice.token_ids[at] = token_id
            if rows[at].params.logprobs is not None:
                choice.logprobs[at], choice.top_logprobs[at] = logprob, []
        rest = [at for at, token_id in enumerate(choice.token_ids) if token_id < 0]
        if rest:
            other = sampler.choose(logits[rest], [rows[at] for at in rest])
            for name in Choice.__slots__:
                for at, value in zip(rest, getattr(other, name), strict=True):
                    getattr(choice, name)[at] = value
        return choice

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
        values = [values_of(row.params) for row in rows]
        numbers = torch.tensor(
            [(t, p, least) for t, _, p, least in values], dtype=torch.float32, device=logits.device
        ).T.contiguous()
        top_k = torch.tensor([k for _, k, _, _ in values], dtype=torch.int32, device=logits.device)
        keys = torch.tensor([(signed(row.params.seed), len(row.token_ids)) for row in rows], device=logits.device)
        seeds, counters = keys.T.contiguous()
        temperature, top_p, min_p = numbers
        found = None
        if any(map(cuts, values)):
            found = self.chooser.find_cuts(logits, temperature, top_k, top_p, min_p)
        choice = self.chooser.draw(logits, seeds, counters, temperature, cuts=found)
        return choice.token_ids.tolist(), choice.logprobs.tolist()
