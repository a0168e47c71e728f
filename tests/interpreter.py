"""Triton's interpreter where the installed NumPy is newer than it."""

from __future__ import annotations

import inspect
from importlib import metadata, util
from typing import Any


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
