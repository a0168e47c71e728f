"""Kernels for text generation over a paged KV cache: one meaning (`reference`), several implementations.

`handloom_kernels.reference` needs only PyTorch. The kernels, one module each, need Triton and are imported when they
are first asked for: `handloom_kernels.norm`, `.decode_attention`, …
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from . import reference

KERNELS = (
    "activation",
    "decode_attention",
    "draw",
    "kv_pages",
    "linear",
    "lm_head",
    "moe",
    "moe_routing",
    "norm",
    "norm_qkv",
    "prefill_attention",
    "quantized_linear",
    "rope",
    "sampling",
    "selection",
    "shared_prefix_attention",
)

__all__ = ["KERNELS", "reference", *KERNELS]


def __getattr__(name: str) -> ModuleType:
    if name in KERNELS:
        return import_module("." + name, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
