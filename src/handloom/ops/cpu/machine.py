"""Running tables of instructions: memory, threads, the frame.

This module does not know what instructions mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from handloom.ops.cpu import blocks
from handloom.ops.cpu import instructions as ins
from handloom.ops.cpu.blocks import Instructions
from handloom.ops.cpu.compiled import compiled_step
from handloom.ops.cpu.instructions import Frame
from handloom.ops.cpu.threads import Teams, aligned, usable_threads

NO_MEMORY = (0, 0, 0)
_teams = Teams()


class Memory:
    """Bytes that can grow, from the start of a cache line on. What is in them is not kept."""

    def __init__(self) -> None:
        self._size = 0
        self._memory, self._address = aligned(0)

    def room(self, nbytes: int) -> int:
        """The address of so many bytes."""
        if nbytes > self._size:
            self._size = max(nbytes, 2 * self._size)
            self._memory, self._address = aligned(self._size)
        return self._address


class Machine:
    """Runs tables: holds each thread's scratch memory, and what is kept from an instruction to the next."""

    def __init__(self) -> None:
        self._scratch, self._kept = Memory(), Memory()

    def run(self, table: array[int], scratch: int, kept: int, entries: Sequence[int]) -> None:
        """Run a table; scratch: bytes of each thread; kept: bytes for all; entries: of the frame, but the machine's."""
        threads = usable_threads()
        memory = self._scratch.room(threads * scratch), scratch, self._kept.room(kept)
        _run(table, array("q", [*entries, *memory, threads]), threads)


def table_of(rows: Instructions) -> array[int]:
    """The table of these instructions."""
    return array("q", [value for row in rows for value in ins.row_of(row)])


def run_once(rows: Instructions, entries: Mapping[Frame, int], kept_splits: int = 0) -> None:
    """Run a few instructions. entries: of the frame; those that are not there are 0."""
    most = max(entries.get(Frame.TOKENS, 0), entries.get(Frame.ROWS, 0))
    kept = max(blocks.kept_bytes(rows) * kept_splits, blocks.split_bytes(rows) * -(-most // ins.QUAD))
    Machine().run(table_of(rows), blocks.scratch_bytes(rows), kept, in_order(entries))


def run_bare(row: ins.Perturb, entries: Mapping[Frame, int], alone: bool) -> None:
    """Run an instruction that needs no memory beside its operands, on this thread alone or on all."""
    threads = 1 if alone else usable_threads()
    _run(table_of([row]), array("q", [*in_order(entries), *NO_MEMORY, threads]), threads)


def in_order(entries: Mapping[Frame, int]) -> list[int]:
    """The entries of a frame, but the machine's."""
    return [entries.get(entry, 0) for entry in Frame if entry < Frame.SCRATCH]


def _run(table: array[int], frame: array[int], threads: int) -> None:
    _teams.of(compiled_step, threads).run(table, frame)
