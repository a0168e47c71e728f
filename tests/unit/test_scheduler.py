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

    @property
    def sequences(self) -> Seq[Sequence]:
        return (self.sequence,)

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
        self.scheduler.sharing = False  # the prompts are alike, and these tests are about something else
        self.decoders: list[Counting] = []

    def add(
        self, prompt: int, new: int, logits: Literal["none", "last", "all"] = "last", *, priority: int = 0
    ) -> Counting:
        self.decoders.append(Counting(self.pool, prompt, new, logits))
        self.scheduler.add(Request(len(self.decoders) - 1, self.decoders[-1], priority))
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


# Pages -----------------------------------------------------------------------------------------------


def test_a_request_starts_when_there_are_pages_for_what_it_has_to_compute_and_one_more_for_each_that_runs() -> None:
    """Six pages, two of them taken by the first; the second needs three."""
    bench = Bench(num_pages=6)
    bench.add(prompt=5, new=11)
    bench.add(prompt=12, new=8)
    assert bench.works() == [(0, 5, "last"), (1, 12, "last")]
    bench = Bench(num_pages=5)
    bench.add(prompt=5, new=11)
    bench.add(prompt=12, new=8)
    bench.add(prompt=1, new=1)
    assert bench.works() == [(0, 5, "last")], "the third would fit, but came later"


def test_with_plenty_of_pages_a_sequence_lies_in_one_piece() -> None:
    bench = Bench(num_pages=100)
    decoders = [bench.add(prompt=3 + i, new=20) for i in range(4)]
    for _ in range(20):
        bench.step()
    for decoder in decoders:
        first = decoder.sequence.page_table[0]
        assert decoder.sequence.page_table == list(range(first, first + len(decoder.sequence.page_table)))


def test_pages_taken_ahead_go_back_before_anybody_is_stopped() -> None:
    bench = Bench(num_pages=8)
    ahead = bench.add(prompt=1, new=27)
    bench.step()
    assert len(ahead.sequence.page_table) == 7
    bench.add(prompt=12, new=4)
    assert bench.works() == [(0, 1, "last"), (1, 12, "last")]
    assert len(ahead.sequence.page_table) == 1


def test_the_last_request_stops_when_pages_run_out_and_nobody_starts_in_that_step() -> None:
    """Four pages of four: both take two, and the first needs a third."""
    bench = Bench(num_pages=4)
    first, second = bench.add(prompt=5, new=7), bench.add(prompt=4, new=7)
    steps = []
    while bench.scheduler.has_work:
        steps.append(bench.works())
    both = [(0, 1, "last"), (1, 1, "last")]
    assert steps[:4] == [[(0, 5, "last"), (1, 4, "last")], both, both, both]
    assert steps[4:8] == [[(0, 1, "last")]] * 4
    assert steps[8:] == [[(1, 8, "last")]] + [[(1, 1, "last")]] * 3
    assert (len(first.rows), len(second.rows)) == (8, 8)
    assert bench.pool.num_free == 4


def test_the_last_request_keeps_what_it_has_while_nobody_before_it_needs_that() -> None:
    """Six pages: the first ends with two, the second has four after its 16th token and stands still until then."""
    bench = Bench(num_pages=6)
    bench.add(prompt=1, new=7)
    bench.add(prompt=11, new=9)
    steps = [bench.works() for _ in range(9)]
    assert steps[0] == [(0, 1, "last"), (1, 11, "last")]
    assert steps[6:] == [[(0, 1, "last")], [(0, 1, "last")], [(1, 1, "last")]]


def test_a_request_that_waits_holds_nothing_it_took_in_vain() -> None:
    bench = Bench(num_pages=4)
    bench.add(prompt=8, new=4)
    waiting = bench.add(prompt=9, new=1)
    assert bench.works() == [(0, 8, "last")]
    assert waiting.sequence.page_table == []


def test_a_higher_priority_takes_tokens_and_pages_first() -> None:
    bench = Bench(num_pages=4, max_tokens=8)
    low = bench.add(prompt=8, new=4)
    assert bench.works() == [(0, 8, "last")]
    bench.add(prompt=9, new=1, priority=1)
    assert bench.works() == [(1, 8, "none")]
    assert low.sequence.page_table == []
    assert [bench.works() for _ in range(4)] == [[(1, 1, "last")], [(1, 1, "last")], [(0, 8, "none")], [(0, 1, "last")]]


def test_a_higher_priority_comes_first_in_the_budget_without_stopping_the_others() -> None:
    bench = Bench(max_tokens=6)
    bench.add(prompt=20, new=1)
    bench.step()
    bench.add(prompt=8, new=0, priority=1)
    assert bench.works() == [(1, 6, "none")]
    assert bench.works() == [(1, 2, "last"), (0, 4, "none")]


def test_a_running_request_is_not_stopped_for_a_place_only_for_pages() -> None:
    bench = Bench(max_running=1)
    bench.add(prompt=2, new=1)
    bench.step()
    bench.add(prompt=2, new=0, priority=9)
    assert [bench.works() for _ in range(2)] == [[(0, 1, "last")], [(1, 2, "last")]]


def test_a_request_alone_fails_when_others_than_the_scheduler_hold_the_rest() -> None:
    """It runs as far as the one page that is left; then nobody can give it another."""
    bench = Bench(num_pages=3)
    elsewhere = Sequence(bench.pool, range(8))
    elsewhere.grow(8)
    bench.add(prompt=2, new=6)
    for _ in range(3):
        assert len(bench.works()) == 1
    works, events = bench.step()
    assert works == []
    assert isinstance(events[0], FinishedEvent)
    assert isinstance(events[0].error, OutOfPages)
    assert not bench.scheduler.has_work
    assert bench.pool.num_free == 1


def test_a_running_request_whose_pages_were_taken_elsewhere_goes_on_with_those_of_the_last() -> None:
    bench = Bench(num_pages=3)
    first, second = bench.add(prompt=2, new=1), bench.add(prompt=1, new=2)
    bench.step()
    first.sequence.free()
    elsewhere = Sequence(bench.pool, range(8))
    elsewhere.grow(8)
    assert bench.works() == [(0, 3, "last")]
    assert second.sequence.page_table == []
    while bench.scheduler.has_work:
        bench.step()
    assert (len(first.rows), len(second.rows)) == (2, 3)
    assert bench.pool.num_free == 1
