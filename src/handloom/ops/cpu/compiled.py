"""The compiled step, from the disk or made now.

Its machine code is kept (see `handloom.kept`) in a file named by a hash of the sources, numba's version and the
processor. numba is imported where there is something to compile, and not otherwise.
Where that folder cannot be written, the step is compiled in each process.

This module does not know what the step computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
import time
from contextlib import suppress
from functools import cache
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from types import ModuleType

from handloom import kept
from handloom.errors import UnsupportedOption
from handloom.ops.cpu import object_code
from handloom.ops.cpu.instructions import ASKING, HAS_AMX, HAS_WORDS
from handloom.ops.cpu.object_code import Function

NAME = "handloom_step"
VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")
"""numba's, which name another processor to compile for (NUMBA_CPU_NAME alone keeps the features of this one)."""
FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
"""How lines of /proc/cpuinfo begin that tell processors apart, on x86-64 and ARM."""
OUTSIDE = ("ops/panels.py", "ops/quantized_panels.py", "checkpoint/quantize.py")
"""Sources outside this package that the kernels take constants from."""

logger = logging.getLogger("handloom")
_lock = threading.Lock()


def compiled_step() -> Function:
    """`step.run` as machine code that lets go of the interpreter's lock; says so in the log when it has to be made.

    Raises UnsupportedOption where it has to be made and numba or the processor cannot, or the system lets none be run.
    """
    with _lock:
        return _compiled_step()


@cache
def _compiled_step() -> Function:
    path = kept_in()
    data = kept.read(path, "the CPU kernels are compiled")
    if data is None:
        compiler = _compiler()
        started = time.perf_counter()
        logger.info("compiling the CPU kernels, once on this machine, which takes 5 to 15 seconds")
        data = compiler.compile_step(NAME)
        logger.info("compiled in %.1f s", time.perf_counter() - started)
        kept.write(path, data, "the compiled CPU kernels")
    try:
        return object_code.load(data, NAME)
    except OSError as error:
        raise _not_let(error) from error


@cache
def _units() -> int:
    """What the step has code for, or will have: it is not compiled. Raises as `require` does."""
    if not os.path.exists(kept_in()):  # noqa: PTH110 - as in `require`
        return int(_compiler().UNITS)
    answer = ctypes.c_int64(0)
    compiled_step()(ctypes.addressof(answer), ASKING)
    return answer.value


def has_matrix_units() -> bool:
    """Whether the step has code for matrix units (AMX). Raises as `require` does."""
    return _units() & HAS_AMX != 0


def has_words() -> bool:
    """Whether the step multiplies codes with rows as words (VNNI). Raises as `require` does."""
    return _units() & HAS_WORDS != 0


def is_loaded() -> bool:
    """Whether this process has the code in memory."""
    return _compiled_step.cache_info().currsize > 0


def require() -> None:
    """Raises UnsupportedOption where the step cannot be had, as far as can be told without compiling it."""
    if os.path.exists(kept_in()):  # noqa: PTH110 - a folder that may not be looked into is no error
        compiled_step()
    else:
        _compiler().require_processor()


def _compiler() -> ModuleType:
    try:
        from handloom.ops.cpu import compiling
    except ImportError as error:
        raise _without(error) from error
    except OSError as error:
        raise _not_let(error) from error
    return compiling


def _without(error: ImportError) -> UnsupportedOption:
    return UnsupportedOption(
        f"backend 'cpu', the default on a CPU, needs the package numba: {error}; install it, or choose 'torch'"
    )


def _not_let(error: OSError) -> UnsupportedOption:
    return UnsupportedOption(
        f"backend 'cpu', the default on a CPU, makes code, which this system does not let be run: {error}; "
        "choose 'torch'"
    )


# Keeping it --------------------------------------------------------------------------------------


@cache
def kept_in() -> Path:
    """The file in which this machine's step of these sources is kept."""
    digest = hashlib.sha256()
    for part in (_version(), *(os.environ.get(name, "") for name in VARIABLES), _processor()):
        digest.update(part.encode() + b"\0")
    here = Path(__file__).parent
    for source in (*sorted(here.glob("*.py")), *(here.parents[1] / name for name in OUTSIDE)):
        digest.update(source.read_bytes())
    return kept.folder() / f"cpu-{digest.hexdigest()[:32]}.o"


def _version() -> str:
    try:
        return metadata.version("numba")
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """What tells this processor from others that may share the folder: a home on a network, an image of a container."""
    with suppress(OSError), Path("/proc/cpuinfo").open() as file:
        first = takewhile(str.strip, file)
        known = "".join(line for line in first if line.startswith(FIELDS))
        if "flags" in known or "Features" in known:
            return known
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise _without(error) from error
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
