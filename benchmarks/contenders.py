"""Who is measured on a GPU: handloom in its ways of running, and its peers, each a function from prompts to tokens.

A peer is `generate(prompts, new_tokens) -> token ids`, greedy, deaf to eos; its time to the first token is that of a
call that wants one, its time per token what further ones take. handloom says itself when each token came.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import handloom as hl
from handloom.engine.graphs import DecodeGraphs
from handloom.engine.stream import CudaStream, EagerStream, Step, Stream, Wait
from handloom.measure.serving import serve
from handloom.measure.speed import Run, check_counts
from handloom.measure.stats import interleave
from handloom.measure.workload import Asked
from plain_torch import PlainTorch
from random_llama import as_transformers, on_backend, tensors

OURS, LAUNCHED, TORCH = "handloom", "handloom, kernel by kernel", "handloom, backend torch"
PEERS = {
    "plain": "plain torch, compiled",
    "dynamic": "transformers, dynamic cache",
    "static": "transformers, static cache",
}
COMPILED = {"plain", "static"}
"""They compile for a minute per model and number of rows."""

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]


@dataclass
class Taken:
    """One timed run, the tokens of every prompt, and the share of decoding in which the host did not just wait."""

    run: Run
    tokens: list[list[int]]
    host: float | None = None

    @property
    def step(self) -> float:
        """Seconds per decode step: (total - first) / (n - 1)."""
        return (self.run.total - self.run.first) / (self.run.new_tokens - 1)


Contender = Callable[[Prompts, int], Taken]


class WatchedStream:
    """A stream that counts the seconds in which the host had nothing to do but wait."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.waited = stream, 0.0

    def capture(self, step: Step) -> Step:
        return self.stream.capture(step)

    def upload(self, values: Tensor, into: Tensor) -> None:
        self.stream.upload(values, into)

    def fetch(self, source: Tensor) -> Wait:
        wait = self.stream.fetch(source)

        def timed() -> Tensor:
            started = time.perf_counter()
            values = wait()
            self.waited += time.perf_counter() - started
            return values

        return timed

    def finish(self) -> None:
        self.stream.finish()

    def give_memory_back(self) -> None:
        self.stream.give_memory_back()


class Handloom:
    """handloom whose decode steps go to a stream: captured there, or launched kernel by kernel; None: no such steps."""

    def __init__(self, lm: hl.LM, stream: Stream | None) -> None:
        self.lm, self.watched = lm, None if stream is None else WatchedStream(stream)
        self.graphs = None if self.watched is None else DecodeGraphs(lm.transformer, lm.pool, self.watched)

    def __call__(self, prompts: Prompts, new: int) -> Taken:
        """All prompts run in the first step."""
        self.lm.graphs = self.graphs
        before = self.watched.waited if self.watched else 0.0
        total = sum(map(len, prompts))
        found = serve(self.lm, [Asked(prompt, new) for prompt in prompts], max_step_tokens=total)
        first = max(request.tokens[0] for request in found.served)
        run = Run(len(prompts), total, new, first, first, found.seconds)
        host = None
        if self.watched and new > 1:
            host = 1 - (self.watched.waited - before) / (run.total - run.first)
        return Taken(run, [request.token_ids for request in found.served], host)


def peer(name: str, generate: Generate) -> Contender:
    def run(prompts: Prompts, new: int) -> Taken:
        seconds, tokens = [], []
        for count in sorted({1, new}):
            started = time.perf_counter()
            tokens = generate(prompts, count)
            seconds.append(time.perf_counter() - started)
            check_counts(name, list(map(len, tokens)), count)
        return Taken(Run(len(prompts), sum(map(len, prompts)), new, seconds[0], seconds[0], seconds[-1]), tokens)

    return run


def hf_generate(model: Any, cache: str) -> Generate:
    """`generate` as its manual shows it; with its static cache it compiles the forward pass on a GPU by itself."""
    options: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": "static"}

    @torch.no_grad()
    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0, **options)
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    return generate


def contenders(lm: hl.LM, rows: int, room: int, wanted: Iterable[str]) -> dict[str, Contender]:
    """Ours, and the peers that are wanted ("torch" is another backend of ours), for `rows` prompts of equal length with
    `room` tokens each, new ones included."""
    on_gpu, wanted = lm.device.type == "cuda", set(wanted)
    found: dict[str, Contender] = {
        OURS: Handloom(lm, CudaStream(lm.device) if on_gpu else EagerStream()),
        LAUNCHED: Handloom(lm, EagerStream()),
    }
    if "torch" in wanted:
        found[TORCH] = Handloom(on_backend(lm, "torch"), None)
    generates: dict[str, Generate] = {}
    if "plain" in wanted:
        generates["plain"] = PlainTorch(lm.spec, tensors(lm), rows, room, compiled=on_gpu).generate
    for cache in ("dynamic", "static"):
        if cache in wanted:
            generates[cache] = hf_generate(as_transformers(lm), cache)
    return found | {PEERS[kind]: peer(PEERS[kind], generate) for kind, generate in generates.items()}


class Failure(NamedTuple):
    """who: handloom, where nothing of the case could be measured any more, or a peer."""

    where: str
    who: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.who}: {self.why}"


@dataclass
class Failures:
    """What could not be measured, and why."""

    found: list[Failure] = field(default_factory=list)

    def add(self, where: str, who: str, error: BaseException | str) -> None:
        if isinstance(error, BaseException):
            traceback.print_exception(error)
            error = f"{type(error).__name__}: {error}"
        self.found.append(Failure(where, who, " ".join(error.split())[:300]))


def in_turn(
    case: str,
    runs: Mapping[str, Contender],
    prompts: Prompts,
    new: int,
    rounds: int,
    failures: Failures,
) -> dict[str, list[Taken]]:
    """Runs of everybody, A B A B …, after one each to warm up; whoever fails in that is left out."""
    ready: dict[str, Callable[[], Taken]] = {}
    for name, run in runs.items():
        started = time.perf_counter()
        try:
            run(prompts, new)
        except Exception as error:
            failures.add(case, name, error)
            gc.collect()
        else:
            ready[name] = lambda run=run: run(prompts, new)  # type: ignore[misc]
            print(f"{case}: {name}: warm after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return interleave(ready, rounds=rounds, warmup=0)


def same_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Percent of tokens that are equal."""
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return 100 * sum(a == b for a, b in pairs) / len(pairs)
