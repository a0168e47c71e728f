"""A long day of an engine: random requests come, go, fork and fail in pools far too small for them, and in the end
every request has had its end and every page is free."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engines import all_free, lm_with
from handloom.decoding.decoder import FinishedEvent, TokenEvent
from handloom.engine import Engine
from handloom.errors import HandloomError, OutOfPages, RequestFailed
from handloom.live import LiveSequence
from handloom.lm import LM
from tiny_models import random_ids

POOLS = ((9, 4), (30, 4), (40, 1), (7, 16))  # pages, tokens of each
MAX_STEPS = 200


@dataclass
class Day:
    """One engine over one small pool, and who is in it."""

    lm: LM
    engine: Engine
    chance: random.Random
    open: dict[int, int] = field(default_factory=dict)  # requests in flight, and the tokens they may still get
    lives: list[LiveSequence] = field(default_factory=list)
    asked: int = 0
    aborted: int = 0
    failed: int = 0
    finished: int = 0

    def ask(self) -> None:
        """One more request: mostly plain, some with a sequence of the caller's, some that will fail."""
        chance = self.chance
        length = max(12, self.lm.pool.page_size + 4)  # of beginnings that several have: at least a page
        beginning = random_ids(chance.randrange(3), length)[: chance.randint(1, length)]
        prompt: Any = beginning + random_ids(chance.randrange(99), 5)
        new_tokens = chance.choice((1, 2, 7, 7, 19))
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_id": [], "priority": chance.randint(-1, 1)}
        if chance.random() < 0.4:
            options |= {"temperature": 1.3, "top_k": 0, "seed": chance.randrange(99)}
        if chance.random() < 0.05:
            options["logits_processor"] = [fails]
        if chance.random() < 0.1:
            prompt = self.lm.sequence(prompt)
            self.lives.append(prompt)
        if chance.random() < 0.05:
            options["max_new_tokens"] = new_tokens = 200  # more than any of these pools holds
        self.asked += 1
        self.open[self.engine.add_request(prompt, cache_salt="", **options)] = new_tokens

    def step(self) -> None:
        for event in self.engine.step():
            if isinstance(event, TokenEvent):
                self.open[event.request_id] -= 1
                assert self.open[event.request_id] >= 0
            elif isinstance(event, FinishedEvent):
                left = self.open.pop(event.request_id)
                if event.error is None:
                    assert left == 0
                    self.finished += 1
                else:
                    assert isinstance(event.error, RequestFailed | OutOfPages)
                    self.failed += 1

    def abort(self) -> None:
        request = self.chance.choice(list(self.open))
        assert self.engine.abort(request)
        assert not self.engine.abort(request)
        del self.open[request]
        self.aborted += 1

    def meddle(self) -> None:
        """What a caller may do with a sequence of no request while others run: fork, evict, remove, let go."""
        busy = [sequence for request in self.engine.scheduler for sequence in request.decoder.sequences]
        idle = [sequence for sequence in self.lives if sequence not in busy]
        if not idle:
            return
        sequence = self.chance.choice(idle)
        try:
            self.lives += [sequence.fork()] if self.chance.random() < 0.3 else []
            if self.chance.random() < 0.3 and sequence.num_computed > 4:
                self.chance.choice((sequence.evict, sequence.remove))(1, self.chance.randint(2, 4))
        except OutOfPages:
            pass
        if len(self.lives) > 3 or self.chance.random() < 0.5:
            self.lives.remove(sequence)
            sequence.free()


def fails(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if input_ids.shape[1] % 3:
        return scores
    raise ZeroDivisionError("a processor's own mistake")


def live(requests: int, pool: tuple[int, int], seed: int) -> Day:
    """Random arrivals and departures until `requests` were asked for, then until nobody is left."""
    lm = lm_with(*pool)
    day = Day(lm, Engine(lm, max_step_tokens=32, max_running=6), random.Random(seed))
    while day.asked < requests:
        luck = day.chance.random()
        if luck < 0.35 and len(day.open) < 12:
            day.ask()
        elif luck < 0.39 and day.open:
            day.abort()
        elif luck < 0.43:
            day.meddle()
        else:
            day.step()
    for _ in range(MAX_STEPS):
        if not day.engine.has_work:
            break
        day.step()
    for sequence in day.lives:
        sequence.free()
    return day


def check(day: Day, requests: int) -> None:
    assert not day.engine.has_work and not day.open
    assert day.finished + day.failed + day.aborted == requests
    assert all_free(day.lm), "pages leaked"
    assert sum(day.lm.pool.references(page) for page in range(day.lm.pool.num_pages)) == 0
    day.lm.pool.forget_cached()
    assert day.lm.pool.num_empty == day.lm.pool.num_pages
    assert not list(day.engine.scheduler)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_after_a_hundred_requests_in_tiny_pools_no_page_is_missing(pool: tuple[int, int]) -> None:
    day = live(25, pool, seed=1)
    check(day, 25)
    assert day.finished > 5


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_after_two_thousand_requests_in_tiny_pools_no_page_is_missing(pool: tuple[int, int]) -> None:
    day = live(500, pool, seed=2)
    check(day, 500)
    stats = day.engine.stats()
    assert min(day.finished, day.failed, day.aborted, stats.num_preempted) > 0
    assert stats.hit_rate > 0
    with pytest.raises(HandloomError):
        day.lm.generate([5, 6], max_new_tokens=10_000)
    assert day.lm.generate([5, 6], max_new_tokens=3, eos_token_id=[]).finish_reason == "length"
