"""Rules that weigh a row's scores against what else the model says of the next token.

This module does not know how that was computed, requests, or which rules a request has on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

LEAST_LIKELY = math.log(0.1)  # beside the best token


def guide(scores: Tensor, scales: Sequence[float], unconditional: Sequence[Tensor | None]) -> None:
    """Classifier-free guidance on `scores` [R, V]: u + scale * (c - u), where c are the log-probabilities of a row's
    scores and u those of its unconditional logits [V]. Off: 1.0, None. See `handloom.decoding.guided`."""
    for row, (scale, other) in enumerate(zip(scales, unconditional, strict=True)):
        if other is not None:
            own, away = scores[row].log_softmax(dim=-1), other.to(torch.float32).log_softmax(dim=-1)
            scores[row] = scale * (own - away) + away


def dola(scores: Tensor, early: Sequence[Tensor | None]) -> None:
    """DoLa on `scores` [R, V]: log-probabilities, less those of the row of `early` [L, V] whose distribution is the
    farthest from the row's own; -inf for tokens less than a tenth as likely as the best. Off: None.

    See `handloom.decoding.dola`. The divergence is transformers': of the mean from each of the two.
    """
    for row, layers in enumerate(early):
        if layers is None:
            continue
        own, others = scores[row].log_softmax(dim=-1), layers.log_softmax(dim=-1)
        mean = 0.5 * (scores[row].softmax(dim=-1) + layers.softmax(dim=-1))
        away = [F.kl_div(logprobs, mean, reduction="none").mean(dim=-1) for logprobs in (own.expand_as(mean), others)]
        farthest = others[(0.5 * (away[0] + away[1])).argmax()]
        scores[row] = (own - farthest).masked_fill(own < own.max() + LEAST_LIKELY, -torch.inf)
