"""The scheduler alone, with decoders that only count: order, budgets, admission, failure of one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Literal

import pytest
import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Event, FinishedEvent, TokenEvent
from handloom.engine.scheduler import Plan, Request, Scheduler
from handloom.errors import InvalidPrompt, OutOfPages, RequestFailed
from paged import pool_of

PAGE_SIZE = 4


class Counting:
    """Runs a prompt, then appends one token a step until max_length; remembers the rows it was given."""

    def __init__(self, pool: PagePool, prompt: int, new: int, logits: Literal["none", "last", "all"] = "last") -> None:
        self.sequence = Sequence(pool, range(prompt))
        self.max_length = prompt + new
        self.logits = logits
        self.rows: list[float] = []
        self.closed = 0
        self.broken = self.idle = False

    def plan(self) -> Seq[Work]:
        if self.idle:
            return []
        if self.broken:
            raise InvalidPrompt("broken")
        return [Work(self.sequence, self.sequence.num_pending, self.logits)]

    def advance(self, logits: Tensor) -> list[Event]:
        self.rows += logits[:, 0].tolist()
        if self.sequence.num_pending:
            return []
        if len(self.sequence) == self.max_length:
            return [FinishedEvent("length")]
        self.sequence.append(0)
        return [TokenEvent(0)]

    def close(self) -> None:
        self.closed += 1
        self.sequence.free()


class Bench:
    """A scheduler, its decoders by request id, and a model whose row i of a step has logits [i, 0]."""

    def __init__(self, num_pages: int = 100, **limits: int) -> None:
        self.pool = pool_of(num_pages, PAGE_SIZE, shapes=((1, 1),))
        self.scheduler = Scheduler(self.pool, **{"max_tokens": 100, "max_running": 100, "max_rows": 100, **limits})
        self.decoders: list[Counting] = []

    def add(self, prompt: int, new: int, logits: Literal["none", "last", "all"] = "last") -> Counting:
        self.decoders.append(Counting(self.pool, prompt, new, logits))
        self.scheduler.add(Request(len(self.decoders) - 1, self.decoders[-1]))
        return self.decoders[-1]

    def step(self) -> tuple[list[tuple[int, int, str]], list[Event]]:
        """[(request id, tokens, logits)] of the step, and its events."""
        plan, events = self.scheduler.plan()
        logits = torch.arange(sum(work.num_rows for work in plan.works)).float()[:, None].expand(-1, 2)
        shown = [(r.id, w.num_tokens, w.logits) for r, w in zip(plan.owners, plan.works, strict=True)]
        return shown, events + self.scheduler.advance(plan, logits)

    def works(self) -> list[tuple[int, int, str]]:
        return self.step()[0]


def test_requests_start_in_the_order_they_came() -> None:
    bench = Bench(max_tokens=10, max_running=3)
    for _ in range(5):
        bench.add(prompt=3, new=2)
    assert bench.works() == [(0, 3, "last"), (1, 3, "last"), (2, 3, "last")]
    assert [r.id for r in bench.scheduler] == [0, 1, 2, 3, 4]
    bench.step()
    _, events = bench.step()
    assert [e.request_id for e in events if isinstance(e, FinishedEvent)] == [0, 1, 2]
    assert bench.works() == [(3, 3, "last"), (4, 3, "last")]


def test_running_requests_come_before_new_ones() -> None:
    bench = Bench(max_tokens=6)
    bench.add(prompt=2, new=9)
    bench.step()
    bench.add(prompt=9, new=1)
    assert bench.works() == [(0, 1, "last"), (1, 5, "none")]
    assert bench.works() == [(0, 1, "last"), (1, 4, "last")]
    assert bench.works() == [(0, 1, "last"), (1, 1, "last")]


def test_a_long_prompt_runs_in_chunks_and_only_the_last_has_logits() -> None:
    bench = Bench(max_tokens=7)
    decoder = bench.add(prompt=16, new=1)
    assert [bench.works() for _ in range(3)] == [[(0, 7, "none")], [(0, 7, "none")], [(0, 2, "last")]]
    assert decoder.rows == [0.0]


def test_rows_of_a_chunk_with_all_logits_stay_within_their_limit() -> None:
    bench = Bench(max_tokens=50, max_rows=6)
    decoder = bench.add(prompt=16, new=0, logits="all")
    assert [bench.works() for _ in range(3)] == [[(0, 6, "all")], [(0, 6, "all")], [(0, 4, "all")]]
    assert decoder.rows == [*range(6), *range(6), *range(4)]


def test_every_decoder_gets_its_own_rows() -> None:
    bench = Bench()
    first, second, third = bench.add(2, 2), bench.add(5, 0, "all"), bench.add(1, 2)
    bench.step()
    assert (first.rows, second.rows, third.rows) == ([0.0], [1.0, 2.0, 3.0, 4.0, 5.0], [6.0])


def test_no_step_runs_more_tokens_than_the_budget() -> None:
    bench = Bench(max_tokens=5)
    for prompt in (3, 4, 1, 9, 2):
        bench.add(prompt, new=6)
    while bench.scheduler.has_work:
        works = bench.works()
        assert 0 < sum(tokens for _, tokens, _ in works) <= 5
    assert all(len(decoder.rows) == 7 for decoder in bench.decoders)


def test_a_request_waits_for_its_longest_length_and_keeps_the_order() -> None:
    """Three pages: the first takes two; the second needs two and waits; the third would fit but came later."""
    bench = Bench(num_pages=3)
    bench.add(prompt=1, new=7)
    bench.add(prompt=1, new=6)
    bench.add(prompt=1, new=1)
    for _ in range(8):
        assert [request for request, _, _ in bench.works()] == [0]
    assert [request for request, _, _ in bench.works()] == [1, 2]


def test_a_request_that_no_pool_would_hold_fails_at_once_and_blocks_nobody() -> None:
    bench = Bench(num_pages=3)
    bench.add(prompt=2, new=6)
    impossible = bench.add(prompt=2, new=11)
    bench.add(prompt=1, new=1)
    works, events = bench.step()
    assert [request for request, _, _ in works] == [0, 2]
    assert isinstance(events[0], FinishedEvent)
    assert isinstance(events[0].error, OutOfPages)
    assert (events[0].reason, events[0].request_id) == ("error", 1)
    assert impossible.closed == 1


def test_a_request_fails_rather_than_wait_for_pages_that_nobody_here_holds() -> None:
    bench = Bench(num_pages=3)
    elsewhere = Sequence(bench.pool, range(8))
    elsewhere.grow(8)
    bench.add(prompt=2, new=6)
    works, events = bench.step()
    assert works == []
    assert isinstance(events[0], FinishedEvent)
    assert isinstance(events[0].error, OutOfPages)
    assert not bench.scheduler.has_work


def test_a_running_request_without_pages_fails_alone() -> None:
    """Its caller gave its reserved pages back, and somebody else took them."""
    bench = Bench(num_pages=3)
    first, second = bench.add(prompt=2, new=4), bench.add(prompt=1, new=3)
    bench.step()
    first.sequence.free()
    elsewhere = Sequence(bench.pool, range(8))
    elsewhere.grow(8)
    works, events = bench.step()
    assert [request for request, _, _ in works] == [1]
    failure = events[0]
    assert isinstance(failure, FinishedEvent)
    assert (failure.request_id, type(failure.error)) == (0, OutOfPages)
    assert (first.closed, second.closed) == (1, 0)
    while bench.scheduler.has_work:
        bench.step()
    assert second.sequence.page_table == []
    assert len(second.rows) == 4


def test_a_decoder_that_cannot_plan_fails_alone() -> None:
    bench = Bench()
    bench.add(2, 5).broken = True
    bench.add(2, 5)
    later = bench.add(2, 5)
    works, events = bench.step()
    assert [request for request, _, _ in works] == [1, 2]
    assert [e.request_id for e in events if isinstance(e, FinishedEvent)] == [0]
    later.broken = True
    works, events = bench.step()
    assert [request for request, _, _ in works] == [1]
    assert [e.request_id for e in events if isinstance(e, FinishedEvent)] == [2]


@pytest.mark.parametrize("when", [0, 1], ids=["at the start", "later"])
def test_a_decoder_without_work_fails_rather_than_hang(when: int) -> None:
    bench = Bench()
    idle = bench.add(2, 5)
    bench.add(2, 5)
    for _ in range(when):
        bench.step()
    idle.idle = True
    works, events = bench.step()
    assert [request for request, _, _ in works] == [1]
    assert isinstance(events[0], FinishedEvent)
    assert isinstance(events[0].error, RequestFailed)
    assert idle.closed == 1


@pytest.mark.parametrize("running", [False, True], ids=["waiting", "running"])
def test_removal_frees_pages_at_once_and_only_once(running: bool) -> None:
    bench = Bench(max_running=1)
    bench.add(2, 5)
    bench.add(2, 5)
    bench.step()
    request = 0 if running else 1
    assert bench.scheduler.remove(request)
    assert not bench.scheduler.remove(request)
    assert bench.decoders[request].closed == 1
    assert [r.id for r in bench.scheduler] == [1 - request]
    assert (bench.pool.num_free == 100) is running


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert Bench().scheduler.plan() == (Plan(), [])
