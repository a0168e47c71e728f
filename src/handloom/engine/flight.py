"""Decode steps that the device makes by itself, and the host reads one step late.

A step in which every request has one token to run is queued as a captured step (`graphs`). The next one, of the same
requests, is queued before its tokens are read, and so on: the device never waits for the host.

    queue     n     n+1     n+2
    device    |--n--|--n+1--|--n+2--|
    host             read n  read n+1          what the tokens of n mean is known when n+1 is on its way

The host's sequences are the truth: they learn a token when it is read. A step that was queued on the belief that a
request goes on is thrown away for one that turns out to be over, aborted or paused; what it wrote lies where nobody
reads, and is written again, the same, if the request goes on: draws are keyed by position.

As soon as the next step may not be that of the same requests (one came, one ended and others wait, pages ran out, a
hook was opened), no further step is queued; what is queued is read, and the scheduler plans as ever.

This module does not know kernels, or how a step is captured.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass

import torch

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Event
from handloom.decoding.sample import SampleDecoder
from handloom.engine.decode_step import NOWHERE, DecodeRow, DecodeStep
from handloom.engine.graphs import DecodeGraphs, Way, bucket_of
from handloom.engine.memory import memory_report
from handloom.engine.scheduler import Plan, Request, Scheduler
from handloom.engine.stream import Step, Wait
from handloom.errors import OutOfPages
from handloom.model.hooks import Hooks
from handloom.sampling.on_device import DeviceChoice, cuts, needs_host, values_of
from handloom.sampling.params import GenerationParams
from handloom.sampling.sampler import Choice

logger = logging.getLogger("handloom")


@dataclass(slots=True, eq=False)
class Row:
    """A request in flight. num_computed: of its tokens, once all that is queued has run; end: where its length ends it;
    page: which the last step queued writes to."""

    request: Request
    sequence: Sequence
    params: GenerationParams
    num_computed: int
    end: int
    page: int = NOWHERE


@dataclass(slots=True)
class Queued:
    """A step on its way. rows: (place, row, which of its tokens this step runs, page)."""

    wait: Wait
    rows: list[tuple[int, Row, int, int]]


class Pilot:
    """Flies an engine's decode steps. outside: how many steps ran otherwise, by reason; num_steps: how many did not."""

    def __init__(self, graphs: DecodeGraphs, scheduler: Scheduler, hooks: Hooks) -> None:
        self.graphs, self.scheduler, self.hooks = graphs, scheduler, hooks
        scheduler.choose = DeviceChoice(graphs.transformer.backend.chooser)
        self.outside: Counter[str] = Counter()
        self.num_steps = 0
        self.disturbed = False  # set from outside: what the scheduler would plan may have changed
        self._rows: list[Row | None] = []
        self._queued: deque[Queued] = deque()
        self._without_tokens: set[int] = set()  # requests that had none to choose: the host says why
        self._step: DecodeStep
        self._launch_step: Step
        self._depth = 0  # steps to have queued before one is read
        self._others_wait = False
        self._num_free = 0

    @property
    def flying(self) -> bool:
        return bool(self._queued)

    def take_off(self, plan: Plan) -> bool:
        """Queue a plan's step. False if it has to run otherwise; where that is not for a prompt, `outside` says why."""
        if not all(_is_decode(work) for work in plan.works):
            return False
        reason = self._reason(plan)
        if reason is None:
            rows = [_row(request, work) for request, work in zip(plan.owners, plan.works, strict=True)]
            ready = self._ready(rows)
            if not isinstance(ready, str):
                self._step, self._launch_step = ready
                self._begin(rows)
                return True
            reason = ready
        if reason not in self.outside:
            logger.info("decode steps run kernel by kernel, and wait for the host: %s", reason)
        self.outside[reason] += 1
        return False

    def go_on(self) -> list[Event]:
        """Queue what is to be queued and read the oldest step. No events: the flight is over."""
        events: list[Event] = []
        if self.hooks:  # they are to see the tokens that are on their way
            self.land()
        try:
            while self.flying and not events:
                self._queue()
                events = self._read()
        except BaseException:
            self.land()
            raise
        if not self.flying or all(row is None for row in self._rows):
            self.land()
        return events

    def _queue(self) -> None:
        """Queue as many steps as may be; where there is no memory for one, the flight ends with those that are."""
        try:
            while self._may_launch() and self._launch():
                pass
        except torch.OutOfMemoryError as error:
            self._depth = 0
            graphs = self.graphs
            report = memory_report(graphs.transformer, graphs.pool, graphs.nbytes)
            why = str(error).partition("\n")[0][:200]
            logger.warning("no memory to queue a step before the last is read; it waits. %s. %s", report, why)

    def land(self) -> None:
        """End the flight; what is queued is waited for, and thrown away."""
        self._depth = 0
        while self._queued:
            self._queued.popleft().wait()
        self._rows = []
        self.graphs.give_back()

    def free_memory(self) -> int:
        """Give up what was captured, unless another engine is using it; returns the bytes still held for steps."""
        if self.graphs.take(self):
            self.graphs.drop()
            self.graphs.give_back()
        return self.graphs.nbytes

    # Taking off ----------------------------------------------------------------------------------

    def _reason(self, plan: Plan) -> str | None:
        """Why this step cannot be a captured one."""
        if self.hooks:
            return "hooks are open"
        for request, work in zip(plan.owners, plan.works, strict=True):
            if type(request.decoder) is not SampleDecoder:
                return f"a request decodes by {type(request.decoder).__name__}"
            if work.hook is not None:
                return "a request has a hook of its own"
            if request.id in self._without_tokens:
                self._without_tokens.discard(request.id)
                return "a request had no token to choose"
            reason = needs_host(request.decoder.params, request.decoder.rules)
            if reason is not None:
                return reason
        return None

    def _ready(self, rows: list[Row]) -> tuple[DecodeStep, Step] | str:
        params = [row.params for row in rows]
        way = Way(drawn=any(p.do_sample for p in params), cut=any(cuts(values_of(p)) for p in params))
        if len(rows) > self.graphs.max_rows:
            return f"captured steps have at most {self.graphs.max_rows} rows"
        if not self.graphs.take(self):
            return "another engine of this model is decoding"
        page_size = self.scheduler.pool.page_size
        most = max(row.num_computed + 1 - row.sequence.num_evicted for row in rows)
        ready = self.graphs.ready(len(rows), most // page_size + 1, way)
        if ready is None:
            self.graphs.give_back()
            return f"there was no memory to capture steps of more than {self.graphs.max_rows} rows"
        return ready

    def _begin(self, rows: list[Row]) -> None:
        own = all(row.request.decoder.owns_sequence for row in rows if isinstance(row.request.decoder, SampleDecoder))
        self._depth = 2 if own else 1  # the caller may look at, and change, a sequence of theirs after every step
        self.disturbed = False
        for row in rows:
            if self.scheduler.sharing:
                row.sequence.publish()  # so that, while in flight, no more than the page it fills becomes another
        for values, into in self._step.beginning([_begun(row) for row in rows]):
            self.graphs.stream.upload(values, into)
        self._rows = [*rows]
        self._others_wait = sum(not request.paused for request in self.scheduler) > len(rows)
        self._launch()

    # In flight -----------------------------------------------------------------------------------

    def _may_launch(self) -> bool:
        if len(self._queued) >= self._depth or self.disturbed:
            return False
        return not self._others_wait or self.scheduler.pool.num_free <= self._num_free

    def _launch(self) -> bool:
        """Queue a step of all rows that go on. False where there is none, or no page for one: no more is queued."""
        pages, rows = [NOWHERE] * self._step.rows, []
        try:
            for place, row in enumerate(self._rows):
                if row is not None and (row.num_computed + 1 < row.end or not self._queued):
                    pages[place] = row.page = self._page(row)
                    rows.append((place, row, row.num_computed, row.page))
        except OutOfPages:
            rows = []
        if not rows or (self._queued and 2 * bucket_of(len(rows)) <= self._step.rows):
            self._depth = 0
            return False
        for _, row, _, _ in rows:
            row.num_computed += 1
        self.graphs.stream.upload(torch.tensor(pages, device="cpu"), self._step.pages)
        self._launch_step()
        self._queued.append(Queued(self.graphs.stream.fetch(self._step.out), rows))
        self._num_free = self.scheduler.pool.num_free
        self.num_steps += 1
        if self._depth == 1:
            self._depth = 0
        return True

    def _page(self, row: Row) -> int:
        """The page that the row's next token goes to. Raises OutOfPages, also where the tables are too narrow."""
        sequence, page_size = row.sequence, self.scheduler.pool.page_size
        place = row.num_computed - sequence.num_evicted
        index = place // page_size
        if index >= self._step.width:
            raise OutOfPages(f"{index} pages do not fit {self._step.width}")
        if row.page == NOWHERE or place % page_size == 0:
            sequence.grow(row.num_computed + 1)
        return sequence.page_table[index]

    def _read(self) -> list[Event]:
        """Wait for the oldest step, and let the requests that it still concerns know their tokens."""
        step = self._queued.popleft()
        values = step.wait()
        token_ids, logprobs = values[0].long().tolist(), values[1].tolist()
        plan, places, read = Plan(), [], []
        for place, row, at, page in step.rows:
            request, sequence = row.request, row.sequence
            if request.over or request.paused or self._rows[place] is not row:
                self._leaves(place)
            elif token_ids[place] < 0:
                self._without_tokens.add(request.id)
                self._leaves(place)
            else:
                plan.works.append(Work(sequence, 1, "last"))
                plan.owners.append(request)
                places.append(place)
                read.append((place, row, at, page))
        if not places:
            return []
        events = self.scheduler.advance(plan, _choice(token_ids, logprobs, places, plan.owners))
        self.scheduler.journal.stepped(len(places))
        self._settle(read)
        return events

    def _settle(self, read: list[tuple[int, Row, int, int]]) -> None:
        """Rows of requests that are over leave. Where `publish` has exchanged a page for an equal one, the device's
        tables are out of date, and no further step is queued."""
        page_size = self.scheduler.pool.page_size
        for place, row, at, page in read:
            if row.request.over:
                self._leaves(place)
            elif row.sequence.page_table[(at - row.sequence.num_evicted) // page_size] != page:
                self._depth = 0

    def _leaves(self, place: int) -> None:
        self._rows[place] = None
        if self._others_wait or all(row is None for row in self._rows):
            self._depth = 0


def _is_decode(work: Work) -> bool:
    """Whether it is the one token of its sequence that is pending, and has an id."""
    sequence = work.sequence
    return sequence.num_pending == 1 and work.logits == "last" and sequence.num_computed >= sequence.num_embeddings


def _row(request: Request, work: Work) -> Row:
    decoder = request.decoder
    assert isinstance(decoder, SampleDecoder)
    return Row(request, work.sequence, decoder.params, work.sequence.num_computed, decoder.max_length)


def _begun(row: Row) -> DecodeRow:
    sequence = row.sequence
    temperature, top_k, top_p, min_p = values_of(row.params)
    return DecodeRow(
        token_id=sequence.token_ids[-1],
        position=row.num_computed,
        page_table=sequence.page_table,
        context_len=row.num_computed + 1 - sequence.num_evicted,
        seed=row.params.seed,
        counter=len(sequence) - sequence.num_embeddings,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )


def _choice(token_ids: list[int], logprobs: list[float], places: list[int], owners: list[Request]) -> Choice:
    """What was chosen for the rows at these places, as the host would have chosen it."""
    asked = [isinstance(o.decoder, SampleDecoder) and o.decoder.params.logprobs is not None for o in owners]
    pairs = list(zip(places, asked, strict=True))
    return Choice(
        [token_ids[place] for place in places],
        [logprobs[place] if wanted else None for place, wanted in pairs],
        [[] if wanted else None for wanted in asked],
        [None] * len(places),
        [None] * len(places),
        [None] * len(places),
    )
