"""Kernels for text generation over a paged KV cache: one meaning (`reference`), several implementations.

`handloom_kernels.norm`, `.decode_attention` and the other modules need Triton and are imported when they are first
used; `reference` needs only PyTorch.
"""

from __future__ import annotations

from . import reference

__all__ = ["reference"]
