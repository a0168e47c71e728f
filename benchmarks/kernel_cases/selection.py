from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from handloom_kernels import selection as kernels
from kernel_case import KernelCase


def by_topk(scores: Tensor, k: int) -> Tensor:
    return scores.masked_fill(scores < scores.topk(k).values[:, -1:], -torch.inf)


def by_sort(scores: Tensor, p: float) -> Tensor:
    """top-p as transformers does it."""
    ascending, token_ids = scores.sort(dim=-1)
    cut = ascending.softmax(-1).cumsum(-1) <= 1 - p
    cut[:, -1] = False
    return scores.masked_fill(cut.scatter(1, token_ids, cut), -torch.inf)


def by_topk_and_sort(scores: Tensor, k: int, p: float) -> Tensor:
    """Both, sorting only the k: quicker than transformers' way, and without its ties."""
    values, token_ids = scores.topk(k)
    probabilities = values.softmax(-1)
    cut = probabilities.cumsum(-1) - probabilities >= p
    return torch.full_like(scores, -torch.inf).scatter_(1, token_ids, values.masked_fill(cut, -torch.inf))


def by_share(scores: Tensor, p: float) -> Tensor:
    """Tokens less likely than p times the best to -inf."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """top-k, top-p, both, and min-p, of normal float32 scores with deviation 3: flatter than most that a language model
    gives, so that top-p keeps thousands of tokens."""
    shapes = ((2, 64),) if small else ((1, 128_256), (1, 262_144), (64, 128_256), (128, 131_072), (256, 151_936))
    for rows, vocab_size in shapes:
        scores = 3 * torch.randn(rows, vocab_size, device=device)
        k = min(50, vocab_size)
        temperature, top_p = (torch.full((rows,), value, device=device) for value in (0.8, 0.9))
        min_p = torch.full((rows,), 0.05, device=device)
        top_k = torch.full((rows,), k, dtype=torch.int32, device=device)
        compiled = torch.compile(by_sort)

        def both(scores: Tensor = scores, k: int = k) -> Tensor:
            return by_sort(by_topk(scores / 0.8, k), 0.9)

        peers = {
            "top-k": {"torch.topk": lambda s=scores, k=k: by_topk(s / 0.8, k)},
            "top-p": {
                "torch.sort": lambda s=scores: by_sort(s / 0.8, 0.9),
                "torch.compile": lambda s=scores, compiled=compiled: compiled(s / 0.8, 0.9),
            },
            "top-k and top-p": {
                "torch": both,
                "torch.topk, sorted": lambda s=scores, k=k: by_topk_and_sort(s / 0.8, k, 0.9),
            },
            "min-p": {"torch": lambda s=scores: by_share(s / 0.8, 0.05)},
        }
        given = {
            "top-k": (top_k, None, None),
            "top-p": (None, top_p, None),
            "top-k and top-p": (top_k, top_p, None),
            "min-p": (None, None, min_p),
        }
        for name, rules in given.items():
            yield KernelCase(
                f"{name} {rows} x {vocab_size}",
                lambda s=scores, t=temperature, rules=rules: kernels.select(s, t, *rules),
                peers[name],
                bytes_moved=8 * rows * vocab_size,
                flops=5 * scores.numel(),
            )
        yield KernelCase(
            f"top-k and top-p, cuts alone {rows} x {vocab_size}",
            lambda s=scores, t=temperature, k=top_k, p=top_p: kernels.find_cuts(s, t, k, p),
            {"torch": both},
            bytes_moved=4 * rows * vocab_size,
            flops=5 * scores.numel(),
        )
