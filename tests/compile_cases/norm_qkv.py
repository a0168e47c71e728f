from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from compile_cases.linear import MEANT
from compile_cases.quantized_linear import MEANT as QUANTIZED_MEANT
from compile_cases.quantized_linear import weight as quantized_weight
from handloom_kernels import norm_qkv as kernels
from handloom_kernels.reference import Norm, Rotary


def cases() -> Iterator[Case]:
    def run(
        heads: tuple[int, int, int],
        depth: int,
        norm: str = "rms",
        head_norm: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        pages: torch.dtype = torch.bfloat16,
        form: tuple[str, int] | None = None,
    ) -> None:
        num_heads, num_kv_heads, head_dim = heads
        layer, quantised = norm == "layer", pages == torch.int8
        width = (num_heads + 2 * num_kv_heads) * head_dim
        k_pages = torch.empty(8, 16, num_kv_heads, head_dim, dtype=pages)
        scales = [torch.empty(k_pages.shape[:3])] * 2 if quantised else []
        qk_norm = Norm(head_norm, torch.empty(head_dim, dtype=dtype), None, 1e-6) if head_norm else None
        weight = quantized_weight(*form, width, depth, dtype) if form else torch.empty(width, depth, dtype=dtype)
        launcher = kernels.quantized_norm_qkv if form else kernels.norm_qkv
        launcher(
            torch.empty(4, depth, dtype=dtype),
            Norm(norm, torch.empty(depth, dtype=dtype), torch.empty(depth, dtype=dtype) if layer else None, 1e-6),
            weight,
            torch.empty(width, dtype=dtype) if layer else None,
            qk_norm,
            qk_norm,
            None if layer else Rotary(torch.empty(4, head_dim // 2), torch.empty(4, head_dim // 2)),
            k_pages,
            torch.empty_like(k_pages),
            torch.empty(4, dtype=torch.int64),
            *scales,
        )

    yield Case("Llama-3.2-1B", lambda: run((32, 8, 64), 2048), MEANT)
    yield Case("Llama-3.1-8B", lambda: run((32, 8, 128), 4096), MEANT)
    yield Case("Qwen3-0.6B", lambda: run((16, 8, 128), 1024, head_norm="rms"), MEANT)
    gemma = {"norm": "rms_unit_offset", "head_norm": "rms_unit_offset"}
    yield Case("Gemma-3-1B", lambda: run((4, 1, 256), 1152, **gemma), MEANT)
    yield Case("GPT-2", lambda: run((12, 12, 64), 768, "layer", dtype=torch.float16, pages=torch.float16))
    yield Case("Qwen3-0.6B, int8 pages", lambda: run((16, 8, 128), 1024, head_norm="rms", pages=torch.int8), MEANT)
    for form in (("int8", 0), ("int4", 128), ("fp8", 0)):
        name = f"{form[0]} {form[1]}"
        yield Case(f"Llama-3.1-8B, {name}", lambda f=form: run((32, 8, 128), 4096, form=f), QUANTIZED_MEANT)
    yield Case("Qwen3-8B, int4", lambda: run((32, 8, 128), 4096, head_norm="rms", form=("int4", 128)), QUANTIZED_MEANT)
    yield Case("Qwen3-0.6B, int4 32", lambda: run((16, 8, 128), 1024, head_norm="rms", form=("int4", 32)))
    yield Case("Gemma-3-1B, int8", lambda: run((4, 1, 256), 1152, **gemma, form=("int8", 0)))
    yield Case("heads of 80, int8", lambda: run((32, 32, 80), 2560, "layer", form=("int8", 0)))
    int8_pages = {"head_norm": "rms", "pages": torch.int8}
    yield Case("Qwen3-0.6B, int8 and int8 pages", lambda: run((16, 8, 128), 1024, form=("int8", 0), **int8_pages))
