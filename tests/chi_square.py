"""Whether counts follow a distribution."""

from __future__ import annotations

import torch


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-square test; tokens that come up fewer than 5 times are taken together."""
    assert not counts[probabilities == 0].any(), "a token that cannot be drawn was drawn"
    expected = probabilities * counts.sum()
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))[expected > 0].double()
    expected = expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))
