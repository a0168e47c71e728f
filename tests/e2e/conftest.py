"""What the tests of `handloom bench` begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from handloom import machine
from handloom.measure import limits


@pytest.fixture
def round_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reads 10 GB/s and does 1 TFLOP/s."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda **_: 10e9)
    monkeypatch.setattr(limits, "matmul_rate", lambda *_: 1e12)


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
