"""The threads that help with a step, and how they are called to it.

Helpers are Python threads that are inside compiled code, without the interpreter's lock, during a step and for a moment
after it, and then sleep on a queue of their own. A call is only an offer: a helper that comes too late finds the run
closed and goes back to sleep, so that nothing waits for a thread that is not there (after a fork, there is none). A run
is open before helpers are called: one that comes before its caller, on the caller's own core, begins the work.

This module does not know what a step computes.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch

from handloom.ops.cores import usable_cores
from handloom.ops.cpu import instructions as ins

ALIGNMENT = 64


def usable_threads() -> int:
    """As many as torch is set to, and at most the cores that affinity and the cgroup's quota leave."""
    return max(1, min(int(usable_cores()), torch.get_num_threads()))


def aligned(nbytes: int) -> tuple[np.ndarray, int]:
    """Zeroed memory and the first address in it at the start of a cache line; `nbytes` follow that."""
    memory = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    address = memory.ctypes.data
    return memory, address + -address % ALIGNMENT


class Team:
    """The caller of a run and its helpers, one run at a time."""

    def __init__(self, run: Callable[[int, int], None], threads: int) -> None:
        self.threads, self._run = threads, run
        self._memory, self._control = aligned(ins.CONTROL_BYTES)
        self._entries = _int64_at(self._memory, self._control, ins.CONTROL_BYTES)
        self._counters, self._counters_at = aligned(0)
        self._busy = threading.Lock()
        self._calls: list[SimpleQueue[None]] = [SimpleQueue() for _ in range(threads - 1)]
        for i, calls in enumerate(self._calls):
            threading.Thread(target=self._help, args=(calls, i + 1), name=f"handloom-{i + 1}", daemon=True).start()

    def _help(self, calls: SimpleQueue[None], number: int) -> None:
        while True:
            calls.get()
            self._run(self._control, number)

    def run(self, table: array[int], frame: array[int]) -> None:
        """Carry out a table of int64, WIDTH for each instruction, with a frame, and return when all of it is done."""
        with self._busy:
            entries, (table_at, size) = self._entries, table.buffer_info()
            length = size // ins.WIDTH
            needed = length * ins.counter_bytes(self.threads)
            if self._counters.nbytes < needed + ALIGNMENT:
                self._counters, self._counters_at = aligned(needed)
            self._counters.fill(0)
            entries[ins.TABLE // 8], entries[ins.LENGTH // 8] = table_at, length
            entries[ins.FRAME // 8], entries[ins.COUNTERS // 8] = frame.buffer_info()[0], self._counters_at
            try:
                self._run(self._control, ins.OPENING)
                for calls in self._calls:
                    if calls.empty():
                        calls.put(None)
            finally:  # an interrupt must not leave it open: helpers would work on memory that is no longer there
                self._run(self._control, 0)


def _int64_at(memory: np.ndarray, address: int, nbytes: int) -> memoryview:
    first = address - memory.ctypes.data
    return memory.data[first : first + nbytes].cast("q")


class Teams:
    """One team per number of threads and process, made when first asked for."""

    def __init__(self) -> None:
        self._teams: dict[tuple[int, int], Team] = {}
        self._lock = threading.Lock()

    def of(self, compiled: Callable[[], Callable[[int, int], None]], threads: int) -> Team:
        """compiled: gives what a new team runs."""
        key = (os.getpid(), threads)
        team = self._teams.get(key)
        if team is None:
            with self._lock:
                team = self._teams.get(key) or self._teams.setdefault(key, Team(compiled(), threads))
        return team
