"""The compiled step, from the disk or made now.

Its machine code is kept under NUMBA_CACHE_DIR, else under XDG_CACHE_HOME or ~/.cache: a file named by a hash of the
sources, numba's version and the processor, which begins with a checksum. numba is imported where there is something to
compile, and not otherwise. Where that folder cannot be written, the step is compiled in each process.

This module does not know what the step computes.
"""

from __future__ import annotations

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

from handloom.errors import UnsupportedOption
from handloom.ops.cpu import object_code
from handloom.ops.cpu.object_code import Function

NAME = "handloom_step"
CHECKSUM_BYTES = 32
VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
"""numba's, which name another processor to compile for."""
FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
"""How lines of /proc/cpuinfo begin that tell processors apart, on x86-64 and ARM."""
OUTSIDE = ("panels.py", "quantized_panels.py")
"""Sources beside this package that the kernels take constants from."""

logger = logging.getLogger("handloom")
_lock = threading.Lock()


def compiled_step() -> Function:
    """`step.run` as machine code that lets go of the interpreter's lock; says so in the log when it has to be made.

    Raises UnsupportedOption where it has to be made and numba is missing.
    """
    with _lock:
        return _compiled_step()


@cache
def _compiled_step() -> Function:
    path = kept_in()
    data = _read(path)
    if data is None:
        compiler = _compiler()
        started = time.perf_counter()
        logger.info("compiling the CPU kernels, once on this machine, which takes 5 to 15 seconds")
        data = compiler.compile_step(NAME)
        logger.info("compiled in %.1f s", time.perf_counter() - started)
        _keep(path, data)
    return object_code.load(data, NAME)


def require() -> None:
    """Raises UnsupportedOption where the step is yet to be compiled and numba is missing."""
    if not kept_in().exists():
        _compiler()


def _compiler() -> ModuleType:
    try:
        from handloom.ops.cpu import compiling
    except ImportError as error:
        raise UnsupportedOption(
            f"backend 'cpu', the default on a CPU, needs the package numba: {error}; install it, or choose 'torch'"
        ) from error
    return compiling


# Keeping it --------------------------------------------------------------------------------------


@cache
def kept_in() -> Path:
    """The file in which this machine's step of these sources is kept."""
    digest = hashlib.sha256()
    for part in (_version(), *(os.environ.get(name, "") for name in VARIABLES), _processor()):
        digest.update(part.encode() + b"\0")
    here = Path(__file__).parent
    for source in (*sorted(here.glob("*.py")), *(here.parent / name for name in OUTSIDE)):
        digest.update(source.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handloom"
    return root / f"cpu-{digest.hexdigest()[:32]}.o"


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
    import llvmlite.binding as llvm

    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


def _read(path: Path) -> bytes | None:
    """The object file, unless there is none, or another one, or a damaged one."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data = content[CHECKSUM_BYTES:]
    if content[:CHECKSUM_BYTES] != _checksum(path, data):
        logger.warning("%s is damaged; the CPU kernels are compiled anew", path)
        return None
    return data


def _keep(path: Path, data: bytes) -> None:
    """Write it whole or not at all, whoever else writes or reads it now."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(_checksum(path, data) + data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        logger.warning("the compiled CPU kernels could not be kept in %s: %s", path, error)


def _checksum(path: Path, data: bytes) -> bytes:
    """Of the code and of the name of its file, which says what it is for."""
    return hashlib.sha256(path.name.encode() + data).digest()
