"""The engine: requests in, events out, one step at a time.

This module does not know chat, the Hub, files, or how results are shown.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Decoder, Event, FinishedEvent
from handloom.decoding.modes import RequestDecoder
from handloom.decoding.sample import SampleDecoder
from handloom.decoding.speculative import Speculator
from handloom.engine.events import EngineEvent, EngineStats
from handloom.engine.flight import Pilot
from handloom.engine.guarded import Custom, Guarded
from handloom.engine.memory import StepSize, memory_report
from handloom.engine.model import Model
from handloom.engine.prepare import guarded, prepare
from handloom.engine.runner import Runner
from handloom.engine.scheduler import Request, Scheduler
from handloom.errors import EngineError, InvalidParam, InvalidPrompt
from handloom.one_process import OneProcess

MAX_STEP_TOKENS = 512
MAX_LOGITS_BYTES = 128 << 20


class Engine(OneProcess, instead="make another, of a model of its process"):
    """Continuous generation for many requests over one model.

    Args:
        max_step_tokens: most tokens in one forward pass; longer prompts run in chunks.
        max_running: most requests in flight at once; the others wait.
        prefix_cache: whether prompts that begin with the same tokens share the pages of these.
        spill_bytes: most bytes of K and V kept in host memory for requests that had to give up their pages; by default
            as many as the whole cache has. What does not fit is computed again, except for edited sequences, whose K
            and V cannot be: such a request keeps its pages. If then nobody can go on, it ends with OutOfPages, its
            sequence and the edits untouched.

    Every method may be called from any thread. One thread steps at a time, and others that call `step` wait for it. No
    other method waits: what it asks for while a step runs is done when that step ends. Each event is returned once, to
    the caller of the step that it came from. A request's tokens do not depend on the threads (except with rng="torch",
    whose generator is shared). A sequence of the caller's belongs to its request until that is over. What the caller
    gives to run inside a step (processors, criteria, hooks, decoders) may call anything here except `step`.

    When a step raises (out of memory, a bug), no request is lost: step again, abort, or close. Raises InvalidParam.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_step_tokens: int = MAX_STEP_TOKENS,
        max_running: int = 256,
        prefix_cache: bool = True,
        spill_bytes: int | None = None,
    ) -> None:
        if not all(type(limit) is int and limit > 0 for limit in (max_step_tokens, max_running)):
            raise InvalidParam(f"{max_step_tokens=}, {max_running=}: both must be 1 or more, and integers")
        if spill_bytes is None:
            spill_bytes = model.pool.num_pages * model.pool.page_bytes
        if isinstance(spill_bytes, bool) or not isinstance(spill_bytes, int) or spill_bytes < 0:
            raise InvalidParam(f"spill_bytes is {spill_bytes!r}; expected an integer from 0")
        self.model, self.prefix_cache = model, prefix_cache
        self.runner = Runner(model.transformer, model.pool, model.hooks)
        row_bytes = 4 * model.transformer.spec.vocab_size
        self.scheduler = Scheduler(
            model.pool,
            max_tokens=max_step_tokens,
            max_running=max_running,
            max_rows=max(1, MAX_LOGITS_BYTES // row_bytes),
            spill_bytes=spill_bytes,
        )
        self.pilot = None if model.graphs is None else Pilot(model.graphs, self.scheduler, model.hooks)
        self.speculator = Speculator()
        self._step_size = StepSize(max_step_tokens)
        self._ids = itertools.count()
        self._stepping = threading.Lock()  # held while the scheduler is worked on
        self._stepper: int | None = None  # the thread that steps
        self._door = threading.RLock()  # held for moments only; guards the four below
        self._alive: dict[int, Request] = {}
        self._arrived: deque[Request] = deque()
        self._leaving: deque[Request] = deque()
        self._pausing: deque[tuple[Request, bool]] = deque()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: there is a request that is not paused."""
        return self._is_asked or self.scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Requests that do not run: not yet, or not at the moment."""
        return len(self.scheduler.waiting) + len(self._arrived)

    @property
    def _is_asked(self) -> bool:
        return bool(self._arrived or self._leaving or self._pausing)

    def prepare(self, prompt: Any, options: dict[str, Any], *, cache_salt: str = "") -> RequestDecoder | Custom:
        """The decoder of a request, checked and not queued yet. Arguments and errors are those of `add_request`."""
        return prepare(self.model, prompt, options, cache_salt)

    def add_request(self, prompt: Any, /, *, priority: int = 0, cache_salt: str = "", **options: Any) -> int:
        """Queue a prompt (text, token ids, embeddings [n, hidden_size], or a Sequence of the cache).

        A higher priority comes first; among equals, who came first. Only requests with the same cache_salt share cached
        pages, so that nobody can time what others have asked. Returns the request id its events carry.
        A Sequence stays the caller's: it receives the new tokens, and keeps its pages when the request ends. While the
        request runs, its pages may be lent to others; their content then comes back from host memory or is computed
        again. Forks of it keep their own pages.
        Raises InvalidPrompt, ContextOverflow, InvalidParam, UnsupportedOption.
        """
        return self.add(self.prepare(prompt, options, cache_salt=cache_salt), priority=priority)

    def add(self, decoder: Decoder, *, priority: int = 0) -> int:
        """Queue a decoder of any mode, or one of your own (see `handloom.engine.guarded`); returns its request id.

        Raises InvalidParam, InvalidPrompt for a sequence of the caller's that another request has, RequestFailed for
        a decoder that does not say its sequences.
        """
        decoder = guarded(self.model, decoder)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidParam(f"priority is {priority!r}; expected an integer, where higher comes first")
        with self._door:
            theirs = _borrowed(decoder)
            others = (*self._alive.values(), *self._leaving) if theirs is not None else ()
            if any(not request.over and _borrowed(request.decoder) is theirs for request in others):
                raise InvalidPrompt("the sequence is in use by another request of this engine; fork it")
            request = Request(next(self._ids), decoder, priority)
            self._alive[request.id] = request
            self._arrived.append(request)
        self._settle()
        return request.id

    def abort(self, request_id: int) -> bool:
        """End a request and free its pages: now, or where a step is running, when it ends. False if it is already over.

        No step gives events of it any more, except the one that is running.
        """
        with self._door:
            request = self._alive.pop(request_id, None)
            if request is None or request.over:
                return False
            self._leaving.append(request)
        self._settle()
        return True

    def pause(self, request_id: int) -> bool:
        """Give a request no more steps until `resume`; False if it is over.

        It keeps its place and its pages as long as no other request wants them, and goes on with the same tokens. A
        step that is running may still give events of it.
        """
        return self._pause(request_id, True)

    def resume(self, request_id: int) -> bool:
        """Let a paused request go on; False if it is over."""
        return self._pause(request_id, False)

    def _pause(self, request_id: int, paused: bool) -> bool:
        with self._door:
            request = self._alive.get(request_id)
            if request is None or request.over:
                return False
            self._pausing.append((request, paused))
        self._settle()
        return True

    def step(self) -> list[Event]:
        """Run one step: plan, forward, choose, advance. Returns the events; nothing to do gives none.

        Raises EngineError if called from inside a step, and what the forward pass raises.
        """
        if self._stepper == threading.get_ident():
            raise EngineError("a step is running, and this was called from inside it: call it after the step")
        try:
            with self._stepping:
                self._stepper = threading.get_ident()
                try:
                    return self._step()
                finally:
                    self._stepper = None
        finally:
            self._settle()

    def _step(self) -> list[Event]:
        self._take_over()
        self.scheduler.sharing = self.prefix_cache and not self.model.hooks  # a hook would miss what is cached
        events = self.pilot.go_on() if self.pilot is not None and self.pilot.flying else []
        events = events or self._planned_step()
        with self._door:
            for event in events:
                if isinstance(event, FinishedEvent):
                    self._alive.pop(event.request_id, None)
        return events

    def _planned_step(self) -> list[Event]:
        running = [request.decoder for request in self.scheduler.running if not request.paused]
        room = min(self.scheduler.max_tokens, self.scheduler.max_rows)
        self.speculator.draft(running, room if not self.model.hooks else 0)  # hooks would see wrong drafts too
        with self.model.pool.lock:
            plan, events = self.scheduler.plan()
        if not plan.works:
            return events
        try:
            if self.pilot is not None and self.pilot.take_off(plan):
                return [*events, *self.pilot.go_on()] or self._planned_step()
            logits, errors = self.runner.run(plan.works)
            events = [*events, *self.scheduler.advance(plan, logits, errors)]
        except torch.OutOfMemoryError as error:
            self.scheduler.put_back(events)
            held = 0 if self.pilot is None else self.pilot.free_memory()
            report = memory_report(self.model.transformer, self.model.pool, held)
            self._step_size.shrink(plan.num_tokens, report, error)
            self.scheduler.max_tokens = self._step_size.now
            return self._planned_step()
        except BaseException:
            self.scheduler.put_back(events)
            raise
        self._step_size.ran()
        self.scheduler.max_tokens = self._step_size.now
        self.scheduler.journal.stepped(plan.num_tokens)
        self.speculator.ran(plan.num_tokens)
        return events

    def _settle(self) -> None:
        """Do what was asked meanwhile, unless a step is running: whoever runs it does so at its end."""
        while self._is_asked and self._stepping.acquire(blocking=False):
            try:
                self._take_over()
            finally:
                self._stepping.release()

    def _take_over(self) -> None:
        if self.pilot is not None and self._is_asked:
            self.pilot.disturbed = True
        while self._arrived:
            self.scheduler.add(self._arrived.popleft())
        while self._pausing:
            request, paused = self._pausing.popleft()
            request.paused = paused
        while self._leaving:
            self.scheduler.remove(self._leaving.popleft().id)
        if self.pilot is not None and self.pilot.flying and not self.scheduler.has_work:
            self.pilot.land()

    def run(self) -> Iterator[Event]:
        """Step until no request is left that is not paused; events as they come. Raises what `step` raises."""
        while self.has_work:
            yield from self.step()

    def watch(self, limit: int = 1 << 16) -> deque[EngineEvent]:
        """A queue that from now on receives what the engine does; past `limit` the oldest are dropped.

        Read it with popleft, from any thread; see `handloom.engine.events`. End it with `unwatch`.
        """
        queue: deque[EngineEvent] = deque(maxlen=limit)
        journal = self.scheduler.journal
        with self._door:
            journal.queues = (*journal.queues, queue)
        return queue

    def unwatch(self, queue: deque[EngineEvent]) -> None:
        """Put no more into a queue of `watch`."""
        journal = self.scheduler.journal
        with self._door:
            journal.queues = tuple(other for other in journal.queues if other is not queue)

    def stats(self, *, num_outside: int = 0) -> EngineStats:
        """What the engine is doing and has done. num_outside: requests that wait elsewhere, to be counted in."""
        pool, journal = self.model.pool, self.scheduler.journal
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.num_waiting + num_outside,
            pages_used=pool.num_pages - pool.num_free,
            pages_cached=pool.num_cached,
            pages_free=pool.num_free - pool.num_cached,
            tokens_per_second=journal.tokens_per_second(),
            hit_rate=journal.num_cached_tokens / max(1, journal.num_admitted_tokens),
            num_finished=journal.num_finished,
            num_preempted=journal.num_preempted,
            num_computed=journal.num_computed,
            num_chosen=journal.num_chosen,
            num_spilled=journal.num_spilled,
            num_drafted=self.speculator.counts.drafted,
            num_accepted=self.speculator.counts.accepted,
            spilled_bytes=pool.spilled_bytes,
            num_captured_steps=0 if self.pilot is None else self.pilot.num_steps,
            other_decode_steps={} if self.pilot is None else dict(self.pilot.outside),
        )

    def close(self) -> None:
        """Abort every request."""
        with self._door:
            requests = tuple(self._alive)
        for request in requests:
            self.abort(request)


def _borrowed(decoder: Decoder) -> Sequence | None:
    """The sequence of the caller's that a decoder runs on, if it does."""
    inner = decoder.inner if isinstance(decoder, Guarded) else decoder
    return inner.sequence if isinstance(inner, SampleDecoder) and not inner.owns_sequence else None
