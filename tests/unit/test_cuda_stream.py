"""How a step is captured on a CUDA device, on one that is played: in which order streams wait for each other, and what
is left behind where there is no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from handloom.engine.stream import CudaStream


class Played:
    """torch.cuda's streams and graphs; events: what was done on which stream.

    As torch's own, a capture that cannot be ended leaves its stream behind as the current one.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, ...]] = []
        self.main = self.current = PlayedStream("main", self)
        self.pools: list[object] = []
        self.cannot_end = False
        for name, value in {
            "Stream": lambda device: PlayedStream("side", self),
            "current_stream": lambda: self.current,
            "set_stream": self.set_stream,
            "stream": self.stream,
            "graph": self.graph,
            "graph_pool_handle": object,
            "CUDAGraph": PlayedGraph,
        }.items():
            patch.setattr(torch.cuda, name, value)

    def set_stream(self, stream: PlayedStream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: PlayedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: PlayedGraph, pool: object, stream: PlayedStream, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        assert capture_error_mode == "thread_local", "other threads may allocate meanwhile"
        before, self.current = self.current, stream
        self.events.append(("capture",))
        try:
            yield
        finally:
            if self.cannot_end:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.current = before

    def step(self) -> None:
        self.events.append(("step", self.current.name))


class PlayedStream:
    def __init__(self, name: str, cuda: Played) -> None:
        self.name, self.cuda = name, cuda

    def wait_stream(self, other: PlayedStream) -> None:
        self.cuda.events.append((self.name, "waits for", other.name))


class PlayedGraph:
    def replay(self) -> None: ...


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def failing(step: Any, at: int) -> Any:
    """The step, out of memory at its n-th run."""
    runs: list[int] = []

    def run() -> None:
        step()
        runs.append(1)
        if len(runs) == at:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return run


AROUND = [("side", "waits for", "main"), ("step", "side"), ("main", "waits for", "side")]


def test_a_step_runs_once_beside_and_is_captured_there(cuda: Played) -> None:
    stream = CudaStream(torch.device("cuda"))
    stream.capture(cuda.step)
    assert cuda.events == [*AROUND, ("capture",), ("step", "side")]
    stream.capture(cuda.step)
    assert len(cuda.pools) == 2 and cuda.pools[0] is cuda.pools[1], "captured steps share their memory"
    assert cuda.current is cuda.main


def test_what_ran_before_memory_was_out_is_waited_for(cuda: Played) -> None:
    """Its tensors are given back on the main stream, where others may write to them."""
    with pytest.raises(torch.OutOfMemoryError):
        CudaStream(torch.device("cuda")).capture(failing(cuda.step, 1))
    assert cuda.events == AROUND and cuda.current is cuda.main


@pytest.mark.parametrize("cannot_end", [False, True])
def test_no_memory_in_the_middle_of_a_capture_is_said_and_the_stream_is_as_before(
    cuda: Played, cannot_end: bool
) -> None:
    cuda.cannot_end = cannot_end
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        CudaStream(torch.device("cuda")).capture(failing(cuda.step, 2))
    assert cuda.current is cuda.main


def test_another_error_in_a_capture_is_not_taken_for_one_of_memory(cuda: Played) -> None:
    cuda.cannot_end = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        CudaStream(torch.device("cuda")).capture(cuda.step)
    assert cuda.current is cuda.main
