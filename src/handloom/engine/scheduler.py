"""Who runs how many tokens in the next step.

Requests are ordered by priority, then by arrival. In this order they are given the tokens of a step and pages of the
cache; in the reverse order pages are taken back.

A request starts when there are pages for all that it has to compute, and one more for each request that runs already.
If there are plenty, it also reserves pages for its longest possible length, so that its pages lie side by side; such
reserves are the first to be taken back. When that is not enough, the last running request is preempted: it gives all
its pages back and waits at the head of its priority. Its K and V go to host memory as long as a limit leaves room, and
are computed again from the tokens otherwise. So the first request in the order always makes progress. A request fails
for lack of pages only if it would not fit the whole pool, or if it runs alone and somebody else holds the rest.

K and V that the model would not make of the tokens (edited, evicted, patched, read from a file) cannot be computed
again. A request that has such is preempted only if host memory has room for them. If nobody can go on because of that,
the last of these requests fails.

A paused request gets no work, and gives up its place and its pages to any request that is not paused.

Requests that begin with the same tokens share pages. One that starts takes over the pages that are cached; it waits to
start while a request before it is computing the very page that it needs next.

This module does not know models, how tokens are chosen, or how a request's options were resolved.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Container, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Decoder, Event, FinishedEvent
from handloom.decoding.healing import HealingDecoder
from handloom.decoding.sample import Choosing, Logits, Ready, SampleDecoder, advance_together
from handloom.engine.events import Journal
from handloom.engine.guarded import events_of, works_of
from handloom.errors import HandloomError, OutOfPages, RequestFailed
from handloom.sampling.sampler import choose

NO_ERRORS: Mapping[int, HandloomError] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class Request:
    """One request in flight. Ids rise with arrival; a higher priority comes first."""

    id: int
    decoder: Decoder
    priority: int = 0
    running: bool = False
    prefilling: bool = False  # it has not computed all the tokens it was admitted with
    paused: bool = False  # it gets no work
    over: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the order."""
        return -self.priority, self.id


@dataclass(slots=True)
class Plan:
    """One step's work, and whose it is."""

    works: list[Work] = field(default_factory=list)
    owners: list[Request] = field(default_factory=list)
    sequences: set[Sequence] = field(default_factory=set)
    num_tokens: int = 0


class Scheduler:
    """Waiting and running requests, each in order.

    max_tokens: tokens per step; max_running: requests that hold pages at once; max_rows: rows of logits that one Work
    may ask for in a step; spill_bytes: how much of the pool's K and V may be in host memory at once; sharing: whether
    requests look for pages that others have computed, and offer theirs; choose: chooses the tokens of all requests
    whose decoder is a SampleDecoder, together.
    """

    def __init__(
        self, pool: PagePool, *, max_tokens: int, max_running: int, max_rows: int, spill_bytes: int = 0
    ) -> None:
        self.pool, self.max_tokens, self.max_running, self.max_rows = pool, max_tokens, max_running, max_rows
        self.spill_bytes = spill_bytes
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.journal = Journal()
        self.sharing = True
        self.choose: Choosing = choose
        self._events: list[Event] = []  # not handed out yet

    def __iter__(self) -> Iterator[Request]:
        return itertools.chain(self.running, self.waiting)

    @property
    def has_work(self) -> bool:
        """Whether there are requests to go on with, or events to hand out."""
        return bool(self._events) or not all(request.paused for request in self)

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=_rank)

    def remove(self, request_id: int) -> bool:
        """Drop a request and free what it holds. False if it is not here (any more)."""
        for request in self:
            if request.id == request_id:
                self.journal.emitted([FinishedEvent("aborted", request_id=request_id)])
                self._drop(request)
                return True
        return False

    # Planning ----------------------------------------------------------------------------------

    def plan(self) -> tuple[Plan, list[Event]]:
        """The next step's work; and the failures of requests that cannot run."""
        plan = Plan()
        may_start, stuck = True, False
        may_run = [request for request in self.running if not request.paused]
        if starting := self._next_to_start(len(may_run)):
            may_run = sorted([*may_run, *starting], key=_rank)
        for request in may_run:
            if plan.num_tokens == self.max_tokens:
                break
            if not request.running and not may_start:
                continue
            try:
                if not request.running and self._waits_for_another(request):
                    may_start = False
                    continue
                self._run(request, plan)
            except HandloomError as error:
                others_run = len(self.running) > request.running
                if isinstance(error, OutOfPages) and others_run and self._fits(request):
                    may_start = False  # it waits, with what it has: until others end, or one before it needs that
                    stuck = True
                else:
                    self._emit(request, [FinishedEvent("error", error=error)])
        if stuck and not plan.works and not self._events:
            self._end_one_that_cannot_yield()
        return plan, self._hand_out()

    def _next_to_start(self, num_running: int) -> list[Request]:
        """Waiting requests for which there are places, in order. Those that are paused give theirs up for them."""
        can_start = (request for request in self.waiting if not request.paused)
        first = list(itertools.islice(can_start, self.max_running - num_running))
        if not first:
            return first
        for request in self.running[::-1]:
            if request.paused and len(self.running) + len(first) > self.max_running and self._can_yield(request):
                self._preempt(request)
        return first[: self.max_running - len(self.running)]

    def _run(self, request: Request, plan: Plan) -> None:
        """Start the request if it waits, and place its work. Raises OutOfPages."""
        while True:
            try:
                if not request.running:
                    self._start(request)
                return self._place(request, plan)
            except OutOfPages:
                if not self._fits(request) or not self._take_back(request):
                    raise

    def _fits(self, request: Request) -> bool:
        """Whether an empty pool would hold the request."""
        return request.decoder.max_length <= self.pool.num_pages * self.pool.page_size

    def _waits_for_another(self, request: Request) -> bool:
        """Whether a request before it is computing a page that it could take over in the next step."""
        before = [o for o in self.running if o.prefilling and not o.paused and o.rank < request.rank]
        if not self.sharing or not before:
            return False
        computing = [sequence for other in before for sequence in other.decoder.sequences]
        return any(
            work.sequence.awaits(other)
            for work in works_of(request.decoder)
            if not work.needs_every_token
            for other in computing
        )

    def _start(self, request: Request) -> None:
        """Take pages for all that it has to compute, and for what may follow if there is plenty.

        Raises OutOfPages, then holding what it held before.
        """
        length = request.decoder.max_length
        if not self._fits(request):
            raise OutOfPages(
                f"the request may grow to {length} tokens, and the KV cache holds {self.pool.num_pages} pages of "
                f"{self.pool.page_size}; ask for fewer max_new_tokens, or load the model with a larger kv_cache_tokens"
            )
        sequences = request.decoder.sequences
        before = [sequence.num_computed for sequence in sequences]
        came_back = any(sequence.spilled is not None for sequence in sequences)
        try:
            if self.sharing:
                self._adopt_prefixes(request)
            self._reserve(sequences, length)
        except OutOfPages:
            for sequence, num_computed in zip(sequences, before, strict=True):
                sequence.forget(min(num_computed, sequence.num_computed))
            raise
        request.running = request.prefilling = True
        self.waiting.remove(request)
        insort(self.running, request, key=_rank)
        self.journal.admitted(
            request.id, sum(map(len, sequences)), sum(s.num_computed for s in sequences), came_back=came_back
        )

    def _adopt_prefixes(self, request: Request) -> None:
        """Take over cached pages, except where something is wanted of every token."""
        for work in works_of(request.decoder):
            if not work.needs_every_token:
                work.sequence.adopt_prefix()

    def _reserve(self, sequences: Seq[Sequence], length: int) -> None:
        """Pages for what is there, one to spare for each request that runs, and those up to `length` if still empty.

        Raises OutOfPages.
        """
        needed, spare = sum(sequence.pages_missing(len(sequence)) for sequence in sequences), len(self.running)
        if spare and needed + spare > self.pool.num_free:
            raise OutOfPages(f"{needed} pages are needed, with {spare} to spare, and {self.pool.num_free} are free")
        wanted = sum(sequence.pages_missing(length) for sequence in sequences)
        for sequence in sequences:
            sequence.grow(length if wanted + spare <= self.pool.num_empty else len(sequence))

    def _place(self, request: Request, plan: Plan) -> None:
        """Put as much of a request's work into the plan as may be in a step.

        Raises OutOfPages, or RequestFailed for a decoder without work, with nothing of the request in the plan.
        """
        works, budget = list[Work](), self.max_tokens - plan.num_tokens
        for work in works_of(request.decoder):
            sequence, pending, logits, hook = work
            num_tokens = min(pending, budget, self.max_rows if logits == "all" else pending)
            if num_tokens <= 0:
                break
            if sequence in plan.sequences:
                raise RequestFailed("another request runs the same sequence in this step; fork it")
            sequence.grow(sequence.num_computed + num_tokens)
            if num_tokens < pending:
                work = Work(sequence, num_tokens, "none" if logits == "last" else logits, hook)
            works.append(work)
            budget -= num_tokens
        if budget > 0 and not works:
            raise RequestFailed("the decoder has not finished and plans no work, so it would never finish")
        for work in works:
            plan.works.append(work)
            plan.owners.append(request)
            plan.sequences.add(work.sequence)
        plan.num_tokens = self.max_tokens - budget

    def _take_back(self, request: Request) -> bool:
        """Free pages for `request`; False if there are none to take. Requests with work in this step's plan lose none.

        First reserves, then the pages of running requests after this one, then those of requests that wait.
        """
        free = self.pool.num_free
        for other in reversed(self.running):
            for sequence in other.decoder.sequences:
                sequence.trim()
            if self.pool.num_free > free:
                return True
        others = [other for other in reversed(self.running) if other is not request]
        for other in sorted(others, key=lambda other: not other.paused):
            if (other.paused or other.rank > request.rank) and self._can_yield(other):
                self._preempt(other)
                return True
        if not self.running or self.running[-1].rank >= request.rank:
            for other in self.waiting:  # sequences that came with pages of their own
                if other is not request:
                    self._take_pages(other)
        return self.pool.num_free > free

    def _can_yield(self, request: Request) -> bool:
        """Whether its pages can be taken: what could not be computed again has room in host memory."""
        return self._has_room(sum(s.num_spillable for s in request.decoder.sequences if s.private))

    def _has_room(self, num_pages: int) -> bool:
        return not num_pages or self.pool.spilled_bytes + num_pages * self.pool.page_bytes <= self.spill_bytes

    def _end_one_that_cannot_yield(self) -> None:
        """Nobody has a page to go on with: end the last request that keeps what others need."""
        for request in reversed(self.running):
            if not self._can_yield(request):
                error = OutOfPages(
                    "all pages are in use, and what this request has in its own cannot be computed again (K and V that "
                    "were edited, patched or restored) nor moved: no more than "
                    f"spill_bytes={self.spill_bytes} may be in host memory. Give the engine more spill_bytes, or load "
                    "the model with a larger kv_cache_tokens"
                )
                self._emit(request, [FinishedEvent("error", error=error)])
                return

    def _preempt(self, request: Request) -> None:
        """Take all pages of a running request, which waits again."""
        num_computed = sum(sequence.num_computed for sequence in request.decoder.sequences)
        self._take_pages(request)
        num_kept = sum(sequence.num_computed for sequence in request.decoder.sequences)
        self.journal.preempted(request.id, num_computed, num_kept)
        request.running = False
        self.running.remove(request)
        self.add(request)

    def _take_pages(self, request: Request) -> None:
        """Free its pages; their content goes to host memory where that has room, what cannot be computed again first.

        Pages that several of its sequences share would come back once for each; so these are computed again.
        """
        sequences = request.decoder.sequences
        for sequence in sorted(sequences, key=lambda sequence: not sequence.private):
            if (sequence.private or len(sequences) == 1) and self._has_room(sequence.num_spillable):
                sequence.spill()
            elif not sequence.private:
                sequence.free()

    def _drop(self, request: Request) -> None:
        (self.running if request.running else self.waiting).remove(request)
        request.over = True
        request.decoder.close()

    # Events ------------------------------------------------------------------------------------

    def _emit(self, request: Request, events: Seq[Event]) -> None:
        """Keep a request's events to be handed out, and let go of it where the last one ends it."""
        for event in events:
            event.request_id = request.id
        self._events += events
        self.journal.emitted(events)
        if events and isinstance(events[-1], FinishedEvent):
            self._drop(request)

    def _hand_out(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def put_back(self, events: Iterable[Event]) -> None:
        """Hand these out first the next time: their step did not come to its end."""
        self._events[:0] = events

    # After the forward pass ----------------------------------------------------------------------

    def advance(self, plan: Plan, logits: Logits, errors: Mapping[int, HandloomError] = NO_ERRORS) -> list[Event]:
        """Mark the plan's tokens as computed and hand every decoder its logits. Returns the events.

        errors: by index of the work, what went wrong while it ran; its request ends with that.
        """
        failed: dict[Request, HandloomError] = {}
        for index, error in errors.items():
            failed.setdefault(plan.owners[index], error)
        rows = self._mark_computed(plan, failed)
        for request, error in failed.items():
            self._emit(request, [FinishedEvent("error", error=error)])
        sampling: list[Request] = []
        ready: list[Ready] = []
        for request, (start, end) in rows.items():
            request.prefilling = request.prefilling and any(s.num_pending for s in request.decoder.sequences)
            if isinstance(request.decoder, SampleDecoder):
                sampling.append(request)
                ready.append(Ready(request.decoder, start, end))
            else:
                assert isinstance(logits, Tensor)
                self._emit(request, events_of(request.decoder, logits[start:end]))
                if isinstance(request.decoder, HealingDecoder) and request.decoder.healed is not None:
                    request.decoder = request.decoder.healed
        if ready:
            for at, events in advance_together(ready, logits, self.choose):
                self._emit(sampling[at], events)
        return self._hand_out()

    def _mark_computed(self, plan: Plan, failed: Container[Request]) -> dict[Request, tuple[int, int]]:
        """Count the tokens that ran, but for those that failed; returns where each request's logits are."""
        rows: dict[Request, tuple[int, int]] = {}
        end = 0
        for work, request in zip(plan.works, plan.owners, strict=True):
            num_rows, sequence = work.num_rows, work.sequence
            start, end = end, end + num_rows
            if request in failed:
                continue
            if request.prefilling:
                self.journal.prefilled(request.id, sequence.num_computed, work.num_tokens)
            sequence.num_computed = min(sequence.num_computed + work.num_tokens, len(sequence.token_ids))
            if self.sharing:
                sequence.publish()
            if num_rows:
                rows[request] = rows.get(request, (start, end))[0], end
        return rows


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
