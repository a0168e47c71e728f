"""Running tables of instructions: memory, threads, the frame.

This module does not know what instructions mean.
"""

from __future__ import annotations

import numpy as np
import torch

from handloom.ops.cpu import blocks
from handloom.ops.cpu import instructions as ins
from handloom.ops.cpu.blocks import Instructions
from handloom.ops.cpu.compiled import compiled_step
from handloom.ops.cpu.instructions import Frame
from handloom.ops.cpu.threads import Teams, usable_threads

_teams = Teams()


class Machine:
    """Runs tables: holds each thread's scratch memory, and what is kept from an instruction to the next."""

    def __init__(self) -> None:
        self._scratch = self._kept = torch.empty(0, dtype=torch.uint8)

    def run(self, table: np.ndarray, scratch: int, kept: int, entries: dict[Frame, int]) -> None:
        """Run a table; scratch: bytes of each thread; kept: bytes for all; entries: of the frame."""
        threads = usable_threads()
        if len(self._scratch) < threads * scratch + 64:
            self._scratch = torch.empty(threads * scratch + 64, dtype=torch.uint8)
        if len(self._kept) < kept + 64:
            self._kept = torch.empty(2 * kept + 64, dtype=torch.uint8)
        at, kept_at = self._scratch.data_ptr(), self._kept.data_ptr()
        frame = np.zeros(len(Frame), dtype=np.int64)
        for entry, value in entries.items():
            frame[entry] = value
        frame[Frame.SCRATCH], frame[Frame.SCRATCH_BYTES] = at + -at % 64, scratch
        frame[Frame.THREADS], frame[Frame.KEPT] = threads, kept_at + -kept_at % 64
        _teams.of(compiled_step(), threads).run(table, frame)


def run_once(rows: Instructions, entries: dict[Frame, int], kept_splits: int = 0) -> None:
    """Run a few instructions."""
    table = np.array([ins.row_of(row) for row in rows], dtype=np.int64)
    Machine().run(table, blocks.scratch_bytes(rows), blocks.kept_bytes(rows) * kept_splits, entries)
