"""Any life of an engine some of whose requests draft tokens ends as well as one without: the same tokens, the same
errors, every page back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafting import draft_freely
from engine_life import ACTIONS, REQUESTS, Asked, Life
from engines import lm_in_float64
from handloom.engine import Engine

DRAFTING = st.builds(lambda asked, speculates: replace(asked, speculates=speculates), REQUESTS, st.booleans())
OTHER_ACTIONS = ACTIONS.filter(lambda action: not isinstance(action, Asked))


@pytest.fixture(autouse=True, scope="module")
def free() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        draft_freely(patch)
        yield


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    actions=st.lists(DRAFTING | OTHER_ACTIONS, max_size=15),
    first=st.lists(DRAFTING, min_size=4, max_size=8),
    page_size=st.sampled_from((4, 1, 7)),
    capacity=st.integers(40, 80),
    max_step_tokens=st.sampled_from((512, 30, 7, 1)),
    max_running=st.sampled_from((9, 3, 1)),
    spill_tokens=st.sampled_from((None, 0, 30)),
)
def test_any_life_with_drafts_ends_well(
    first: list[Asked], actions: list[Any], page_size: int, capacity: int, max_step_tokens: int, max_running: int,
    spill_tokens: int | None,
) -> None:  # fmt: skip
    lm = lm_in_float64(-(-capacity // page_size), page_size)
    spill_bytes = None if spill_tokens is None else spill_tokens * lm.pool.page_bytes // page_size
    engine = Engine(lm, max_step_tokens=max_step_tokens, max_running=max_running, spill_bytes=spill_bytes)
    life = Life(lm, engine)
    for action in [*first, *actions]:
        life.act(action)
    life.finish()
