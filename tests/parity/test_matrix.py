"""Modes x families x random models: the outputs of generate. The end of the run tells how many cases there were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from parity_checks import Pair
from parity_modes import MODES, PROPERTY, compare
from tiny_models import TINY, random_ids

FEW, MANY = range(2), range(2, 22)
PROMPTS = (1, 7, 24)


def run(pair: Pair, mode: str, seed: int, record: Callable[[str, object], None]) -> None:
    found: Counter[str] = Counter()
    for i, length in enumerate(PROMPTS):
        found += compare(pair, mode, random_ids(10 * seed + i, length), 10 * seed + i)
    record(PROPERTY, dict(found))
    assert not found["different"], found


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_a_random_model_gives_the_outputs_of_generate(
    mode: str, family: str, seed: int, tiny_pair: Callable[..., Pair], record_property: Any
) -> None:
    run(tiny_pair(family, 500 + seed), mode, seed, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("mode", MODES)
def test_ten_times_as_many(
    mode: str, family: str, seed: int, tiny_pair: Callable[..., Pair], record_property: Any
) -> None:
    run(tiny_pair(family, 500 + seed), mode, seed, record_property)
