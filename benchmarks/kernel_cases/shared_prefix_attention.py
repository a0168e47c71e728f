from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from handloom_kernels import reference
from handloom_kernels import shared_prefix_attention as kernels
from handloom_kernels.decode_attention import decode_attention
from kernel_case import KernelCase


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """Llama 3.1 8B: many sequences behind one prefix, against decoding that reads the prefix for each of them."""
    num_heads, num_kv_heads, head_dim = (4, 2, 16) if small else (32, 8, 128)
    page_size, own = 16, 16 if small else 128
    for batch, length in ((2, 32),) if small else ((8, 4096), (64, 1024), (64, 8192), (256, 4096)):
        count = (length + batch * own) // page_size
        q = torch.randn(batch, num_heads, head_dim, device=device, dtype=dtype)
        k, v = (torch.randn(count, page_size, num_kv_heads, head_dim, device=device, dtype=dtype) for _ in "kv")
        ids = torch.randperm(count, device=device)
        prefix, table = ids[: length // page_size], ids[length // page_size :].view(batch, -1)
        starts, lengths = torch.arange(batch + 1, device=device), torch.full((batch,), own, device=device)
        tickets = torch.zeros(batch * num_heads, dtype=torch.int32, device=device)
        scale = head_dim**-0.5

        def run(
            args: tuple[Tensor | int, ...] = (q, k, v, prefix, length, table, starts, lengths, scale),
            tickets: Tensor = tickets,
        ) -> object:
            return kernels.shared_prefix_attention(*args, max_query_len=1, tickets=tickets)

        whole = torch.cat((prefix.expand(batch, -1), table), dim=1)

        def apart(
            args: tuple[Tensor, ...] = (q, k, v, whole, starts, lengths + length, scale), tickets: Tensor = tickets
        ) -> object:
            return decode_attention(*args, max_query_len=1, tickets=tickets)

        element = num_kv_heads * head_dim * q.element_size()
        yield KernelCase(
            f"{batch} sequences, prefix {length}, {own} own keys",
            run,
            {"decode_attention": apart},
            bytes_moved=2 * element * (length + batch * own),
            flops=4 * batch * (length + own) * num_heads * head_dim,
        )
    for rows in (2,) if small else (64, 4096):
        first, second = (torch.randn(rows, num_heads * head_dim, device=device, dtype=dtype) for _ in range(2))
        first_lse, second_lse = (torch.randn(rows, num_heads, device=device) for _ in range(2))
        args = (first, first_lse, second, second_lse)
        plain = torch.compile(reference.merge_attention)
        yield KernelCase(
            f"merge {rows} rows",
            lambda args=args: kernels.merge_attention(*args),
            {"torch.compile": lambda args=args, plain=plain: plain(*args)},
            bytes_moved=3 * first.numel() * first.element_size() + 3 * 4 * first_lse.numel(),
            flops=4 * first.numel(),
        )
