"""Memory for weights on a CPU, straight from the system.

The C library's allocator would keep what is freed between two weights, 10 % of a model and more; pages of the system's
own go back when their tensor does. Huge ones are asked for, where the system has them for the asking: reading 500 MiB
of weights takes a tenth less time then, and so does each decoded token. Weights smaller than a huge page lie side by
side in a `Region`: in int8 a token takes a seventh less time for it.

This module does not know what the memory is for.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.errors import OutOfMemory

MIN_BYTES = 1 << 18
"""Less is left to the allocator."""
HUGE_PAGE_BYTES = 1 << 21
BLOCK_BYTES = 16 * HUGE_PAGE_BYTES
"""What a region asks for at once. Memory lies behind those of its huge pages that were written to."""
LINE_BYTES = 64


def trim() -> None:
    """Give back what the allocator holds and nobody uses, where it is glibc's: of a tokenizer's files, 30 MiB."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU with any values. Raises OutOfMemory, or torch's RuntimeError for a small one."""
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes < MIN_BYTES or sys.platform == "win32":
        return torch.empty(*shape, dtype=dtype, device="cpu")
    pages, start = _pages(nbytes)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start).view(*shape)


class Region:
    """Memory for tensors that stay together, such as the weights of a model: they share blocks of huge pages, which go
    back when the last tensor of a block does; what fills a block has one of its own. Threads may ask at once.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with any values, in the first block with room for it. Raises OutOfMemory."""
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if not LINE_BYTES <= nbytes < BLOCK_BYTES or sys.platform == "win32":
            return empty(shape, dtype)
        with self._lock:
            block = next((own for own in self._blocks if own.used + nbytes <= own.end), None)
            if block is None:
                pages, start = _pages(BLOCK_BYTES)
                block = _Block(pages, start, start + BLOCK_BYTES)
                self._blocks.append(block)
            start = block.used
            block.used += -(-nbytes // LINE_BYTES) * LINE_BYTES
        return torch.frombuffer(block.pages, dtype=dtype, count=count, offset=start).view(*shape)


@dataclass(slots=True)
class _Block:
    pages: mmap.mmap
    used: int
    end: int


def _pages(nbytes: int) -> tuple[mmap.mmap, int]:
    """Memory, and where in it `nbytes` begin: where a huge page does, if they fill one. Raises OutOfMemory."""
    huge = nbytes >= HUGE_PAGE_BYTES
    try:
        pages = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OutOfMemory(
            f"weights take {nbytes} bytes more, which the system refuses: {error}; use a smaller dtype or quantize, or "
            "raise this process's limits"
        ) from error
    if not huge:
        return pages, 0
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages, -torch.frombuffer(pages, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE_BYTES
