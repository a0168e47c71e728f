"""Whatever comes, leaves, fails and holds pages, however small the pool: every step makes progress, every request
ends with the tokens it has alone or with an error of ours that is its due, and every page comes back."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine_life import ACTIONS, REQUESTS, Asked, Life
from engines import lm_in_float64
from handloom.decoding.decoder import Event
from handloom.engine import Engine


class Checked(Engine):
    """An engine whose every step must run tokens or end a request."""

    def step(self) -> list[Event]:
        had_work = self.has_work
        self.scheduler.sharing = self.prefix_cache
        plan, events = self.scheduler.plan()
        assert plan.num_tokens <= self.scheduler.max_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_running
        assert plan.works or events or not had_work, "a step without progress"
        if plan.works:
            events += self.scheduler.advance(plan, self.runner.forward(plan.works))
        return events


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    first=st.lists(REQUESTS, min_size=4, max_size=8),
    actions=st.lists(ACTIONS, max_size=15),
    page_size=st.sampled_from((4, 1, 7)),
    capacity=st.integers(40, 80),
    max_step_tokens=st.sampled_from((512, 7, 3, 1)),
    max_running=st.sampled_from((9, 3, 1)),
    prefix_cache=st.booleans(),
    spill_tokens=st.sampled_from((None, 0, 30)),
)
def test_any_life_of_an_engine_ends_well(
    first: list[Asked],
    actions: list[Any],
    page_size: int,
    capacity: int,
    max_step_tokens: int,
    max_running: int,
    prefix_cache: bool,
    spill_tokens: int | None,
) -> None:
    lm = lm_in_float64(-(-capacity // page_size), page_size)
    spill_bytes = None if spill_tokens is None else spill_tokens * lm.pool.page_bytes // page_size
    limits = {"max_step_tokens": max_step_tokens, "max_running": max_running, "spill_bytes": spill_bytes}
    life = Life(lm, Checked(lm, prefix_cache=prefix_cache, **limits))
    for action in [*first, *actions]:
        life.act(action)
    life.finish()
