"""Who runs how many tokens in the next step.

First come, first served, under a budget of tokens per step. A request starts when pages for its
longest possible length are free, and holds them until it ends: it runs out only if the caller forks,
rewinds or lengthens its sequence meanwhile, and then fails alone.
Preemption, priorities and prefix sharing are not here yet.

This module does not know models, how tokens are chosen, or how a request's options were resolved.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.pages import PagePool
from handloom.decoding.decoder import Decoder, Event, FinishedEvent
from handloom.decoding.sample import Ready, SampleDecoder, advance_together
from handloom.errors import HandloomError, OutOfPages, RequestFailed


@dataclass(slots=True, eq=False)
class Request:
    """One request in flight."""

    id: int
    decoder: Decoder


@dataclass(slots=True)
class Plan:
    """One step's work, and whose it is."""

    works: list[Work] = field(default_factory=list)
    owners: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.works)


class Scheduler:
    """Waiting and running requests. max_tokens: tokens per step; max_rows: logits rows per step of one Work."""

    def __init__(self, pool: PagePool, *, max_tokens: int, max_running: int, max_rows: int) -> None:
        self.pool, self.max_tokens, self.max_running, self.max_rows = pool, max_tokens, max_running, max_rows
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return itertools.chain(self.running, self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request_id: int) -> bool:
        """Drop a request and free what it holds. False if it is not here (any more)."""
        for queue in (self.waiting, self.running):
            for request in queue:
                if request.id == request_id:
                    queue.remove(request)
                    request.decoder.close()
                    return True
        return False

    def plan(self) -> tuple[Plan, list[Event]]:
        """The next step's work; and the failures of requests that cannot run, for lack of pages above all."""
        plan, budget = Plan(), self.max_tokens
        failed: list[Event] = []
        for request in tuple(self.running):
            try:
                budget = self._place(request, plan, budget)
            except HandloomError as error:
                failed.append(self._fail(request, error))
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            request = self.waiting[0]
            try:
                self._admit(request)
                budget = self._place(request, plan, budget)
            except HandloomError as error:
                if isinstance(error, OutOfPages) and self.running and self._may_fit(request):
                    break
                failed.append(self._fail(request, error))
                continue
            self.running.append(self.waiting.popleft())
        return plan, failed

    def _admit(self, request: Request) -> None:
        """Take the pages the request may need. Raises OutOfPages."""
        for work in request.decoder.plan():
            work.sequence.grow(request.decoder.max_length)

    def _may_fit(self, request: Request) -> bool:
        """Whether an empty pool would hold the request."""
        return request.decoder.max_length <= self.pool.num_pages * self.pool.page_size

    def _fail(self, request: Request, error: HandloomError) -> Event:
        self.remove(request.id)
        return FinishedEvent("error", error=error, request_id=request.id)

    def _place(self, request: Request, plan: Plan, budget: int) -> int:
        """Put as much of a request's work into the plan as the budget allows; returns what is left of it.

        Raises OutOfPages, or RequestFailed for a decoder without work, with nothing of the request in the plan.
        """
        works: list[Work] = []
        for sequence, pending, logits in request.decoder.plan():
            num_tokens = min(pending, budget, self.max_rows if logits == "all" else pending)
            if num_tokens <= 0:
                break
            sequence.grow(sequence.num_computed + num_tokens)
            wanted = "none" if num_tokens < pending and logits == "last" else logits
            works.append(Work(sequence, num_tokens, wanted))
            budget -= num_tokens
        if budget > 0 and not works:
            raise RequestFailed("the decoder has not finished and plans no work, so it would never finish")
        plan.works += works
        plan.owners += [request] * len(works)
        return budget

    def advance(self, plan: Plan, logits: Tensor) -> list[Event]:
        """Mark the plan's tokens as computed and hand every decoder its logits. Returns the events."""
        spans: dict[Request, list[int]] = {}
        at = 0
        for work, request in zip(plan.works, plan.owners, strict=True):
            work.sequence.num_computed += work.num_tokens
            if work.num_rows:
                spans.setdefault(request, [at, at])[1] = at + work.num_rows
                at += work.num_rows
        sampling = [r for r in spans if isinstance(r.decoder, SampleDecoder)]
        ready = [Ready(r.decoder, *spans[r]) for r in sampling if isinstance(r.decoder, SampleDecoder)]
        results = dict(zip(sampling, advance_together(ready, logits), strict=True)) if ready else {}
        for request, (start, end) in spans.items():
            if request not in results:
                results[request] = request.decoder.advance(logits[start:end])
        events: list[Event] = []
        for request, own in results.items():
            for event in own:
                event.request_id = request.id
                events.append(event)
            if own and isinstance(own[-1], FinishedEvent):
                self.running.remove(request)
                request.decoder.close()
        return events
