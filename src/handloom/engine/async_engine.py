"""The engine for asyncio: every request is an async iterator of its events, and a thread steps for all of them.

The thread is there while there are requests. It and the event loops share no more than queues of events, so that no
loop waits for a step, and no step for a loop.

This module does not know how requests are scheduled, or what their events mean beyond which one is the last.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from handloom.decoding.decoder import Decoder, Event, FinishedEvent
from handloom.decoding.modes import RequestDecoder
from handloom.engine.engine import Engine
from handloom.engine.events import EngineEvent, EngineStats
from handloom.engine.guarded import Custom
from handloom.engine.model import Model
from handloom.engine.prepare import guarded
from handloom.errors import EngineError, EngineFull, HandloomError, InvalidParam
from handloom.one_process import OneProcess

MAX_WAITING = 1024
MAX_EVENTS = 256


@dataclass(slots=True, eq=False)
class _Stream:
    """One request on its way from the engine's thread to the task that reads it, in that task's loop."""

    decoder: Decoder
    priority: int
    loop: asyncio.AbstractEventLoop
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    events: deque[Event] = field(default_factory=deque)
    error: HandloomError | None = None
    id: int = -1
    paused: bool = False


class AsyncEngine(OneProcess, instead="make another, of a model of its process"):
    """Continuous generation for the tasks of one or several event loops, over one model.

    max_waiting: most requests that wait in the engine, those that were preempted included; others wait outside, first
    come first served, until there is room. max_events: events that a request may be ahead of whoever reads them; one
    that gets there is paused until half of them are read. While it is paused others may take its place and its pages;
    it goes on with the same tokens. limits: those of `Engine`. Raises InvalidParam.

        async with hl.AsyncEngine(lm) as engine:
            async for event in engine.generate("Once upon a time", max_new_tokens=64): ...

    A step that raises (out of memory, a bug) ends all requests that were in the engine, each with EngineError, which
    has the cause; those that come later are served. Methods may be called from any thread; `generate`, from any loop.
    """

    def __init__(
        self, model: Model, *, max_waiting: int = MAX_WAITING, max_events: int = MAX_EVENTS, **limits: Any
    ) -> None:
        if not all(type(limit) is int and limit > 0 for limit in (max_waiting, max_events)):
            raise InvalidParam(f"{max_waiting=}, {max_events=}: both must be 1 or more, and integers")
        self.max_waiting, self.max_events = max_waiting, max_events
        self.model, self._engine = model, Engine(model, **limits)
        self._changed = threading.Condition()  # held for what is short, never while a step runs; guards what follows
        self._line: deque[_Stream] = deque()
        self._streams: dict[int, _Stream] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    # For tasks ---------------------------------------------------------------------------------

    async def generate(
        self, prompt: Any, /, *, priority: int = 0, cache_salt: str = "", wait: bool = True, **options: Any
    ) -> AsyncIterator[Event]:
        """The events of one request, as they come; the last one is a FinishedEvent, with the error of one that failed.

        Arguments are those of `Engine.add_request`; wait: whether to wait while max_waiting others do, or to raise.
        Leaving the loop, closing the iterator or cancelling the task ends the request and frees its pages within one
        step. The prompt is checked and tokenised here, in the calling thread, when the first event is asked for.
        Raises what `Engine.add_request` raises; EngineFull; EngineError where the engine failed or is closed.
        """
        decoder = self.prepare(prompt, options, cache_salt=cache_salt)
        async for event in self.run(decoder, priority=priority, wait=wait):
            yield event

    def prepare(self, prompt: Any, options: dict[str, Any], *, cache_salt: str = "") -> RequestDecoder | Custom:
        """The decoder of a request, for `run`. Arguments and errors are those of `Engine.add_request`."""
        return self._engine.prepare(prompt, options, cache_salt=cache_salt)

    async def run(self, decoder: Decoder, *, priority: int = 0, wait: bool = True) -> AsyncIterator[Event]:
        """The events of a decoder, as of `generate`. Raises EngineFull, EngineError, and what `Engine.add` raises."""
        stream = self._enter(guarded(self.model, decoder), priority, wait)
        try:
            while True:
                while stream.events:
                    event = stream.events.popleft()
                    self._let_go_on(stream)
                    yield event
                    if isinstance(event, FinishedEvent):
                        return
                if stream.error is not None:
                    raise stream.error
                self._let_go_on(stream)  # it may have been paused while the last of its events were read
                await stream.ready.wait()
                stream.ready.clear()
        finally:
            self._leave(stream)

    async def aclose(self) -> None:
        """End every request with EngineError, and wait for the step that is running."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._end([*self._line, *self._streams.values()], "the engine was closed")
            self._line.clear()
            self._changed.notify()
        if thread is not None:
            await asyncio.to_thread(thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def stats(self) -> EngineStats:
        """What the engine is doing and has done; `waiting` includes those that wait for room in it."""
        return self._engine.stats(num_outside=len(self._line))

    def watch(self, limit: int = 1 << 16) -> deque[EngineEvent]:
        """See `Engine.watch`."""
        return self._engine.watch(limit)

    def unwatch(self, queue: deque[EngineEvent]) -> None:
        """See `Engine.unwatch`."""
        self._engine.unwatch(queue)

    def _enter(self, decoder: Decoder, priority: int, wait: bool) -> _Stream:
        stream = _Stream(decoder, priority, asyncio.get_running_loop())
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed; make another one")
            if not wait and len(self._line) + self._engine.num_waiting >= self.max_waiting:
                raise EngineFull(
                    f"{self.max_waiting} requests wait, as many as may; ask again later, or with wait=True"
                )
            if self._thread is None:
                self._thread = self._started()
            self._line.append(stream)
            self._changed.notify()
        return stream

    def _started(self) -> threading.Thread:
        """The thread. Raises EngineError where the system has none left."""
        thread = threading.Thread(target=self._work, name="handloom engine", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise EngineError(
                f"the engine has no thread to run in: {error}; end others, or raise their limit"
            ) from error
        return thread

    def _let_go_on(self, stream: _Stream) -> None:
        """Resume a request that was paused, once half of its events are read."""
        if not stream.paused or len(stream.events) > self.max_events // 2:
            return
        with self._changed:
            stream.paused = False
            self._engine.resume(stream.id)
            self._changed.notify()

    def _leave(self, stream: _Stream) -> None:
        with self._changed:
            if self._streams.pop(stream.id, None) is not None:
                self._engine.abort(stream.id)
            elif stream in self._line:
                self._line.remove(stream)
            self._changed.notify()

    # The thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                if not self._wait_for_work():
                    return
                self._deliver(self._engine.step())
            except BaseException as cause:  # whatever it is, those who wait must hear of it
                with self._changed:
                    self._end(tuple(self._streams.values()), f"the engine failed in a step: {cause!r}", cause)

    def _wait_for_work(self) -> bool:
        """Let requests in; wait until a step has something to do. False, and no thread any more, when none is left."""
        with self._changed:
            while True:
                for stream in [s for s in (*self._line, *self._streams.values()) if s.loop.is_closed()]:
                    self._leave(stream)
                self._let_in()
                if self._engine.has_work:
                    return True
                if not self._streams:
                    self._thread = None
                    return False
                self._changed.wait()

    def _let_in(self) -> None:
        while self._line and self._engine.num_waiting < self.max_waiting:
            stream = self._line.popleft()
            try:
                stream.id = self._engine.add(stream.decoder, priority=stream.priority)
            except HandloomError as error:
                stream.error = error
                _wake([stream])
            else:
                self._streams[stream.id] = stream

    def _deliver(self, events: Iterable[Event]) -> None:
        told: dict[_Stream, None] = {}
        with self._changed:
            for event in events:
                stream = self._streams.get(event.request_id)
                if stream is None:  # whoever asked has left
                    continue
                stream.events.append(event)
                told[stream] = None
                if isinstance(event, FinishedEvent):
                    del self._streams[stream.id]
                elif len(stream.events) >= self.max_events and not stream.paused:
                    stream.paused = self._engine.pause(stream.id)
        _wake(told)

    def _end(self, streams: Iterable[_Stream], why: str, cause: BaseException | None = None) -> None:
        """End these requests with an error of their own each."""
        for stream in streams:
            stream.error = EngineError(why)
            stream.error.__cause__ = cause
            if self._streams.pop(stream.id, None) is not None:
                self._engine.abort(stream.id)
        _wake(streams)


def _wake(streams: Iterable[_Stream]) -> None:
    """Have the tasks look at what there is for them; one call per loop."""
    loops: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
    for stream in streams:
        loops.setdefault(stream.loop, []).append(stream)
    for loop, own in loops.items():
        try:
            loop.call_soon_threadsafe(_set_ready, own)
        except RuntimeError:
            if not loop.is_closed():  # a closed one reads no more: its requests end before the next step
                raise


def _set_ready(streams: Iterable[_Stream]) -> None:
    for stream in streams:
        stream.ready.set()
