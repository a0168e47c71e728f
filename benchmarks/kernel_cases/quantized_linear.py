from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import quantized_linear as kernels
from handloom_kernels import reference
from handloom_kernels.activation import gated_activation
from handloom_kernels.norm import normalize
from handloom_kernels.reference import Norm, QuantizedWeight
from kernel_case import KernelCase

FORMS = (("int8", 0), ("int4", 128), ("int4", 32), ("fp8", 0))


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The four weights of a layer of Llama-3.1-8B, for 1 and 16 rows. The bytes are those of codes and scales. Peers:
    cuBLAS with the weight as it was, torch with the weight dequantised in each call, torch's own quantised products."""
    shapes = ((64, 128),) if small else ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    for rows, depth in shapes:
        weight = torch.randn(rows, depth, device=device, dtype=dtype) * depth**-0.5
        for kind, group in FORMS:
            q = reference.quantize_weight(weight, kind, group)
            for num_rows in (2,) if small else (1, 16):
                x = torch.randn(num_rows, depth, device=device, dtype=dtype)
                own, missing = torchs_own(x, q)
                yield KernelCase(
                    f"{kind}{f' g{group}' if group else ''} {num_rows} x {depth} to {rows}",
                    lambda x=x, q=q: kernels.quantized_linear(x, q),
                    {
                        "cuBLAS": lambda x=x, weight=weight: F.linear(x, weight),
                        "torch": lambda x=x, q=q: reference.quantized_linear(x, q),
                        **own,
                    },
                    missing,
                    bytes_moved=sum(t.nbytes for t in (q.data, q.scales))
                    + x.nbytes
                    + num_rows * rows * x.element_size(),
                    flops=2 * num_rows * rows * depth,
                )
    yield from fused_and_apart(device, dtype, small)


def fused_and_apart(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The norm and activation of an MLP in the product's launch, and in launches of their own."""
    rows, depth = (64, 128) if small else (28672, 4096)
    weight = torch.randn(rows, depth, device=device, dtype=dtype) * depth**-0.5
    norm = Norm("rms", torch.randn(depth, device=device, dtype=dtype), None, 1e-5)
    for kind, group in FORMS:
        q = reference.quantize_weight(weight, kind, group)
        for num_rows in (2,) if small else (1, 16):
            x = torch.randn(num_rows, depth, device=device, dtype=dtype)

            def apart(x: torch.Tensor = x, q: QuantizedWeight = q) -> torch.Tensor:
                return gated_activation(kernels.quantized_linear(normalize(x, norm), q), "silu")

            yield KernelCase(
                f"{kind}{f' g{group}' if group else ''} norm, {num_rows} x {depth} to {rows}, SwiGLU",
                lambda x=x, q=q: kernels.quantized_norm_mlp(x, norm, q, None, "silu", True),
                {"a launch for each": apart},
                bytes_moved=sum(t.nbytes for t in (q.data, q.scales, x)) + num_rows * rows // 2 * x.element_size(),
                flops=2 * num_rows * rows * depth,
            )


def torchs_own(x: torch.Tensor, q: QuantizedWeight) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """torch's own products with weights of this kind: those that run here, and what torch says of those that do not."""
    makers = {}
    if q.kind == "int8" and q.group_size == 0:
        makers["torch int8pack"] = int8pack
    if q.kind == "int4":
        makers["torch int4pack"] = int4pack
    found: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make(x, q)
            found[name]()
        except RuntimeError as error:  # none for this device, dtype or shape
            found.pop(name, None)
            missing[name] = str(error).splitlines()[0]
    return found, missing


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
