from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import draw, reference
from handloom_kernels import lm_head as kernels
from handloom_kernels.reference import Norm
from kernel_case import KernelCase


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """The head with a Gumbel draw, without writing the logits; against cuBLAS and a draw from its logits."""
    # Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B, Qwen3-8B
    heads = ((64, 32),) if small else ((151_936, 1024), (128_256, 2048), (128_256, 4096), (151_936, 4096))
    for vocab_size, width in heads:
        weight = torch.randn(vocab_size, width, device=device, dtype=dtype) / width**0.5
        norm = Norm("rms", torch.ones(width, device=device, dtype=dtype), None, 1e-6)
        for rows in (2,) if small else (1, 4, 16, 64):
            hidden = torch.randn(rows, width, device=device, dtype=dtype)
            seeds, positions = torch.arange(rows, device=device), torch.arange(rows, device=device)

            def by_cublas(hidden: Tensor = hidden, norm: Norm = norm, weight: Tensor = weight) -> Tensor:
                logits = F.linear(F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.eps), weight).float()
                return logits.softmax(-1).multinomial(1)

            def by_cublas_and_draw(
                hidden: Tensor = hidden,
                norm: Norm = norm,
                weight: Tensor = weight,
                seeds: Tensor = seeds,
                positions: Tensor = positions,
            ) -> Tensor:
                return draw.draw(reference.lm_head(hidden, norm, weight, None), seeds, positions).token_ids

            size = weight.numel() * weight.element_size()
            flops = 2 * rows * weight.numel()
            yield KernelCase(
                f"head and draw {rows} x {width} x {vocab_size}",
                lambda h=hidden, n=norm, w=weight, s=seeds, p=positions: kernels.lm_head_choose(
                    h, n, w, None, None, None, s, p
                ),
                {"cuBLAS + multinomial": by_cublas, "cuBLAS + our draw": by_cublas_and_draw},
                bytes_moved=size,
                flops=flops,
            )
            yield KernelCase(
                f"head, logits {rows} x {width} x {vocab_size}",
                lambda h=hidden, n=norm, w=weight: kernels.lm_head(h, n, w, None),
                {"cuBLAS": lambda h=hidden, n=norm, w=weight: reference.lm_head(h, n, w, None)},
                bytes_moved=size + 4 * rows * vocab_size,
                flops=flops,
            )
