from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import quantized_linear as kernels
from handloom_kernels import reference
from handloom_kernels.reference import QuantizedWeight
from kernel_case import KernelCase

FORMS = (("int8", 0), ("int4", 128), ("int4", 32), ("fp8", 0))


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The four weights of a layer of Llama-3.1-8B, for 1 and 16 rows. The bytes are those of codes and scales."""
    shapes = ((64, 128),) if small else ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    for rows, depth in shapes:
        weight = torch.randn(rows, depth, device=device, dtype=dtype) * depth**-0.5
        for kind, group in FORMS:
            q = reference.quantize_weight(weight, kind, group)
            for num_rows in (2,) if small else (1, 16):
                x = torch.randn(num_rows, depth, device=device, dtype=dtype)
                yield KernelCase(
                    f"{kind}{f' g{group}' if group else ''} {num_rows} x {depth} to {rows}",
                    lambda x=x, q=q: kernels.quantized_linear(x, q),
                    peers(x, weight, q),
                    bytes_moved=sum(t.nbytes for t in (q.data, q.scales))
                    + x.nbytes
                    + num_rows * rows * x.element_size(),
                    flops=2 * num_rows * rows * depth,
                )


def peers(x: torch.Tensor, weight: torch.Tensor, q: QuantizedWeight) -> dict[str, Callable[[], object]]:
    """cuBLAS with the weight as it was, torch with the weight dequantised in each call, and torch's own products with
    int8 and int4 weights where this torch and device have them."""
    found: dict[str, Callable[[], object]] = {
        "cuBLAS": lambda: F.linear(x, weight),
        "torch": lambda: reference.quantized_linear(x, q),
    }
    with suppress(RuntimeError, NotImplementedError):
        if q.kind == "int8" and q.group_size == 0:
            run = int8pack(x, q)
            run()
            found["torch int8pack"] = run
        if q.kind == "int4":
            run = int4pack(x, q)
            run()
            found["torch int4pack"] = run
    return found


def int8pack(x: torch.Tensor, q: QuantizedWeight) -> Callable[[], object]:
    codes = reference.unpack_codes(q.data, q.kind, q.shape).view(torch.int8)
    scales = q.scales[0].to(x.dtype)
    return lambda: torch._weight_int8pack_mm(x, codes, scales)


def int4pack(x: torch.Tensor, q: QuantizedWeight) -> Callable[[], object]:
    """Its codes count from 8 as well, and its zeros are added after scaling."""
    codes = reference.unpack_codes(q.data, q.kind, q.shape)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scales = torch.stack((q.scales, torch.zeros_like(q.scales)), dim=-1).to(x.dtype)
    return lambda: torch._weight_int4pack_mm(x, packed, q.group_size, scales)
