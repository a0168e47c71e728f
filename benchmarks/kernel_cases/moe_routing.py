from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from handloom_kernels import moe_routing as kernels
from handloom_kernels import reference
from handloom_kernels.reference import Routing
from kernel_case import KernelCase


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The choice of experts, and the sort of a prompt's pairs by expert."""
    bias = 0.1 * torch.randn(256, device=device)
    rules = {
        "Qwen3-30B-A3B": (128, Routing(8, norm_topk_prob=True)),
        "DeepSeek-V3": (256, Routing(8, "sigmoid", True, bias, 8, 4, 2.5)),
    }
    compiled = torch.compile(reference.route)
    for name, (experts, routing) in rules.items():
        for tokens in (2,) if small else (1, 64, 4096):
            logits = torch.randn(tokens, experts, device=device, dtype=dtype)
            yield KernelCase(
                f"{name}, {tokens} tokens",
                lambda logits=logits, routing=routing: kernels.route(logits, routing),
                {
                    "torch": lambda logits=logits, routing=routing: reference.route(logits, routing),
                    "torch.compile": lambda logits=logits, routing=routing: compiled(logits, routing),
                },
                bytes_moved=logits.nbytes + 12 * tokens * routing.top_k,
            )

    def sort(expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        order = expert_ids.flatten().argsort(stable=True)
        return order, expert_ids.flatten().bincount(minlength=128).cumsum(0)

    for tokens in (4,) if small else (512, 4096):
        expert_ids = torch.randn(tokens, 128, device=device).topk(8).indices
        yield KernelCase(
            f"sort of {tokens} x 8 by 128 experts",
            lambda ids=expert_ids: kernels.sort_pairs(ids, 128, 64),
            {"torch": lambda ids=expert_ids: sort(ids)},
            bytes_moved=expert_ids.nbytes + 4 * expert_ids.numel(),
        )
