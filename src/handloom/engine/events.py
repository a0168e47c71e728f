"""What an engine does, as it happens: for metrics, traces and pictures.

The events that `Engine.step` returns are results; these, read from `Engine.watch`, tell how they came about. `time` is
time.monotonic() in seconds at the end of the step, or where a request started or stopped in the middle of planning.

This module does not know who reads them, or how the engine decides.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from handloom.decoding.decoder import Event, FinishedEvent, FinishReason, TokenEvent

RATE_STEPS = 64


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request has its pages and runs from now on; after a preemption, again. num_cached of its num_tokens tokens
    were in the cache already, or came back from host memory."""

    request_id: int
    time: float
    num_tokens: int
    num_cached: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens first … first + num_tokens of a sequence of the request were computed in one step."""

    request_id: int
    time: float
    first: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TokenChosen:
    """A token was chosen."""

    request_id: int
    time: float
    token_id: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """A running request gave its pages back and waits. Of its num_computed tokens, num_kept are in host memory; the
    others will be computed again, less those that are still cached then."""

    request_id: int
    time: float
    num_computed: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A request is over."""

    request_id: int
    time: float
    reason: FinishReason


EngineEvent = Admitted | PrefillChunk | TokenChosen | Preempted | Finished


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one moment, and what it has done so far.

    Attributes:
        running, waiting: requests.
        pages_used, pages_cached, pages_free: of the model's KV cache, which other engines and sequences share. Held by
            a sequence; held by none, but kept for whoever begins with the same tokens; empty.
        tokens_per_second: tokens chosen in the last steps, per second from the first of these until now.
        hit_rate: of the tokens that requests had when they were admitted, the share that was cached. Admissions that
            bring something back from host memory do not count.
        num_finished, num_preempted: requests; one may be preempted several times.
        num_computed, num_chosen: tokens that were run, prompts included; tokens that were chosen.
        num_spilled: preemptions that moved what was computed to host memory, all of it.
        num_drafted, num_accepted: tokens drafted and checked by a step, see `handloom.decoding.speculative`; those of
            them that were chosen.
        spilled_bytes: in host memory now, of this model; other engines' requests included.
        num_captured_steps: decode steps that the device made by itself; other_decode_steps: those it could have made,
            and did not, by reason. Both are empty where nothing is ever captured, as on a CPU.
    """

    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    pages_free: int
    tokens_per_second: float
    hit_rate: float
    num_finished: int
    num_preempted: int
    num_computed: int
    num_chosen: int
    num_spilled: int
    num_drafted: int
    num_accepted: int
    spilled_bytes: int
    num_captured_steps: int = 0
    other_decode_steps: Mapping[str, int] = field(default_factory=dict)


class Journal:
    """Counts what happens, and tells it to those who listen, if any."""

    def __init__(self) -> None:
        self.queues: tuple[deque[EngineEvent], ...] = ()  # replaced as a whole: whoever reads it sees one or the other
        self.num_admitted_tokens = self.num_cached_tokens = 0
        self.num_finished = self.num_preempted = self.num_spilled = self.num_computed = self.num_chosen = 0
        self._steps: deque[tuple[float, int]] = deque(maxlen=RATE_STEPS)  # when each ended, and num_chosen then

    def admitted(self, request_id: int, num_tokens: int, num_cached: int, *, came_back: bool) -> None:
        if not came_back:
            self.num_admitted_tokens += num_tokens
            self.num_cached_tokens += num_cached
        if self.queues:
            self._tell(Admitted(request_id, time.monotonic(), num_tokens, num_cached))

    def prefilled(self, request_id: int, first: int, num_tokens: int) -> None:
        if self.queues:
            self._tell(PrefillChunk(request_id, time.monotonic(), first, num_tokens))

    def preempted(self, request_id: int, num_computed: int, num_kept: int) -> None:
        self.num_preempted += 1
        self.num_spilled += 0 < num_computed == num_kept
        if self.queues:
            self._tell(Preempted(request_id, time.monotonic(), num_computed, num_kept))

    def emitted(self, events: Iterable[Event]) -> None:
        """Events of requests, in order."""
        for event in events:
            if isinstance(event, TokenEvent):
                self.num_chosen += 1
                if self.queues:
                    self._tell(TokenChosen(event.request_id, time.monotonic(), event.token_id))
            elif isinstance(event, FinishedEvent):
                self.num_finished += 1
                if self.queues:
                    self._tell(Finished(event.request_id, time.monotonic(), event.reason))

    def stepped(self, num_tokens: int) -> None:
        """A step that ran num_tokens tokens is over."""
        self.num_computed += num_tokens
        self._steps.append((time.monotonic(), self.num_chosen))

    def tokens_per_second(self) -> float:
        """Of the last RATE_STEPS steps, until now."""
        if len(self._steps) < 2:
            return 0.0
        started, before = self._steps[0]
        return (self.num_chosen - before) / max(1e-9, time.monotonic() - started)

    def _tell(self, event: EngineEvent) -> None:
        for queue in self.queues:
            queue.append(event)
