"""handloom and its peers on a CPU: one precision at a time, every engine in a process of its own, in turn.

Tests have the names of llama-bench: "pp512 b8" computes 8 prompts of 512 tokens and chooses one token each, "tg128 b8"
generates 128 tokens for each of 8 prompts of one token. Rates are tokens of all prompts over the whole call.

The limit is the roofline of Williams, Waterman and Patterson (CACM 52(4), 2009) of a step: its bytes at the measured
read bandwidth of a buffer as large as the weights, which a large cache may hold, or its operations at the measured rate
of matrix products, whichever takes longer. That rate is the best of float32 and whatever narrower numbers the weights
are held in: units for bfloat16 or int8 are part of the machine.

This module does not know engines, tables or files.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from handloom import machine
from handloom.errors import RequestFailed, UnsupportedOption
from handloom.loading import DTYPES
from handloom.measure import limits
from handloom.measure.results import Results
from handloom.measure.worker_process import Answer, Contender, Worker
from handloom.model.spec import ModelSpec
from handloom.ops import cpu

OURS = "handloom"
FIRST_PROMPT = 8
"""Tokens of the prompt whose first token a fresh process is timed to."""

SAME_WEIGHTS = ("fp32", "bf16", "fp16", "gguf")
"""Precisions in which all engines compute with the same weights, to the bit; each quantises to int8 and int4 its own
way, so that other tokens than handloom's tell nothing of either."""

PRODUCTS = {"fp32": (torch.float32,), **dict.fromkeys(("bf16", "fp16"), (torch.float32, torch.bfloat16))}
ALL_PRODUCTS = torch.float32, torch.bfloat16, torch.int8
"""Matrix products whose rates bound a precision; ALL_PRODUCTS: one that PRODUCTS does not have."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """kind: "pp" or "tg"; tokens: of each prompt, or new ones of each."""

    kind: str
    tokens: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens} b{self.batch}"

    @property
    def metric(self) -> str:
        return "prefill" if self.kind == "pp" else "decode"

    @property
    def lengths(self) -> tuple[int, int]:
        """Prompt tokens and new tokens of each."""
        return (self.tokens, 1) if self.kind == "pp" else (1, self.tokens)

    def prompts(self, vocab_size: int, round_: int = 0) -> list[list[int]]:
        """Random ids, no two prompts of a batch alike where the vocabulary allows it; others in each round of a case,
        so that no engine gains by what it has kept, and the same for all engines and at every run."""
        source = random.Random(f"handloom {self.batch} {round_}")
        firsts = source.sample(range(vocab_size), min(self.batch, vocab_size))
        return [
            [firsts[i % vocab_size], *(source.randrange(vocab_size) for _ in range(self.lengths[0] - 1))]
            for i in range(self.batch)
        ]


@dataclass
class Roofs:
    """Per second, the best so far: bytes read of a buffer of so many, operations by the numbers multiplied."""

    bandwidth: dict[int | None, float] = field(default_factory=dict)
    products: dict[torch.dtype, float] = field(default_factory=dict)

    def measure(self, precision: str, nbytes: int | None) -> None:
        """Once more, what bounds that precision. nbytes: None for a buffer that no cache holds."""
        with suppress(UnsupportedOption):
            cpu.require()  # its kernels read faster than torch's
        self.bandwidth[nbytes] = max(self.bandwidth.get(nbytes, 0.0), machine.read_bandwidth(nbytes=nbytes))
        for dtype in PRODUCTS.get(precision, ALL_PRODUCTS):
            rate = limits.matmul_rate(dtype, torch.device("cpu"))
            self.products[dtype] = max(self.products.get(dtype, 0.0), rate)

    def matmul(self, precision: str) -> float:
        """Of the products that bound that precision, the fastest."""
        return max(self.products[dtype] for dtype in PRODUCTS.get(precision, ALL_PRODUCTS))


@dataclass
class Group:
    """What was measured of one precision, by engine.

    rates: tokens per second of each case and round; peaks: most bytes held until the end of each batch; agreement:
    share of tokens as handloom chose them, up to where the two part, in SAME_WEIGHTS; starts: of fresh processes,
    seconds to a first token, seconds of loading, and most bytes; about: what adapters say; failed: why an engine was
    left out from then on; bandwidth, matmul: the roofs.
    """

    precision: str
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: dict[Case, dict[str, list[float]]] = field(default_factory=dict)
    peaks: dict[str, dict[int, int]] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    starts: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    bandwidth: float = 0.0
    matmul: float = 0.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What every group is measured with; model, files: paths; cases: smaller batches first."""

    model: str
    files: str | None
    threads: int
    vocab_size: int
    cases: Sequence[Case]
    rounds: int
    warmup: int
    starts: int
    timeout: float

    def of(self, precision: str, *, fresh: bool = False) -> dict[str, Any]:
        """Keywords of an adapter's Engine; fresh: no more room than a first token needs."""
        return {
            "model": self.model,
            "files": self.files,
            "precision": precision,
            "threads": self.threads,
            "max_batch": 1 if fresh else max(case.batch for case in self.cases),
            "max_tokens": FIRST_PROMPT + 1 if fresh else max(sum(case.lengths) for case in self.cases),
        }


def measure(
    settings: Settings, precision: str, contenders: Sequence[Contender], roofs: Roofs, tell: Tell, say: Tell
) -> Group:
    """All cases in one precision, the engines in turn; those that fail are left out, and said.

    tell: called before each run with what it is; say: with a line about each engine that is left out.
    """
    group = Group(precision)
    with ExitStack() as stack:
        live: dict[str, Worker] = {}
        for contender in contenders:
            tell(f"{precision}: {contender.name} loads")
            with _leaving_out(group, contender.name, say):
                worker = stack.enter_context(Worker(contender, settings.of(precision), settings.timeout))
                group.about[contender.name] = worker.loaded()[1]
                live[contender.name] = worker
        tokens: dict[str, list[list[int]]] = {name: [] for name in live}
        nbytes = int(group.about[OURS]["weight_bytes"]) if OURS in live else None
        tell(f"{precision}: the machine")
        roofs.measure(precision, nbytes)
        for case in settings.cases:
            _run_case(group, settings, case, live, tokens, tell, say)
    for name in live.keys() - {OURS}:
        if OURS in live and precision in SAME_WEIGHTS:
            group.agreement[name] = _agreement(tokens[OURS], tokens[name])
    _start(group, settings, [c for c in contenders if c.name in live], tell, say)
    roofs.measure(precision, nbytes)
    group.bandwidth, group.matmul = roofs.bandwidth[nbytes], roofs.matmul(precision)
    return group


@contextmanager
def _leaving_out(group: Group, name: str, say: Tell) -> Iterator[None]:
    """A block in which an engine may fail: that is noted in the group and said, and what follows the block goes on."""
    try:
        yield
    except RequestFailed as error:
        group.failed[name] = str(error)
        say(f"{group.precision}: not measured: {error}")


def _run_case(
    group: Group,
    settings: Settings,
    case: Case,
    live: dict[str, Worker],
    tokens: dict[str, list[list[int]]],
    tell: Tell,
    say: Tell,
) -> None:
    """Rounds of one case, A B A B …; an engine that fails is taken out of `live`."""
    new_tokens = case.lengths[1]
    taken: dict[str, list[Answer]] = {name: [] for name in live}
    for round_ in range(settings.warmup + settings.rounds):
        prompts = case.prompts(settings.vocab_size, round_)
        for name, worker in list(live.items()):
            tell(f"{group.precision}: {case.name}: {name}")
            with _leaving_out(group, name, say):
                taken[name].append(worker.run(prompts, new_tokens))
            if name in group.failed:
                del live[name], taken[name]
            elif round_ == 0:
                tokens[name] += taken[name][0].tokens
    work = case.batch * case.tokens
    group.rates[case] = {
        name: [work / answer.seconds for answer in answers[settings.warmup :]] for name, answers in taken.items()
    }
    for name, answers in taken.items():
        group.peaks.setdefault(name, {})[case.batch] = answers[-1].peak


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of all tokens that come before the two part, of rows of the same lengths."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, ours))


def _start(group: Group, settings: Settings, contenders: Sequence[Contender], tell: Tell, say: Tell) -> None:
    """Fresh processes in turn, each up to the first token of a short prompt."""
    prompt = Case("pp", FIRST_PROMPT, 1).prompts(settings.vocab_size)
    for _ in range(settings.starts):
        for contender in contenders:
            if contender.name in group.failed:
                continue
            tell(f"{group.precision}: process start: {contender.name}")
            with _leaving_out(group, contender.name, say):
                started = time.perf_counter()
                with Worker(contender, settings.of(group.precision, fresh=True), settings.timeout) as worker:
                    load, _about = worker.loaded()
                    answer = worker.run(prompt, 1)
                    seconds = time.perf_counter() - started
                group.starts.setdefault(contender.name, []).append((seconds, load, answer.peak))


# Rows ------------------------------------------------------------------------------------------


def limit(group: Group, spec: ModelSpec, case: Case) -> float | None:
    """Tokens per second of all prompts that weights held as handloom holds them allow; None where it did not load."""
    about = group.about.get(OURS)
    if about is None:
        return None
    weights, dtype = int(about["weight_bytes"]), DTYPES[about["kv_dtype"]]
    if case.kind == "pp":
        flops, moved = case.batch * limits.prefill_flops(spec, case.tokens), weights
        return case.batch * case.tokens / max(flops / group.matmul, moved / group.bandwidth)
    flops = case.batch * limits.prefill_flops(spec, 1)
    moved = weights + case.batch * machine.kv_bytes_read(spec, dtype, (1 + case.tokens) // 2)
    return case.batch / max(flops / group.matmul, moved / group.bandwidth)


def add_rows(group: Group, spec: ModelSpec, results: Results) -> None:
    """The group's rows; dtype is the precision, held and version are the engine's own."""

    def add(who: str, case: str, metric: str, unit: str, values: Sequence[float]) -> None:
        about: Mapping[str, Any] = group.about.get(who, {})
        own = {name: about[name] for name in ("held", "version") if name in about}
        results.add(who, case, metric, unit, values, dtype=group.precision, **own)

    add("limit", "machine", "read bandwidth", "GB/s", [group.bandwidth / 1e9])
    add("limit", "machine", "matrix product", "GFLOP/s", [group.matmul / 1e9])
    for case, rates in group.rates.items():
        for who, values in rates.items():
            add(who, case.name, case.metric, "tok/s", values)
        if (most := limit(group, spec, case)) is not None:
            add("limit", case.name, case.metric, "tok/s", [most])
    for who, peaks in group.peaks.items():
        for batch, peak in peaks.items():
            add(who, f"b{batch}", "peak memory", "MiB", [peak / 2**20])
    for who, share in group.agreement.items():
        add(who, "all", "tokens as handloom's", "%", [100 * share])
    for who, starts in group.starts.items():
        for at, (metric, unit, scale) in enumerate(STARTS):
            add(who, "process start", metric, unit, [taken[at] / scale for taken in starts])


STARTS = (("first token", "s", 1), ("load", "s", 1), ("peak memory", "MiB", 2**20))
"""Metrics of a fresh process, in the order of Group.starts."""
