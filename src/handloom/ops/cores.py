"""How much of the machine this process may use.

This module does not know what for.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import psutil


def usable_cores() -> float:
    """Cores this process may use: its affinity now, less if the cgroup's quota is less (which may be a fraction)."""
    cores = float(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    return min(cores, _quota())


@functools.cache
def _quota() -> float:
    """The cgroup's quota in cores when first asked for, infinite where there is none."""
    quota = cgroup("cpu.max").split()
    return int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0] != "max" else float("inf")


def usable_memory() -> int:
    """Bytes this process can still have: of the machine's, less if the cgroup's limit leaves less (file caches go)."""
    free, limit = int(psutil.virtual_memory().available), cgroup("memory.max").strip()
    if not limit.isdecimal():
        return free
    counts = dict(line.split() for line in cgroup("memory.stat").splitlines())
    cached = int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))
    used = int(cgroup("memory.current") or 0) - cached
    return max(0, min(free, int(limit) - used))


def cgroup(name: str) -> str:
    """A control file (version 2) of this process's cgroup, as seen in a container; empty where there is none."""
    file = Path("/sys/fs/cgroup") / name
    return file.read_text() if file.is_file() else ""
