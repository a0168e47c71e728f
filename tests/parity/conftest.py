"""Tiny checkpoints of every family, made once per session."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from parity_checks import Pair, load_pair
from parity_modes import PROPERTY
from tiny_models import TINY, save

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads of one process wait for each other whenever another process has a core: 20 times slower here."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """tiny_pair(family, seed): the saved tiny model of a family, with its transformers twin."""

    @cache
    def make(family: str, seed: int = 0, **overrides: Any) -> Pair:
        return load_pair(save(TINY[family](seed, **overrides), tmp_path_factory.mktemp(family)))

    return make


@pytest.fixture(params=sorted(TINY))
def pair(request: pytest.FixtureRequest, tiny_pair: Callable[..., Pair]) -> Pair:
    """The default tiny model of each family."""
    made: Pair = tiny_pair(request.param)
    return made


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how many outputs of the parity matrix were equal to transformers'."""
    found: Counter[str] = Counter()
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, counts in getattr(report, "user_properties", ()):
            if name == PROPERTY and report.when == "call":
                found.update(counts)
    if found:
        told = f"{found.total()} cases: {found['equal']} equal, {found['tied']} tied, {found['different']} different"
        terminalreporter.write_line(f"parity matrix: {told}")
