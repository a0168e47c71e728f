"""Modes x families x random models, and x the real checkpoints: the outputs of generate, or what transformers gave
while it had the mode. The end of the run tells how many cases there were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from drafting import draft_freely
from parity_checks import Pair
from parity_modes import MODES, PROPERTY, compare
from real_models import BEGINNINGS, GEMMA3, SMOLLM2, real_lm, real_pair
from recorded_modes import GONE, compare_recorded, recorded_of
from tiny_models import TINY, random_ids

FEW, MANY = range(2), range(2, 22)
REAL_FEW, REAL_MANY = range(1), range(1, 11)
PROMPTS = (1, 7, 24)
REAL_TOKENS = 10


@pytest.fixture(autouse=True)
def drafts_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)


def run(pair: Pair, mode: str, seed: int, record: Callable[[str, object], None]) -> None:
    found: Counter[str] = Counter()
    for i, length in enumerate(PROMPTS):
        found += compare(pair, mode, random_ids(10 * seed + i, length), 10 * seed + i)
    record(PROPERTY, dict(found))
    assert not found["different"], found


def run_real(name: str, mode: str, seed: int, record: Callable[[str, object], None]) -> None:
    pair, text = real_pair(name), BEGINNINGS[seed % len(BEGINNINGS)]
    prompt = pair.lm().tokenizer.encode(text[: len(text) - seed % 3])
    found = compare(pair, mode, prompt, seed, new_tokens=REAL_TOKENS)
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


@pytest.mark.parametrize("seed", REAL_FEW)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_smollm2_gives_the_outputs_of_generate(mode: str, seed: int, record_property: Any) -> None:
    run_real(SMOLLM2, mode, seed, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "seed"), [*((SMOLLM2, seed) for seed in REAL_MANY), *((GEMMA3, seed) for seed in (*REAL_FEW, *REAL_MANY))]
)
def test_ten_times_as_many_of_real_models(name: str, seed: int, mode: str, record_property: Any) -> None:
    run_real(name, mode, seed, record_property)


@pytest.mark.parametrize(
    ("name", "count"),
    [(SMOLLM2, 2), pytest.param(SMOLLM2, 12, marks=pytest.mark.slow), pytest.param(GEMMA3, 12, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("mode", GONE)
def test_a_mode_that_transformers_no_longer_has_gives_what_it_gave(
    name: str, mode: str, count: int, record_property: Any
) -> None:
    lm, found = real_lm(name), Counter[str]()
    for case in recorded_of(name)["modes"][mode][:count]:
        found += compare_recorded(lm, case)
    record_property(PROPERTY, dict(found))
    assert not found["different"], found
    assert found.total() >= count


@pytest.mark.parametrize("name", [SMOLLM2, pytest.param(GEMMA3, marks=pytest.mark.slow)])
def test_the_recorded_real_models_are_these_models(name: str) -> None:
    cases = recorded_of(name)["greedy"]
    outputs = real_lm(name).generate([case["prompt"] for case in cases], max_new_tokens=10, eos_token_id=None)
    assert [output.token_ids for output in outputs] == [case["tokens"] for case in cases]
