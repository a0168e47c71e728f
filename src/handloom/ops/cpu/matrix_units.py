"""Whether this process may compute with the processor's matrix units (AMX).

Linux keeps the state of their registers, 8 KiB a thread, only for processes that have asked for it (its documentation,
arch/x86/xstate: "Using XSTATE features in user space applications"). One request serves all threads.

This module does not know what is computed with them.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

from handloom.ops.cpu.compiled import has_matrix_units

ARCH_PRCTL = 158  # a system call on x86-64
ARCH_REQ_XCOMP_PERM, XTILEDATA = 0x1023, 18


def usable() -> bool:
    """Whether the compiled step has instructions for them, the processor too, and the system lets them be used.

    Raises as `compiled_step` does.
    """
    return has_matrix_units() and _granted()


@cache
def _granted() -> bool:
    """Ask the system, once: a processor or a kernel without them says no."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0)
