"""Kernels for text generation over a paged KV cache: one meaning (`reference`), several implementations."""

from __future__ import annotations

from . import reference

__all__ = ["reference"]
