from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import linear as kernels
from handloom_kernels.reference import Norm

# the tensor cores multiply, and the weight's 16-byte pieces are copied ahead of them
MEANT = {
    "cuda": r"(?s)(?=.*cp\.async\.c[ag]\.shared\.global[^\n]*0x10)(?=.*mma\.sync\.aligned\.m16n8k16[^\n]*bf16)",
    "gfx942": r"(?s)(?=.*(global|buffer)_load_dwordx4)(?=.*v_mfma_f32_16x16x16_bf16)",
}


def cases() -> Iterator[Case]:
    def residual(width: int, depth: int, dtype: torch.dtype, kind: str | None = None) -> None:
        x, weight = torch.empty(4, depth, dtype=dtype), torch.empty(width, depth, dtype=dtype)
        post_norm = Norm(kind, torch.empty(len(weight), dtype=dtype), None, 1e-6) if kind else None
        kernels.linear_residual(x, weight, None, post_norm, torch.empty(4, width, dtype=dtype))

    def mlp(kind: str, width: int, depth: int, activation: str, gated: bool, dtype: torch.dtype) -> None:
        layer = kind == "layer"
        hidden, weight = torch.empty(4, depth, dtype=dtype), torch.empty(width * (1 + gated), depth, dtype=dtype)
        norm = Norm(kind, torch.empty(depth, dtype=dtype), torch.empty(depth, dtype=dtype) if layer else None, 1e-6)
        kernels.norm_mlp(
            hidden, norm, weight, torch.empty(len(weight), dtype=dtype) if layer else None, activation, gated
        )

    bf16 = torch.bfloat16
    yield Case("Llama-3.2-1B down", lambda: residual(2048, 8192, bf16), MEANT)
    yield Case("Llama-3.1-8B out", lambda: residual(4096, 4096, bf16), MEANT)
    yield Case("Gemma-3-1B down, post norm", lambda: residual(1152, 6912, bf16, "rms_unit_offset"), MEANT)
    yield Case("Llama-3.2-1B up", lambda: mlp("rms", 8192, 2048, "silu", True, bf16), MEANT)
    yield Case("Qwen3-0.6B up", lambda: mlp("rms", 3072, 1024, "silu", True, bf16), MEANT)
    yield Case("GPT-2 up", lambda: mlp("layer", 3072, 768, "gelu_tanh", False, torch.float16))
    yield Case("float32 up", lambda: mlp("rms_unit_offset", 1024, 256, "silu", True, torch.float32))
