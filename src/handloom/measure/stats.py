"""Repeated measurements: in which order they are taken, and the numbers they become.

This module does not know what is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Summary:
    """n measurements of one thing. sd: sample standard deviation (n - 1), 0 for a single one; pXX: percentiles."""

    n: int
    mean: float
    sd: float
    p20: float
    p50: float
    p80: float


def summarize(values: Sequence[float]) -> Summary:
    """Mean, spread and percentiles of at least one value."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return Summary(len(values), statistics.fmean(values), sd, *(percentile(values, at) for at in (20, 50, 80)))


def percentile(values: Sequence[float], at: float) -> float:
    """The value below which `at` percent lie, interpolated linearly between neighbours."""
    return float(np.percentile(values, at))


def interleave(peers: Mapping[str, Callable[[], T]], *, rounds: int, warmup: int = 1) -> dict[str, list[T]]:
    """Call the peers in turn, A B A B …, so that a machine that changes its pace changes it for all.

    The first `warmup` rounds are run and thrown away.
    """
    taken: dict[str, list[T]] = {name: [] for name in peers}
    for round_ in range(warmup + rounds):
        for name, call in peers.items():
            value = call()
            if round_ >= warmup:
                taken[name].append(value)
    return taken
