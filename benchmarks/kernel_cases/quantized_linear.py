from __future__ import annotations

from collections.abc import Callable, Iterator

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
    """cuBLAS with the weight as it was, torch with the weight dequantised in each call, and torch's own int8 and int4
    products where this torch and device have them (int4 is only timed: its codes are other ones)."""
    found: dict[str, Callable[[], object]] = {
        "cuBLAS": lambda: F.linear(x, weight),
        "torch": lambda: reference.quantized_linear(x, q),
    }
    if q.kind == "int8" and q.group_size == 0:
        codes = reference.unpack_codes(q.data, q.kind, q.shape).view(torch.int8)
        scales = q.scales[0].to(x.dtype)
        add(found, "torch int8pack", lambda: torch._weight_int8pack_mm(x, codes, scales))
    if q.kind == "int4" and q.zeros is None and x.is_cuda and x.dtype == torch.bfloat16:
        codes = reference.unpack_codes(q.data, q.kind, q.shape)
        pairs = torch.stack((q.scales, torch.zeros_like(q.scales)), dim=-1).to(x.dtype).contiguous()
        packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        add(found, "torch int4pack", lambda: torch._weight_int4pack_mm(x, packed, q.group_size, pairs))
    return found


def add(found: dict[str, Callable[[], object]], name: str, run: Callable[[], object]) -> None:
    """Add a peer that this torch and device can run."""
    try:
        run()
    except (RuntimeError, NotImplementedError):
        return
    found[name] = run
