"""Where the time of one decode step goes: by kernel on a GPU, as its profiler says; by op elsewhere."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Any

import torch

import handloom as hl
from handloom.engine.decode_step import DecodeRow, DecodeStep
from handloom.model.transformer import Transformer
from random_llama import tensors

STEPS = 5
LIBRARY = ("gemm", "nvjet", "cutlass", "cublas")


class TimedOps:
    """A backend's ops, each call's seconds added up by name."""

    def __init__(self, inner: Any, into: Counter[str]) -> None:
        self._inner, self._into = inner, into

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._inner, name)
        if not callable(function):
            return function

        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self._into[name] += time.perf_counter() - started

        return timed


def step_parts(lm: hl.LM, rows: int, context: int) -> tuple[int, dict[str, float]]:
    """(kernels and copies that the device runs for one greedy step, 0 off a GPU; seconds of each part of it).

    Every row has `context` tokens on pages of its own.
    """
    found: Counter[str] = Counter()
    if lm.device.type == "cuda":
        step = _standing_step(lm, lm.transformer, rows, context)
        step.run(drawn=False, cut=False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(STEPS):
                step.run(drawn=False, cut=False)
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        for event in events:
            found[part_of(event.name)] += event.time_range.elapsed_us() / 1e6
        count = len(events) // STEPS
    else:
        ops: Any = TimedOps(lm.backend.ops, found)
        chooser: Any = TimedOps(lm.backend.chooser, found)
        timed = dataclasses.replace(lm.backend, ops=ops, chooser=chooser, program=None)
        step = _standing_step(lm, Transformer(lm.spec, tensors(lm), timed), rows, context)
        step.run(drawn=False, cut=False)
        found.clear()
        started = time.perf_counter()
        for _ in range(STEPS):
            step.run(drawn=False, cut=False)
        found["between ops"] = time.perf_counter() - started - sum(found.values())
        count = 0
    return count, {name: seconds / STEPS for name, seconds in found.most_common()}


def part_of(kernel: str) -> str:
    """A short name for a kernel: ours keep theirs, the many small ones of torch are one part."""
    if any(word in kernel.lower() for word in LIBRARY):
        return "cuBLAS"
    if kernel.startswith("_") and kernel.endswith("_kernel"):
        return kernel.strip("_").removesuffix("_kernel")
    return "torch: copies, integers"


def _standing_step(lm: hl.LM, transformer: Transformer, rows: int, context: int) -> DecodeStep:
    """A step whose rows have such contexts and write to the same page each time it runs."""
    each = -(-(context + STEPS + 2) // lm.pool.page_size)
    if rows * each > lm.pool.num_pages:
        raise SystemExit(f"{rows} rows of {context} tokens take {rows * each} pages; there are {lm.pool.num_pages}")
    step = DecodeStep(transformer, lm.pool, rows, each)
    begin = [
        DecodeRow(1, context - 1, range(row * each, (row + 1) * each), context, 0, 0, 0.0, 0, 1.0, 0.0)
        for row in range(rows)
    ]
    for values, into in step.beginning(begin):
        into.copy_(values)
    step.pages.copy_(step.page_table[:, (context - 1) // lm.pool.page_size])
    return step
