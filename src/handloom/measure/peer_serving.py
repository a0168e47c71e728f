"""transformers on the same requests, in the two ways it has: `generate` on padded batches, and continuous batching.

Both have all requests at once, greedily, without eos, and count only the tokens that were asked for.

This module does not know how results are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from handloom.engine.engine import MAX_STEP_TOKENS
from handloom.errors import MissingDependency, RequestFailed
from handloom.lm import LM
from handloom.measure.peer import Transformers
from handloom.measure.serving import Progress, Rates, ServingRun, check_served, serve, totals
from handloom.measure.speed import peak_memory
from handloom.measure.workload import Asked

BLOCK = 256
"""Tokens of a block of transformers' paged cache, by default."""
STEP_TOKENS = 512
STALLED_SECONDS = 300.0


@torch.no_grad()
def padded(peer: Transformers, requests: Sequence[Asked], batch_size: int, progress: Progress | None = None) -> Rates:
    """`generate` on batches padded on the left, each run until its longest output is done.

    Requests of like output, then like prompt length share a batch, which wastes least. Raises RequestFailed where a row
    is not as long as its batch has to be.
    """
    ordered = sorted(requests, key=lambda request: (request.new_tokens, len(request.prompt)))
    done, started = 0, time.perf_counter()
    for at in range(0, len(ordered), batch_size):
        batch = ordered[at : at + batch_size]
        longest = max(request.new_tokens for request in batch)
        rows = peer.generate_padded([request.prompt for request in batch], longest)
        if [len(row) for row in rows] != [longest] * len(batch):
            raise RequestFailed(f"transformers generated {[len(row) for row in rows]} tokens; {longest} were asked for")
        check_served("transformers", batch, [len(row[: r.new_tokens]) for row, r in zip(rows, batch, strict=True)])
        done += sum(request.new_tokens for request in batch)
        if progress is not None:
            progress(done)
    return Rates(*totals(requests), time.perf_counter() - started)


@torch.no_grad()
def continuous(peer: Transformers, requests: Sequence[Asked], progress: Progress | None = None) -> Rates:
    """transformers' continuous batching; making its cache is not in the time. On a CPU that holds all requests at once,
    on a GPU it is what transformers finds room for.

    Raises MissingDependency where this transformers has none, RequestFailed where it does not start, a request fails,
    none ends for five minutes, or one yields another number of tokens.
    """
    try:
        from transformers import ContinuousBatchingConfig, GenerationConfig
    except ImportError as cause:
        raise MissingDependency(f"continuous batching needs a newer transformers: {cause}") from cause

    blocks = sum(-(-(len(request.prompt) + request.new_tokens) // BLOCK) for request in requests)
    longest = max(request.new_tokens for request in requests)
    generation = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=0)
    on_cpu = peer.model.device.type == "cpu"
    sizes = {"num_blocks": blocks + 1, "max_batch_tokens": STEP_TOKENS} if on_cpu else {}
    settings = ContinuousBatchingConfig(**sizes)
    counts: dict[str, int] = {}
    before = peer.model.config._attn_implementation
    try:
        with peer.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=settings, block=True, timeout=STALLED_SECONDS
        ) as manager:
            started = time.perf_counter()
            names = [
                manager.add_request(request.prompt, max_new_tokens=request.new_tokens, eos_token_id=-1)
                for request in requests
            ]
            for result in _results(manager, len(requests)):
                counts[result.request_id] = len(result.generated_tokens)
                if progress is not None:
                    progress(sum(counts.values()))
            seconds = time.perf_counter() - started
    except RequestFailed:
        raise
    except Exception as cause:
        raise RequestFailed(f"continuous batching of transformers raised {cause!r}") from cause
    finally:
        peer.model.set_attn_implementation(before)
    check_served("transformers", requests, [counts.get(name, 0) for name in names])
    return Rates(*totals(requests), seconds)


def _results(manager: Any, count: int) -> Iterator[Any]:
    """`count` finished requests as they come. Raises RequestFailed."""
    done, last = 0, time.perf_counter()
    while done < count:
        result = manager.get_result(timeout=1.0)
        now = time.perf_counter()
        if result is not None and not result.error:
            done, last = done + 1, now
            yield result
        elif result is not None or not manager.is_running() or now - last > STALLED_SECONDS:
            why = "it stopped, or stalled" if result is None else str(result.error)[:500]
            raise RequestFailed(f"continuous batching of transformers failed after {done} of {count} requests: {why}")


Runner = Callable[[Sequence[Asked], Progress | None], Rates]
Watch = Callable[[str, int], AbstractContextManager[Progress]]
"""Called with who is about to run and how many tokens there will be."""


@dataclass(slots=True)
class Comparison:
    """Runs of handloom and of its peers by name; failed: peers that did not serve the requests, and why; peak_memory:
    bytes this process had held before a peer was loaded."""

    ours: list[ServingRun] = field(default_factory=list)
    theirs: dict[str, list[Rates]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    peak_memory: int = 0


def in_turn(
    lm: LM,
    requests: Sequence[Asked],
    watch: Watch,
    *,
    repeat: int = 1,
    max_running: int = 256,
    max_step_tokens: int = MAX_STEP_TOKENS,
    load_peer: Callable[[], Transformers] | None = None,
    batch_sizes: Iterable[int] = (),
    with_continuous: bool = True,
) -> Comparison:
    """Every engine serves the requests `repeat` times, one after the other, after two tokens each to warm up.

    load_peer: called once, after handloom's first run, if there is to be a peer; batch_sizes: of the padded batches. A
    peer that fails does not run again. Raises what `serve` and load_peer raise.
    """
    found = Comparison()
    peers: dict[str, Runner] = {}
    total = sum(request.new_tokens for request in requests)
    short = [replace(request, new_tokens=2, at=0.0) for request in requests[:2]]
    serve(lm, short)
    for _ in range(repeat):
        with watch("handloom", total) as progress:
            found.ours.append(
                serve(lm, requests, max_running=max_running, max_step_tokens=max_step_tokens, progress=progress)
            )
        found.peak_memory = found.peak_memory or peak_memory()
        if load_peer is not None and not peers:
            peers = _peers(load_peer(), batch_sizes, with_continuous)
            for name in peers:
                _attempt(name, peers[name], short, None, found)
        for name in [name for name in peers if name not in found.failed]:
            with watch(name, total) as progress:
                run = _attempt(name, peers[name], requests, progress, found)
            if run is not None:
                found.theirs.setdefault(name, []).append(run)
    return found


def _attempt(
    name: str, runner: Runner, requests: Sequence[Asked], progress: Progress | None, found: Comparison
) -> Rates | None:
    """A peer's run; None where it fails, which is noted."""
    try:
        return runner(requests, progress)
    except (MissingDependency, RequestFailed) as error:
        found.failed[name] = str(error)
        found.theirs.pop(name, None)
        return None


def _peers(peer: Transformers, batch_sizes: Iterable[int], with_continuous: bool) -> dict[str, Runner]:
    def batches_of(size: int) -> Runner:
        return lambda requests, progress: padded(peer, requests, size, progress)

    peers = {f"transformers, batches of {size}": batches_of(size) for size in batch_sizes}
    if with_continuous:
        peers["transformers, continuous"] = lambda requests, progress: continuous(peer, requests, progress)
    return peers
