"""The queue of a device: what is given to it runs later, in the order it was given.

This module does not know what a step computes, or who waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Step = Callable[[], None]
"""Work on tensors that stay where they are; it returns before the device has done it."""
Wait = Callable[[], Tensor]
"""Blocks until the device has come so far, and returns the values in host memory."""


class Stream(Protocol):
    """Everything but `capture`, `finish` and a `Wait` returns at once."""

    def capture(self, step: Step) -> Step:
        """`step`, which runs once on the way, in a form that is cheap to queue again and again.

        Raises torch.OutOfMemoryError, then holding nothing.
        """

    def upload(self, values: Tensor, into: Tensor) -> None:
        """Queue a copy of values in host memory, which nobody changes any more."""

    def fetch(self, source: Tensor) -> Wait:
        """Queue a copy to host memory of what `source` holds then."""

    def finish(self) -> None:
        """Wait until all that was given is done."""

    def give_memory_back(self) -> None:
        """Let others have the memory that is held and not used."""


class EagerStream:
    """A stream whose steps are launched one kernel at a time, and waited for: what graphs are compared with."""

    def capture(self, step: Step) -> Step:
        step()
        return step

    def upload(self, values: Tensor, into: Tensor) -> None:
        into.copy_(values)

    def fetch(self, source: Tensor) -> Wait:
        values = torch.empty_like(source, device="cpu").copy_(source)
        return lambda: values

    def finish(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def give_memory_back(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class CudaStream:
    """The current stream of a CUDA or ROCm device. Captured steps are graphs that share one pool of memory.

    They may share it since they run one after another, and what a step leaves for the next is in tensors from outside.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, step: Step) -> Step:
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                step()  # what is compiled, tuned or allocated at the first run must not be inside the graph
        finally:
            current.wait_stream(self._side)  # also for what was queued before an error: its memory is given back here
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=self._side, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that could not be ended has left its own
            raise _out_of_memory(error) or error from None
        return graph.replay

    def upload(self, values: Tensor, into: Tensor) -> None:
        into.copy_(values.pin_memory(), non_blocking=True)  # torch keeps pinned memory until what uses it is done

    def fetch(self, source: Tensor) -> Wait:
        values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True, device="cpu")
        values.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> Tensor:
            event.synchronize()
            return values

        return wait

    def finish(self) -> None:
        torch.cuda.current_stream().synchronize()

    def give_memory_back(self) -> None:
        torch.cuda.empty_cache()


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory that an error came from: a capture that it broke ends with another error."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error
