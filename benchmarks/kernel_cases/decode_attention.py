from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from handloom_kernels import decode_attention as kernels
from kernel_case import KernelCase

LLAMA = (32, 8, 128)
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def paged(
    device: torch.device, dtype: torch.dtype, batch: int, context: int, heads: tuple[int, int, int], queries: int = 1
) -> tuple[Tensor, ...]:
    """What decode_attention takes first; the pages of a sequence lie in any order."""
    num_heads, num_kv_heads, head_dim = heads
    page_size = 16
    pages = -(-context // page_size)
    q = torch.randn(batch * queries, num_heads, head_dim, device=device, dtype=dtype)
    k_pages, v_pages = (
        torch.randn(batch * pages, page_size, num_kv_heads, head_dim, device=device, dtype=dtype) for _ in "kv"
    )
    table = torch.randperm(batch * pages, device=device).view(batch, pages)
    starts = torch.arange(0, batch * queries + 1, queries, device=device)
    return q, k_pages, v_pages, table, starts, torch.full((batch,), context, device=device)


def peers(args: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    """PyTorch's attention over the same keys and values laid end to end, which spares it the pages. A group's heads are
    given as queries, so that it too reads every key once."""
    q, k_pages, v_pages, table, _, lengths = args
    batch, kv_heads = len(lengths), k_pages.shape[2]
    k, v = (x[table].flatten(1, 2).transpose(1, 2).contiguous() for x in (k_pages, v_pages))
    queries = q.view(batch, kv_heads, -1, q.shape[-1])

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(queries, k, v).view(batch, -1)

    found: dict[str, Callable[[], object]] = {}
    for name, backend in BACKENDS.items():
        try:
            run(backend)
        except RuntimeError as error:  # no such backend on this device, or not for these shapes
            print(f"  {name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            found[f"{name}, contiguous"] = partial(run, backend)
    return found


def case(
    name: str,
    args: tuple[Tensor, ...],
    window: int | None = None,
    queries: int = 1,
    compare: bool = True,
    **options: Tensor,
) -> KernelCase:
    """To move: the keys and values that are seen, once."""
    q, k_pages, v_pages, _, _, lengths = args
    tickets = torch.zeros(q.shape[0] * q.shape[1], dtype=torch.int32, device=q.device)  # as an engine would keep them
    context = args[3].shape[1] * k_pages.shape[1]
    seen = len(lengths) * min(context, context if window is None else window + queries - 1) * k_pages.shape[2]
    latent = k_pages.untyped_storage() is v_pages.untyped_storage()
    columns = k_pages.shape[-1] + (0 if latent else v_pages.shape[-1])

    def run() -> object:
        return kernels.decode_attention(
            *args, q.shape[-1] ** -0.5, window, max_query_len=queries, tickets=tickets, **options
        )

    return KernelCase(
        name,
        run,
        peers(args) if compare else {},
        bytes_moved=seen * (columns * k_pages.element_size() + 4 * len(options)),
        flops=2 * seen * (k_pages.shape[-1] + v_pages.shape[-1]) * queries * q.shape[1] // k_pages.shape[2],
    )


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[KernelCase]:
    """Llama 3.1 8B by batch and context, then other shapes. Tables are as wide as the context."""
    if small:
        yield case("small", paged(device, dtype, 2, 64, (4, 2, 16)))
        return
    for batch in (1, 8, 64):
        for context in (512, 4096, 32768):
            if batch * context <= 1 << 18:
                args = paged(device, dtype, batch, context, LLAMA)
                yield case(f"Llama-3.1-8B, batch {batch}, {context} keys", args)
    yield case("Qwen3-0.6B, batch 1, 512 keys", paged(device, dtype, 1, 512, (16, 8, 128)))
    yield case("GPT-2, batch 1, 1024 keys", paged(device, dtype, 1, 1024, (12, 12, 64)))
    for queries in (4, 16):
        args = paged(device, dtype, 8, 4096, LLAMA, queries)
        yield case(f"Llama-3.1-8B, batch 8, 4096 keys, {queries} queries", args, queries=queries, compare=False)
    args = paged(device, dtype, 8, 4096, (64, 8, 64))
    yield case("gpt_oss, batch 8, window 128 of 4096 keys", args, 128, compare=False)
    q, k_pages, v_pages, *rest = paged(device, dtype, 8, 4096, LLAMA)
    codes = [(32 * x).clamp(-127, 127).to(torch.int8) for x in (k_pages, v_pages)]
    scale = torch.full(k_pages.shape[:3], 1 / 32, device=device)
    yield case(
        "Llama-3.1-8B, batch 8, 4096 keys, int8", (q, *codes, *rest), compare=False, k_scales=scale, v_scales=scale
    )
    for heads in (16, 128):
        q, k_pages, _, *rest = paged(device, dtype, 8, 4096, (heads, 1, 576))
        yield case(f"latent, {heads} heads, batch 8, 4096 keys", (q, k_pages, k_pages[..., :512], *rest), compare=False)
