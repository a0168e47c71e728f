"""For every kernel test: what a launcher allocates is poisoned, so that an element it never writes is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give NaN, or the most negative integer."""

    def poisoned(make: Any) -> Any:
        def allocate(*args: Any, **options: Any) -> Tensor:
            out: Tensor = make(*args, **options)
            if out.dtype.is_floating_point:
                return out.fill_(torch.nan)
            return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).min)

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
