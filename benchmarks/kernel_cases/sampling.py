from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from handloom_kernels import sampling as kernels
from handloom_kernels.reference import Penalties, TokenState
from kernel_case import KernelCase


def dense(logits: Tensor, counts: Tensor, seen: Tensor, r: Tensor, f: Tensor, p: Tensor) -> Tensor:
    """The three penalties from dense counts and flags, as engines do it in torch."""
    scores = torch.where(seen, torch.where(logits < 0, logits * r, logits / r), logits)
    return scores - counts * f - (counts > 0) * p


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """Three penalties over 1000 distinct tokens a row; and a grammar's bitmask."""
    shapes = ((2, 64, 10),) if small else ((1, 128_256, 1000), (64, 128_256, 1000), (256, 151_936, 1000))
    for rows, vocab_size, distinct in shapes:
        logits = 3 * torch.randn(rows, vocab_size, device=device)
        seen = torch.zeros(rows, -(-vocab_size // 32), dtype=torch.int32, device=device)
        state = TokenState(seen, torch.zeros(rows, vocab_size, dtype=torch.int32, device=device))
        token_ids = torch.stack([torch.randperm(vocab_size)[:distinct] for _ in range(rows)]).to(device)
        kernels.count_tokens(state, torch.arange(rows, device=device).repeat_interleave(distinct), token_ids.flatten())
        flags = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device).scatter_(1, token_ids, True)
        values = [torch.full((rows,), value, device=device) for value in (1.2, 0.3, 0.5)]
        columns = [value[:, None] for value in values]
        compiled = torch.compile(dense)
        yield KernelCase(
            f"penalties {rows} x {vocab_size}",
            lambda x=logits, state=state, values=values: kernels.adjust_logits(x, state, Penalties(*values)),
            {
                "torch": lambda x=logits, s=state, m=flags, c=columns: dense(x, s.counts, m, *c),
                "torch.compile": lambda x=logits, s=state, m=flags, c=columns, f=compiled: f(x, s.counts, m, *c),
            },
            bytes_moved=rows * (8 * vocab_size + vocab_size // 8 + 32 * distinct),
            flops=6 * logits.numel(),
        )
        allowed = torch.randint(-(2**31), 2**31 - 1, seen.shape, dtype=torch.int32, device=device)
        mask = torch.rand(rows, vocab_size, device=device) > 0.5
        yield KernelCase(
            f"grammar {rows} x {vocab_size}",
            lambda x=logits, allowed=allowed: kernels.adjust_logits(x, allowed=allowed),
            {"torch, mask of bytes": lambda x=logits, mask=mask: x.masked_fill(mask, -torch.inf)},
            bytes_moved=rows * (8 * vocab_size + vocab_size // 8),
        )
