from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import moe as kernels


def cases() -> Iterator[Case]:
    def run(
        tokens: int,
        experts: int,
        top_k: int,
        hidden: int,
        inner: int,
        activation: str,
        biases: bool,
        dtype: torch.dtype,
    ) -> None:
        x, weights = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens, top_k)
        expert_ids = torch.empty(tokens, top_k, dtype=torch.int64)
        w_up = torch.empty(experts, 2 * inner, hidden, dtype=dtype)
        w_down = torch.empty(experts, hidden, inner, dtype=dtype)
        b_up, b_down = torch.empty(experts, 2 * inner, dtype=dtype), torch.empty(experts, hidden, dtype=dtype)
        given = (b_up, b_down) if biases else (None, None)
        kernels.moe_mlp(x, weights, expert_ids, w_up, w_down, activation, True, *given)

    def patterns(wgmma_columns: str) -> dict[str, str]:
        """Tiles of all sizes use one instruction; on sm_90 its number of columns differs, on sm_100 its descriptor."""
        return {
            "cuda": r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10",
            "sm_80": r"mma\.sync\.aligned\.m16n8k16",
            "sm_90": rf"wgmma\.mma_async\.sync\.aligned\.m64n{wgmma_columns}k16",
            "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f16",
            "hip": r"v_mfma_f32_16x16x16_bf16",
        }

    qwen3, gpt_oss, mixtral = (128, 8, 2048, 768), (32, 4, 2880, 2880), (8, 2, 4096, 14336)
    bf16, fp32 = torch.bfloat16, torch.float32
    yield Case("Qwen3-30B-A3B, 1 token", lambda: run(1, *qwen3, "silu", False, bf16), patterns("16"))
    yield Case("gpt-oss-20b, 16 tokens", lambda: run(16, *gpt_oss, "swiglu_oss", True, bf16), patterns("16"))
    yield Case("Qwen3-30B-A3B, 512 tokens", lambda: run(512, *qwen3, "silu", False, bf16), patterns("64"))
    yield Case("Mixtral-8x7B, 4096 tokens", lambda: run(4096, *mixtral, "silu", False, bf16), patterns("128"))
    yield Case("float32, 2 tokens", lambda: run(2, *mixtral, "silu", False, fp32))
    yield Case("float32, 4096 tokens", lambda: run(4096, *mixtral, "silu", False, fp32))
