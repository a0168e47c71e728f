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
        self._scratch = self._kept = torch.empty(0, dtype=torch.uint8, device="cpu")

    def run(self, table: np.ndarray, scratch: int, kept: int, entries: dict[Frame, int]) -> None:
        """Run a table; scratch: bytes of each thread; kept: bytes for all; entries: of the frame."""
        threads = usable_threads()
        if len(self._scratch) < threads * scratch + 64:
            self._scratch = torch.empty(threads * scratch + 64, dtype=torch.uint8, device="cpu")
        if len(self._kept) < kept + 64:
            self._kept = torch.empty(2 * kept + 64, dtype=torch.uint8, device="cpu")
        at, kept_at = self._scratch.data_ptr(), self._kept.data_ptr()
        memory = {Frame.SCRATCH: at + -at % 64, Frame.SCRATCH_BYTES: scratch, Frame.KEPT: kept_at + -kept_at % 64}
        _run(table, {**entries, **memory}, threads)


def run_once(rows: Instructions, entries: dict[Frame, int], kept_splits: int = 0) -> None:
    """Run a few instructions."""
    table = np.array([ins.row_of(row) for row in rows], dtype=np.int64)
    most = max(entries.get(Frame.TOKENS, 0), entries.get(Frame.ROWS, 0))
    kept = max(blocks.kept_bytes(rows) * kept_splits, blocks.split_bytes(rows) * -(-most // ins.QUAD))
    Machine().run(table, blocks.scratch_bytes(rows), kept, entries)


def run_bare(row: ins.Perturb, entries: dict[Frame, int], alone: bool) -> None:
    """Run an instruction that needs no memory beside its operands, on this thread alone or on all."""
    _run(np.array([ins.row_of(row)], dtype=np.int64), entries, 1 if alone else usable_threads())


def _run(table: np.ndarray, entries: dict[Frame, int], threads: int) -> None:
    frame = np.zeros(len(Frame), dtype=np.int64)
    for entry, value in entries.items():
        frame[entry] = value
    frame[Frame.THREADS] = threads
    _teams.of(compiled_step(), threads).run(table, frame)
