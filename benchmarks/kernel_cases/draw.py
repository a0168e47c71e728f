from __future__ import annotations

from collections.abc import Iterator

import torch

from handloom_kernels import draw as kernels
from handloom_kernels import reference
from kernel_case import KernelCase


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """Gumbel draw and greedy choice from float32 scores, with the chosen token's log-probability."""
    shapes = ((2, 64),) if small else ((1, 128_256), (1, 262_144), (64, 128_256), (128, 131_072), (256, 151_936))
    for rows, vocab_size in shapes:
        scores = 3 * torch.randn(rows, vocab_size, device=device)
        seeds, positions = torch.arange(rows, device=device), torch.arange(rows, device=device)
        compiled = torch.compile(reference.draw)

        def by_multinomial(scores: torch.Tensor = scores) -> tuple[torch.Tensor, torch.Tensor]:
            logprobs = scores.log_softmax(-1)
            chosen = logprobs.exp().multinomial(1)
            return chosen, logprobs.gather(1, chosen)

        def by_argmax(scores: torch.Tensor = scores) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = scores.argmax(-1, keepdim=True)
            return chosen, scores.log_softmax(-1).gather(1, chosen)

        size = 4 * rows * vocab_size
        yield KernelCase(
            f"draw {rows} x {vocab_size}",
            lambda s=scores, a=seeds, b=positions: kernels.draw(s, a, b),
            {
                "torch.multinomial": by_multinomial,
                "torch.compile": lambda s=scores, a=seeds, b=positions, compiled=compiled: compiled(s, a, b),
            },
            bytes_moved=size,
            flops=130 * scores.numel(),
        )
        yield KernelCase(
            f"greedy {rows} x {vocab_size}",
            lambda s=scores: kernels.draw(s, None, None),
            {"torch": by_argmax},
            bytes_moved=size,
            flops=5 * scores.numel(),
        )
        top = min(20, vocab_size)
        yield KernelCase(
            f"greedy, top 20 {rows} x {vocab_size}",
            lambda s=scores, top=top: kernels.draw(s, None, None, top_n=top),
            {"torch.topk": lambda s=scores, top=top: s.log_softmax(-1).topk(top)},
            bytes_moved=size,
            flops=5 * scores.numel(),
        )
