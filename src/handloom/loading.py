"""Choices made once, when a model is loaded: device, dtype, context, size of the KV cache.

This module does not know how weights are read or what is done with the model.
"""

from __future__ import annotations

from typing import Literal

import psutil
import torch

from handloom.cache.pages import PagePool
from handloom.checkpoint.quantization import FORMATS
from handloom.checkpoint.quantize import Scheme
from handloom.checkpoint.types import Checkpoint
from handloom.errors import InvalidParam, OutOfMemory, UnsupportedOption
from handloom.model.spec import ModelSpec, kv_values_per_token
from handloom.ops import QUANTIZED, Backend

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
PAGE_SIZE = 16
KV_MEMORY_FRACTION = 0.25


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto": a CUDA GPU if there is one, else the CPU. Raises InvalidParam for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).tolist()
    except (RuntimeError, AssertionError, TypeError) as cause:
        why = str(cause).partition("\n")[0][:200]
        raise InvalidParam(f"device {device!r} cannot be used here ({why}); choose 'auto', 'cpu' or 'cuda'") from cause
    return chosen


def choose_dtype(dtype: str | torch.dtype, own: torch.dtype) -> torch.dtype:
    """ "auto": the checkpoint's own. Raises InvalidParam for one the forward pass does not run in."""
    chosen = own if dtype == "auto" else DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise InvalidParam(f"dtype {chosen} is not supported; choose 'auto' or one of {', '.join(DTYPES)}")
    assert isinstance(chosen, torch.dtype)
    return chosen


def choose_quantization(
    scheme: Scheme | None, checkpoint: Checkpoint, backend: Backend, dtype: str | torch.dtype, device: torch.device
) -> Scheme | Literal["keep"] | None:
    """How matrices are held: by a scheme; as a quantised GGUF file has them ("keep"), if no dtype was asked for and the
    backend computes on them; else None, in floats. Raises UnsupportedOption for a scheme that does not run there."""
    if scheme is None:
        keep = backend.quantized == "computed" and dtype == "auto"
        return "keep" if keep and any(info.storage in FORMATS for info in checkpoint.tensors.values()) else None
    if backend.quantized == "no" or device.type != "cpu":
        raise UnsupportedOption(
            f"quantize={scheme.name!r} runs on the CPU with backend {' or '.join(map(repr, QUANTIZED))}, and this is "
            f"{backend.name!r} on {device}; leave quantize out"
        )
    return scheme


def choose_context(spec: ModelSpec, max_context: int | None) -> int:
    """The model's own context, or the caller's; only rotary positions go past the model's. Raises InvalidParam."""
    if max_context is None:
        return spec.max_context
    if isinstance(max_context, bool) or not isinstance(max_context, int) or max_context < 1:
        raise InvalidParam(f"max_context is {max_context!r}; expected an integer from 1")
    if spec.learned_positions and max_context > spec.learned_positions:
        raise InvalidParam(f"max_context {max_context} exceeds the model's {spec.learned_positions} learned positions")
    return max_context


def make_pool(
    spec: ModelSpec, max_context: int, tokens: int | None, *, dtype: torch.dtype, device: torch.device
) -> PagePool:
    """The KV cache: `tokens` of them, or as many as a quarter of the free memory holds, up to 32 full contexts.

    On a CPU the system hands out the memory only as pages are written. Raises InvalidParam, OutOfMemory.
    """
    token_bytes = kv_values_per_token(spec) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if tokens is None:
        tokens = max(PAGE_SIZE, min(int(free * KV_MEMORY_FRACTION) // token_bytes, 32 * max_context))
    elif isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InvalidParam(f"kv_cache_tokens is {tokens!r}; expected an integer from 1")
    if tokens * token_bytes > free:
        raise OutOfMemory(
            f"a KV cache for {tokens} tokens takes {tokens * token_bytes / 2**30:.2f} GiB ({token_bytes} bytes per "
            f"token), and {free / 2**30:.2f} GiB are free on {device}; ask for fewer kv_cache_tokens"
        )
    return PagePool(spec, -(-tokens // PAGE_SIZE), PAGE_SIZE, dtype=dtype, device=device)
