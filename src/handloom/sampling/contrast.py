"""Rules that weigh a row's scores against what else the model says of the next token.

This module does not know how that was computed, requests, or which rules a request has on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def guide(scores: Tensor, scales: Sequence[float], unconditional: Sequence[Tensor | None]) -> None:
    """Classifier-free guidance on `scores` [R, V]: u + scale * (c - u), where c are the log-probabilities of a row's
    scores and u those of its unconditional logits [V]. Off: 1.0, None. See `handloom.decoding.guided`."""
    for row, (scale, other) in enumerate(zip(scales, unconditional, strict=True)):
        if other is not None:
            own, away = scores[row].log_softmax(dim=-1), other.to(torch.float32).log_softmax(dim=-1)
            scores[row] = scale * (own - away) + away
