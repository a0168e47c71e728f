"""Choices made once, when a model is loaded: device, dtype, context, size of the KV cache, captured steps.

This module does not know how weights are read or what is done with the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal

import psutil
import torch

from handloom.cache.pages import PagePool
from handloom.checkpoint.quantization import FORMATS
from handloom.checkpoint.quantize import Scheme
from handloom.checkpoint.types import Checkpoint
from handloom.engine.graphs import DecodeGraphs
from handloom.engine.stream import CudaStream
from handloom.errors import InvalidParam, OutOfMemory, UnsupportedOption
from handloom.model.spec import ModelSpec, kv_values_per_token
from handloom.model.transformer import Transformer
from handloom.ops import QUANTIZED, Backend
from handloom.ops.cores import usable_memory

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
STEP_BYTES = 1 << 30
"""Of a GPU's memory, left for the activations of a step and for captured ones."""

logger = logging.getLogger("handloom")


# What other libraries call it when they load a model, and what it is here.
ELSEWHERE: dict[str, str] = {
    "torch_dtype": "dtype",
    **dict.fromkeys(("device_map", "n_gpu_layers"), "device"),
    **dict.fromkeys(("load_in_8bit", "quantization_config", "quantization"), "quantize='int8'"),
    "load_in_4bit": "quantize='int4'",
    **dict.fromkeys(("max_model_len", "n_ctx"), "max_context"),
    "gpu_memory_utilization": "gpu_memory_fraction",
    "attn_implementation": "backend",
}


def refuse_others(names: Iterable[str]) -> None:
    """Raises InvalidParam for keywords that `LM.from_pretrained` does not have."""
    for name in names:
        if name == "trust_remote_code":
            raise InvalidParam("trust_remote_code: no code that came with a model ever runs; leave it out")
        hint = f"did you mean {ELSEWHERE[name]}" if name in ELSEWHERE else "see its arguments"
        raise InvalidParam(f"LM.from_pretrained has no argument {name!r}; {hint}")


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto": a CUDA GPU if there is one, else the CPU.

    Raises InvalidParam for a device that is not there.
    """
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
    spec: ModelSpec,
    max_context: int,
    tokens: int | None,
    memory_fraction: float | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PagePool:
    """The KV cache: `tokens` of them; or as many as a GPU has room for below that fraction of its memory, less what a
    step takes; or as a quarter of the free memory holds, up to 32 full contexts.

    On a CPU the system hands out the memory only as pages are written. Where a GPU turns out to have less, a cache
    whose size was not given is made smaller. Raises InvalidParam, OutOfMemory.
    """
    token_bytes = kv_values_per_token(spec) * dtype.itemsize
    free, total = _memory(device)
    if memory_fraction is not None:
        tokens = _tokens_below(memory_fraction, tokens, token_bytes, free, total, device)
        given = False
    elif tokens is None:
        tokens = max(PAGE_SIZE, min(int(free * KV_MEMORY_FRACTION) // token_bytes, 32 * max_context))
        given = False
    elif isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InvalidParam(f"kv_cache_tokens is {tokens!r}; expected an integer from 1")
    else:
        given = True
    if tokens * token_bytes > free:
        raise _no_room(tokens, token_bytes, free, device)
    num_pages = -(-tokens // PAGE_SIZE)
    while True:
        try:
            return PagePool(spec, num_pages, PAGE_SIZE, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            if given or num_pages == 1:
                raise _no_room(num_pages * PAGE_SIZE, token_bytes, _memory(device)[0], device) from error
            num_pages = max(1, num_pages * 7 // 8)
            logger.warning("no memory for the KV cache as planned; trying %d tokens", num_pages * PAGE_SIZE)


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory: free, and in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return usable_memory(), psutil.virtual_memory().total


def _tokens_below(
    fraction: float, tokens: int | None, token_bytes: int, free: int, total: int, device: torch.device
) -> int:
    """How many tokens fit between what is used and that fraction of a GPU's memory."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise InvalidParam(f"gpu_memory_fraction is {fraction!r}; expected a number above 0, up to 1")
    if tokens is not None:
        raise InvalidParam("kv_cache_tokens and gpu_memory_fraction both say how large the KV cache is; give one")
    if device.type == "cpu":
        raise InvalidParam("gpu_memory_fraction is about a GPU, and the model is on the CPU; give kv_cache_tokens")
    room = int(fraction * total) - (total - free) - STEP_BYTES
    if room < PAGE_SIZE * token_bytes:
        raise OutOfMemory(
            f"under gpu_memory_fraction={fraction} of {total / 2**30:.2f} GiB, {total - free} bytes are in use (weights"
            f" and others) and {STEP_BYTES} are for steps: nothing is left for a KV cache; raise it, or quantize"
        )
    return room // token_bytes


def _no_room(tokens: int, token_bytes: int, free: int, device: torch.device) -> OutOfMemory:
    return OutOfMemory(
        f"a KV cache for {tokens} tokens takes {tokens * token_bytes / 2**30:.2f} GiB ({token_bytes} bytes per "
        f"token), and {free / 2**30:.2f} GiB are free on {device}; ask for fewer kv_cache_tokens"
    )


def make_graphs(transformer: Transformer, pool: PagePool, capture: bool | None) -> DecodeGraphs | None:
    """What captures decode steps; None where steps are launched kernel by kernel. capture: None for where that can be.

    Raises UnsupportedOption where it is asked for and cannot be.
    """
    backend, device = transformer.backend, transformer.device
    why = None
    if device.type != "cuda":
        why = f"the model is on {device}; graphs are captured on a GPU"
    elif not backend.capturable:
        why = f"backend {backend.name!r} asks the device for values in the middle of a step; choose 'triton'"
    if why is None:
        return None if capture is False else DecodeGraphs(transformer, pool, CudaStream(device))
    if capture:
        raise UnsupportedOption(f"capture=True: {why}")
    if capture is None and device.type == "cuda":
        logger.info("decode steps are launched kernel by kernel: %s", why)
    return None
