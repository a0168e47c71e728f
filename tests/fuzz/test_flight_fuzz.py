"""Whatever comes, leaves, fails and holds pages while a device runs ahead of the host: every request ends with the
tokens it has alone, where each step is waited for, or with the error that is its due, and every page comes back."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine_life import ACTIONS, REQUESTS, Asked, Life
from engines import lm_in_float64
from flights import flying
from handloom.engine import Engine
from late_stream import LateStream


class LateLife(Life):
    """A life on a device that is late. What the caller does to it itself, the device does in its turn."""

    def act(self, action: Any) -> None:
        if not isinstance(action, Asked) and action[0] in ("fork", "read"):
            self._catch_up()
        if isinstance(action, Asked) and action.live:
            self._catch_up()
        super().act(action)

    def finish(self) -> None:
        super().finish()
        self._catch_up()

    def _catch_up(self) -> None:
        assert self.lm.graphs is not None and isinstance(self.lm.graphs.stream, LateStream)
        self.lm.graphs.stream.catch_up()


SIMPLE = REQUESTS.filter(lambda asked: asked.fails_at is None and not asked.live)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    first=st.lists(SIMPLE, min_size=4, max_size=8) | st.lists(REQUESTS, min_size=4, max_size=8),
    actions=st.lists(ACTIONS, max_size=15),
    page_size=st.sampled_from((4, 1, 7)),
    capacity=st.integers(40, 80),
    max_step_tokens=st.sampled_from((512, 7, 3)),
    max_running=st.sampled_from((9, 3, 1)),
    prefix_cache=st.booleans(),
    min_width=st.sampled_from((1, 64)),
    seed=st.integers(0, 1000),
    fails=st.sampled_from((0, 0, 0, 1, 2)),
)
def test_any_life_with_steps_in_flight_ends_well(
    first: list[Asked],
    actions: list[Any],
    page_size: int,
    capacity: int,
    max_step_tokens: int,
    max_running: int,
    prefix_cache: bool,
    min_width: int,
    seed: int,
    fails: int,
) -> None:
    stream = LateStream(seed)
    stream.fails = fails
    lm = flying(lm_in_float64(-(-capacity // page_size), page_size), stream, min_width=min_width)
    limits = {"max_step_tokens": max_step_tokens, "max_running": max_running}
    life = LateLife(lm, Engine(lm, prefix_cache=prefix_cache, **limits))
    for action in [*first, *actions]:
        life.act(action)
    life.finish()


def test_the_lives_that_are_drawn_fly() -> None:
    """The fuzz would prove nothing if its steps ran outside captured ones."""
    lm = flying(lm_in_float64(40, 4), LateStream(1))
    life, chance = LateLife(lm, Engine(lm)), random.Random(3)
    for i in range(8):
        life.act(Asked(prompt=chance.randrange(5), new_tokens=26, sampled=i % 2 == 0))
    life.finish()
    assert life.engine.stats().num_captured_steps > 20
