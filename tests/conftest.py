"""For every test: no model hub, one thread per worker where several workers share the machine, and an interpreter of
Triton that works with the installed NumPy."""

from __future__ import annotations

import inspect
import os
import signal
from importlib import metadata, util
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # two pools of spinning threads on the same cores are many times slower than one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # before anything imports triton: without a GPU its interpreter runs the kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that starts the tests in the background makes them, and what they start, deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def mend_interpreter() -> None:
    """Where NumPy is 2.5 or newer, which no longer makes an int of an array of one element: Triton's interpreter did so
    up to 3.6 in every loop whose end was computed, and takes the element out since."""
    if tuple(map(int, metadata.version("numpy").split(".")[:2])) < (2, 5) or util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if "int(self.handle.data)" not in inspect.getsource(original):
        return

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if "TRITON_INTERPRET" in os.environ:
    mend_interpreter()
