"""Many requests at once, as a server meets them: when each token comes, and what the cache takes.

Times are from when a request arrives, whether or not the engine was ready for it. Scheduling, the forward pass, greedy
choosing and detokenising are inside; tokenising is not, for prompts are token ids. eos is ignored.

This module does not know limits, tables, or other engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from handloom.decoding.decoder import FinishedEvent, TokenEvent
from handloom.engine import Engine
from handloom.engine.engine import MAX_STEP_TOKENS
from handloom.errors import RequestFailed
from handloom.lm import LM
from handloom.measure.speed import check_room
from handloom.measure.workload import Asked

Progress = Callable[[int], None]
"""Called with the number of tokens there are, after each step."""


@dataclass(slots=True)
class Served:
    """One request. Seconds on the clock of its run: when it arrived, when the first text came, when each token did;
    token_ids: which these were."""

    arrived: float
    first_text: float | None = None
    tokens: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first non-empty piece of text, or to the first token where none came."""
        return (self.tokens[0] if self.first_text is None else self.first_text) - self.arrived

    @property
    def latency(self) -> float:
        """Seconds to the last token."""
        return self.tokens[-1] - self.arrived

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first text: (latency - ttft) / (n - 1); None for a single token."""
        return (self.latency - self.ttft) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.tokens)]


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests that were served with all the tokens they asked for; seconds: from the start to the last token."""

    num_requests: int
    prompt_tokens: int
    new_tokens: int
    seconds: float

    @property
    def output_rate(self) -> float:
        """New tokens per second."""
        return self.new_tokens / self.seconds

    @property
    def total_rate(self) -> float:
        """Prompt and new tokens per second."""
        return (self.prompt_tokens + self.new_tokens) / self.seconds

    @property
    def request_rate(self) -> float:
        return self.num_requests / self.seconds


@dataclass(frozen=True, slots=True)
class ServingRun(Rates):
    """A run of handloom; served: in the order of the requests.

    peak_pages of num_pages: most that requests held after any step, those taken ahead included; hit_rate: share of the
    prompts' tokens that were cached; num_preempted: times that a request lost its pages; queued: most requests that
    waited at a time.
    """

    served: list[Served]
    peak_pages: int
    num_pages: int
    hit_rate: float
    num_preempted: int
    queued: int

    def goodput(self, ttft: float | None, tpot: float | None) -> float:
        """Requests per second that kept within these seconds; None is no limit (Zhong et al. 2024, DistServe)."""
        good = [
            request
            for request in self.served
            if (ttft is None or request.ttft <= ttft) and (tpot is None or (request.tpot or 0.0) <= tpot)
        ]
        return len(good) / self.seconds


def serve(
    lm: LM,
    requests: Sequence[Asked],
    *,
    max_running: int = 256,
    max_step_tokens: int = MAX_STEP_TOKENS,
    prefix_cache: bool = True,
    keep_cached: bool = False,
    progress: Progress | None = None,
) -> ServingRun:
    """Serve requests, each from when it arrives, in an engine of its own.

    keep_cached: leave what is in the prefix cache there from before. Raises ContextOverflow before anything runs,
    RequestFailed where a request yields another number of tokens, and the error of a request that fails.
    """
    for request in requests:
        check_room(lm, len(request.prompt), request.new_tokens)
    if not keep_cached:
        lm.pool.forget_cached()
    engine = Engine(lm, max_running=max_running, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache)
    try:
        return _serve(engine, requests, progress)
    finally:
        engine.close()


def _serve(engine: Engine, requests: Sequence[Asked], progress: Progress | None) -> ServingRun:
    order = sorted(range(len(requests)), key=lambda i: requests[i].at)
    served = [Served(request.at) for request in requests]
    pool, whose, arrived, queued, peak, chosen = engine.model.pool, {}, 0, 0, 0, 0
    started = time.perf_counter()
    while arrived < len(order) or engine.has_work:
        now = time.perf_counter() - started
        while arrived < len(order) and requests[order[arrived]].at <= now:
            index = order[arrived]
            whose[_add(engine, requests[index])] = index
            arrived += 1
        if not engine.has_work:
            time.sleep(max(0.0, requests[order[arrived]].at - now))
            continue
        events = engine.step()
        now = time.perf_counter() - started
        peak, queued = max(peak, pool.num_pages - pool.num_free), max(queued, engine.stats().waiting)
        for event in events:
            request = served[whose[event.request_id]]
            if isinstance(event, TokenEvent):
                request.tokens.append(now)
                request.token_ids.append(event.token_id)
                chosen += 1
            elif isinstance(event, FinishedEvent) and event.error is not None:
                raise event.error
            if isinstance(event, TokenEvent | FinishedEvent) and event.text and request.first_text is None:
                request.first_text = now
        if progress is not None:
            progress(chosen)
    seconds, stats = time.perf_counter() - started, engine.stats()
    check_served("handloom", requests, [len(request.tokens) for request in served])
    return ServingRun(
        *totals(requests), seconds, served, peak, pool.num_pages, stats.hit_rate, stats.num_preempted, queued
    )


def _add(engine: Engine, request: Asked) -> int:
    return engine.add_request(request.prompt, max_new_tokens=request.new_tokens, do_sample=False, eos_token_id=None)


def totals(requests: Sequence[Asked]) -> tuple[int, int, int]:
    """How many requests, and how many prompt and new tokens they have together."""
    prompts, new = (sum(counts) for counts in zip(*((len(r.prompt), r.new_tokens) for r in requests), strict=True))
    return len(requests), prompts, new


def check_served(who: str, requests: Sequence[Asked], counts: Sequence[int]) -> None:
    """Raises RequestFailed unless every request got the tokens it asked for: other numbers would make rates lies."""
    for i, (request, count) in enumerate(zip(requests, counts, strict=True)):
        if count != request.new_tokens:
            raise RequestFailed(f"{who} generated {count} tokens for request {i}; it asked for {request.new_tokens}")
