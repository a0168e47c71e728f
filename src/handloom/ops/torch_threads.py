"""torch's operators on the calling thread alone, for work too small to share.

The threads that an operator wakes spin for milliseconds after it, on cores that the compiled step needs. How many there
may be is a number of the calling thread's own, in OpenMP and in MKL, and is set there: no other thread's changes, and
none that starts meanwhile sees it. Where torch's library has no such functions (on Windows), nothing is changed.

This module does not know what is computed.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

LIBRARIES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}

Numbers = tuple[int, int]
"""Of threads: OpenMP's, and MKL's own, where 0 means as many as OpenMP has."""


class _Here(threading.local):
    outside: Numbers | None = None  # this thread's outside of `one_thread`; None when there


_here = _Here()


@contextmanager
def one_thread() -> Iterator[None]:
    """Operators of torch called here, on this thread, wake no others."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    _here.outside = threads, _set(1, 1)
    try:
        yield
    finally:
        _set(*_here.outside)
        _here.outside = None


@contextmanager
def callers_threads() -> Iterator[None]:
    """Within `one_thread`, for a function of the caller's: as many threads as outside; what it sets is kept."""
    outside = _here.outside
    if outside is None:
        yield
        return
    _set(*outside)
    _here.outside = None
    try:
        yield
    finally:
        threads = torch.get_num_threads()
        _here.outside = threads, _set(1, 1)


def _set(threads: int, of_mkl: int) -> int:
    """Returns MKL's number before."""
    set_openmp, set_mkl = _setters()
    set_openmp(threads)
    return set_mkl(of_mkl)


@cache
def _setters() -> tuple[Callable[[int], object], Callable[[int], int]]:
    """Of this thread's numbers in OpenMP and in MKL."""
    name = LIBRARIES.get(sys.platform)
    library = None if name is None else ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    of_openmp = getattr(library, "omp_set_num_threads", lambda threads: None)
    return of_openmp, getattr(library, "MKL_Set_Num_Threads_Local", lambda threads: 0)
