"""Time on a GPU in microseconds, and the two rates that nothing on it exceeds, measured alike.

A time is the median of CUDA-graph replays, those of all calls in turn. Before each call a buffer of twice the
second-level cache is read, so that weights and pages come from memory as they do in a model; its own time is taken off.
What cannot be captured in a graph is timed with events. Off a GPU a call is run once, only to see that it runs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import triton

REPEATS = 20  # calls in a graph
MIN_ROUNDS, MAX_ROUNDS = 5, 15  # replays of each graph
SECONDS = 0.6  # for the replays of one case, once each has had the least

Call = Callable[[], object]


class Clock:
    """Times calls on one device in microseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._sweep = torch.randn(2 * cache // 4, device=device)
            empty = self._graph(lambda: None)
            assert empty is not None
            self._empty = empty

    def in_turn(self, runs: Sequence[Call]) -> list[tuple[list[float], str]]:
        """For each call (microseconds per round, method); rounds of all calls alternate."""
        if not self.on_gpu:
            return [([1e6 * _seconds(run)], "interpreter") for run in runs]
        graphs = [self._graph(run) for run in runs]
        replayed: list[list[float]] = [[] for _ in runs]
        started = time.perf_counter()
        for taken in range(MAX_ROUNDS):
            if taken >= MIN_ROUNDS and time.perf_counter() - started > SECONDS:
                break
            base = self._replay(self._empty)
            for times, graph in zip(replayed, graphs, strict=True):
                if graph is not None:
                    times.append(max(self._replay(graph) - base, 1e-3))
        return [
            (times, "graph") if graph is not None else (self._events(run), "events")
            for run, graph, times in zip(runs, graphs, replayed, strict=True)
        ]

    def _graph(self, run: Call) -> torch.cuda.CUDAGraph | None:
        """REPEATS times (sweep the cache, run), or None where that cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(REPEATS):
                    self._sweep.amax()
                    run()
        except RuntimeError as error:
            print(f"  not captured: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
            return None
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end) / REPEATS

    def _events(self, run: Call) -> list[float]:
        return [1000 * ms for ms in triton.testing.do_bench(run, return_mode="all")]


def _seconds(run: Call) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ceilings(clock: Clock, dtype: torch.dtype, small: bool) -> tuple[float, float]:
    """(bytes per second of a large copy, read and written; operations per second of a large matrix product)."""
    size, side = (1 << 20, 64) if small else (1 << 29, 8192)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    (copied, _), (multiplied, _) = clock.in_turn([lambda: target.copy_(source), lambda: left @ right])
    return 2e6 * size / statistics.median(copied), 2e6 * side**3 / statistics.median(multiplied)
