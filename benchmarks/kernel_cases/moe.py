from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import moe as kernels
from handloom_kernels import reference
from handloom_kernels.reference import Routing, gated_activation
from kernel_case import KernelCase

MODELS = {  # experts, experts per token, hidden size, intermediate size, activation, biases
    "Qwen3-30B-A3B": (128, 8, 2048, 768, "silu", False),
    "gpt-oss-20b": (32, 4, 2880, 2880, "swiglu_oss", True),
    "Mixtral-8x7B": (8, 2, 4096, 14336, "silu", False),
}


def loop(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    b_up: Tensor | None,
    b_down: Tensor | None,
) -> Tensor:
    """Expert by expert, the host asking who was chosen: as transformers' eager way."""
    total = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        rows, choice = torch.where(ids == expert)
        up = F.linear(x[rows], w_up[expert], None if b_up is None else b_up[expert])
        out = F.linear(gated_activation(up, act), w_down[expert], None if b_down is None else b_down[expert])
        total.index_add_(0, rows, (out * weights[rows, choice, None]).to(x.dtype))
    return total


def grouped(x: Tensor, weights: Tensor, ids: Tensor, w_up: Tensor, w_down: Tensor, act: str) -> Tensor:
    """Sorted by expert, torch's own grouped product."""
    flat, top_k = ids.flatten(), ids.shape[1]
    order = flat.argsort(stable=True)
    ends = F.one_hot(flat, len(w_up)).sum(0).cumsum(0).to(torch.int32)
    up = torch._grouped_mm(x[order // top_k], w_up.mT, offs=ends)
    out = torch._grouped_mm(gated_activation(up, act), w_down.mT, offs=ends)
    parts = torch.empty_like(out).index_copy_(0, order, out * weights.flatten()[order, None].to(x.dtype))
    return parts.view(*ids.shape, -1).sum(1)


def gathered(x: Tensor, weights: Tensor, ids: Tensor, w_up: Tensor, w_down: Tensor, act: str) -> Tensor:
    """The chosen weights gathered, which a compiler may fuse into the products: for very few tokens."""
    up = gated_activation(torch.einsum("nkih,nh->nki", w_up[ids], x), act)
    out = torch.einsum("nkhi,nki->nkh", w_down[ids], up)
    return (out * weights[..., None].to(x.dtype)).sum(1)


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The routed experts of one layer, for decode and for a prompt; uniform random choices."""
    shapes = {"tiny": (4, 2, 32, 16, "silu", False)} if small else MODELS
    compiled = torch.compile(gathered)
    for name, (experts, top_k, hidden, inner, act, biases) in shapes.items():
        w_up = torch.randn(experts, 2 * inner, hidden, device=device, dtype=dtype) * hidden**-0.5
        w_down = torch.randn(experts, hidden, inner, device=device, dtype=dtype) * inner**-0.5
        b_up, b_down = (torch.randn(experts, size, device=device, dtype=dtype) for size in (2 * inner, hidden))
        given = (b_up, b_down) if biases else (None, None)
        for tokens in (2,) if small else (1, 4, 16, 64, 512, 4096):
            x = torch.randn(tokens, hidden, device=device, dtype=dtype)
            logits = torch.randn(tokens, experts, device=device)
            weights, ids = reference.route(logits, Routing(top_k, norm_topk_prob=True))
            given_all = (x, weights, ids, w_up, w_down, act)
            peers: dict[str, Callable[[], object]] = {"torch loop": lambda a=given_all, b=given: loop(*a, *b)}
            if not biases and hasattr(torch, "_grouped_mm") and dtype == torch.bfloat16 and device.type == "cuda":
                peers["torch grouped"] = lambda a=given_all: grouped(*a)
            if not biases and tokens <= 4:
                peers["torch.compile gathered"] = lambda a=given_all: compiled(*a)
            hit = len(ids.unique())
            yield KernelCase(
                f"{name}, {tokens} tokens",
                lambda a=given_all, b=given: kernels.moe_mlp(*a, True, *b),
                peers,
                bytes_moved=hit * 3 * inner * hidden * x.element_size() + 2 * x.nbytes,
                flops=6 * tokens * top_k * hidden * inner,
            )
