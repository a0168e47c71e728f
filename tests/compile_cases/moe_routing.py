from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import Case
from handloom_kernels import moe_routing as kernels
from handloom_kernels.reference import Routing


def cases() -> Iterator[Case]:
    def run(experts: int, routing: Routing, dtype: torch.dtype) -> None:
        kernels.route(torch.empty(4, experts, dtype=dtype), routing)

    qwen3, gpt_oss = Routing(8, norm_topk_prob=True), Routing(4, norm_topk_prob=True)
    yield Case("Qwen3-30B-A3B", lambda: run(128, qwen3, torch.bfloat16), {"cuda": r"ld\.global[a-z0-9.:]*\.v2\.b32"})
    yield Case("gpt-oss-20b", lambda: run(32, gpt_oss, torch.bfloat16))
    yield Case("Mixtral-8x7B", lambda: run(8, Routing(2, norm_topk_prob=True), torch.bfloat16))
    yield Case("the most experts and choices", lambda: run(512, Routing(16), torch.float32))

    def deepseek() -> None:
        bias = torch.empty(256)
        run(256, Routing(8, "sigmoid", True, bias, 8, 4, 2.5), torch.float32)

    yield Case("DeepSeek-V3", deepseek)
    yield Case(
        "pairs of 4096 tokens sorted",
        lambda: kernels.sort_pairs(torch.empty(4096, 8, dtype=torch.int64), 128, 64),
        {"cuda": r"ld\.global[a-z0-9.:]*\.v2\.b64"},
    )
