"""What an engine tells of itself: events in order, with times, that add up to what it did; and its numbers."""

from __future__ import annotations

import time
from typing import Any

import pytest

from engines import all_free, lm_in_float64, run
from handloom.engine import Engine
from handloom.engine.events import Admitted, EngineEvent, Finished, Preempted, PrefillChunk, TokenChosen
from tiny_models import random_ids

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": []}


def told(events: Any, request: int) -> list[EngineEvent]:
    return [event for event in events if event.request_id == request]


def untimed(events: Any) -> list[tuple[Any, ...]]:
    """(kind, what it says beside request and time) of each."""
    return [(type(event), *(getattr(event, name) for name in event.__slots__[2:])) for event in events]


def test_a_request_tells_its_life_in_order() -> None:
    engine = Engine(lm_in_float64(), max_step_tokens=8)
    started = time.monotonic()
    queue = engine.watch()
    request = engine.add_request(random_ids(0, 19), **OPTIONS)
    tokens = run(engine).tokens[request]
    assert untimed(queue) == [
        (Admitted, 19, 0),
        (PrefillChunk, 0, 8),
        (PrefillChunk, 8, 8),
        (PrefillChunk, 16, 3),
        *((TokenChosen, token) for token in tokens),
        (Finished, "length"),
    ]
    times = [event.time for event in queue]
    assert started <= times[0] and times == sorted(times) and times[-1] <= time.monotonic()


def test_a_stopped_request_tells_when_it_stopped_and_what_is_computed_again() -> None:
    lm = lm_in_float64(12)
    engine = Engine(lm)
    queue = engine.watch()
    requests = [engine.add_request(random_ids(i, 9), max_new_tokens=24, eos_token_id=[]) for i in range(3)]
    run(engine)
    stops = [event for event in queue if isinstance(event, Preempted)]
    assert stops and engine.stats().num_preempted == len(stops)
    for request in requests:
        own = told(queue, request)
        assert len([event for event in own if isinstance(event, TokenChosen)]) == 24
        computed = 0
        for event in own:
            if isinstance(event, Admitted):
                computed = event.num_cached
            elif isinstance(event, PrefillChunk):
                assert event.first == computed
                computed += event.num_tokens
            elif isinstance(event, Preempted):
                assert computed <= event.num_computed
        kinds = [type(event) for event in own if isinstance(event, Admitted | Preempted | Finished)]
        assert kinds == [Admitted, *[Preempted, Admitted] * kinds.count(Preempted), Finished]


@pytest.mark.parametrize("running", [True, False])
def test_an_aborted_request_is_over_for_those_who_listen(running: bool) -> None:
    engine = Engine(lm_in_float64())
    queue = engine.watch()
    request = engine.add_request(random_ids(0, 9), **OPTIONS)
    if running:
        engine.step()
    engine.abort(request)
    assert untimed(queue)[-1] == (Finished, "aborted")
    assert len(queue) == (4 if running else 1)


def test_failures_are_told_once() -> None:
    engine = Engine(lm_in_float64(3))
    queue = engine.watch()
    engine.add_request(random_ids(0, 30), **OPTIONS)
    assert len(engine.step()) == 1
    assert untimed(queue) == [(Finished, "error")]


def test_who_no_longer_listens_hears_nothing_and_others_do() -> None:
    engine = Engine(lm_in_float64())
    first, second, short = engine.watch(), engine.watch(), engine.watch(limit=2)
    engine.unwatch(first)
    engine.add_request(random_ids(0, 9), **OPTIONS)
    run(engine)
    assert (len(first), len(second), len(short)) == (0, 8, 2)
    assert untimed(short)[-1] == (Finished, "length")


def test_the_numbers_of_an_engine_add_up() -> None:
    lm = lm_in_float64(40)
    engine = Engine(lm, max_running=2)
    for _ in range(3):
        engine.add_request(random_ids(0, 17), **OPTIONS)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_free, stats.tokens_per_second, stats.hit_rate) == (0, 3, 40, 0, 0)
    for _ in range(2):
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.num_chosen, stats.num_computed) == (2, 1, 3, 17 + 1 + 1)
    assert stats.pages_used + stats.pages_cached + stats.pages_free == 40
    assert stats.pages_used == 4 + 2 * 2, "four pages of the prompt are shared, two of each are its own"
    run(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.num_finished, stats.num_chosen) == (0, 0, 3, 15)
    assert stats.num_computed == 17 + 2 + 3 * 4
    assert stats.hit_rate == pytest.approx(2 * 16 / (3 * 17))
    assert stats.tokens_per_second > 0
    assert (stats.pages_used, stats.pages_cached) == (0, 5), "the prompts are alike, and so are the greedy tokens"
    assert all_free(lm)


def test_the_rate_falls_while_nothing_runs() -> None:
    engine = Engine(lm_in_float64())
    engine.add_request(random_ids(0, 9), **OPTIONS)
    run(engine)
    before = engine.stats().tokens_per_second
    time.sleep(0.02)
    assert engine.stats().tokens_per_second < before
