"""The compiled step, from the disk or made now.

It is kept under NUMBA_CACHE_DIR, else under XDG_CACHE_HOME or ~/.cache, in a folder named by a hash of this package's
sources and numba's version: numba itself would look at the time of one file alone. numba adds the processor to the key.
Where that folder cannot be written, the step is compiled in each process.

This module does not know what the step computes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from handloom.ops.cpu import step

logger = logging.getLogger("handloom")
SIGNATURE = types.void(types.int64, types.int64)
_lock = threading.Lock()


def compiled_step() -> Callable[[int, int], None]:
    """`step.run` as machine code that lets go of the interpreter's lock; says so in the log when it has to be made."""
    with _lock:
        return _compiled_step()


@cache
def _compiled_step() -> Callable[[int, int], None]:
    function = njit(nogil=True, error_model="numpy")(step.run)
    function._cache = _Cache(step.run)
    if is_kept():
        function.compile(SIGNATURE)
    else:
        started = time.perf_counter()
        logger.info("compiling the CPU kernels, once on this machine, which takes 5 to 15 seconds")
        function.compile(SIGNATURE)
        logger.info("compiled in %.1f s", time.perf_counter() - started)
    compiled: Callable[[int, int], None] = function
    return compiled


def is_kept() -> bool:
    """Whether a compiled step lies in the cache, as far as its folder tells; loading it takes no time to speak of."""
    return any(folder().glob("*.nbc"))


@cache
def folder() -> Path:
    """Where the compiled step of these sources is kept."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handloom"
    return root / f"cpu-{digest.hexdigest()[:16]}"


class _Locator(_CacheLocator):
    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> str:
        return folder().name

    def get_disambiguator(self) -> str:
        return "0"

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        return cls()


class _Implementation(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012


class _Cache(FunctionCache):
    _impl_class = _Implementation

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            logger.warning("the compiled CPU kernels could not be kept in %s: %s", folder(), error)
