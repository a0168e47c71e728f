"""What every launcher checks before it launches: devices, dtypes, shapes and strides, with errors that name them.

This module does not know any kernel.
"""

from __future__ import annotations

import os
from typing import Sequence

import torch
from torch import Tensor

from . import tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32)


class KernelError(ValueError):
    """A launcher was given something that its kernel does not handle; nothing was launched."""


def check_device(name: str, x: Tensor) -> torch.device:
    """The device of `x`, if kernels run there: a GPU, or the CPU under Triton's interpreter."""
    if x.device.type != "cuda" and not (x.device.type == "cpu" and INTERPRETED):
        raise KernelError(
            f"{name} is on {x.device}; Triton kernels run on a GPU, and on the CPU only where TRITON_INTERPRET=1 "
            "was set before the import. Use handloom_kernels.reference there"
        )
    return x.device


def check(
    name: str,
    x: Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device,
    *,
    strided: bool = False,
) -> None:
    """Raise KernelError unless `x` is a tensor of that shape (None: any size), dtype and device.

    Without `strided` it must be contiguous; with it only neighbours in the last dimension must be neighbours.
    """
    if not isinstance(x, Tensor):
        raise KernelError(f"{name} must be a tensor, not {type(x).__name__}")
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if x.dtype not in wanted:
        raise KernelError(f"{name} has dtype {x.dtype}; this kernel takes {', '.join(map(str, wanted))}")
    if x.dim() != len(shape) or any(want not in (None, size) for want, size in zip(shape, x.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelError(f"{name} has shape {list(x.shape)}; expected [{expected}]")
    if x.device != device:
        raise KernelError(f"{name} is on {x.device} and the other tensors on {device}")
    if strided:
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise KernelError(f"{name} has strides {x.stride()}; the last must be 1: call .contiguous()")
    elif not x.is_contiguous():
        raise KernelError(f"{name} has strides {x.stride()} for shape {list(x.shape)}: call .contiguous()")


def require(condition: bool, message: str) -> None:
    """Raise KernelError with `message` unless `condition`."""
    if not condition:
        raise KernelError(message)


def check_codes(name: str, x: Tensor) -> None:
    """Raise KernelError if `x` holds float8 numbers that the device's instructions, and so its compiler, lack."""
    capability = tuning.capability(x.device)
    if capability is None:
        return
    card = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    if x.dtype == torch.float8_e4m3fnuz:
        raise KernelError(f"{name} has dtype {x.dtype}, which only AMD's GPUs know: {card} takes torch.float8_e4m3fn")
    if x.dtype == torch.float8_e4m3fn and capability < (8, 9):
        raise KernelError(
            f"{name} has dtype {x.dtype}, which {card} does not know; it takes 8.9 or later. Use int8, or bfloat16 "
            "without scales"
        )
