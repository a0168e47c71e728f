"""Is programmatic dependent launch worth having? A chain of ten skinny products, captured in a graph, in three forms.

    python benchmarks/pdl.py                      on a GPU of compute capability 9.0 or more

off: a kernel begins when the one before has ended. launch: it begins while the one before ends, and waits before it
reads what that wrote (`griddepcontrol`). prefetch: and asks for its weights before it waits, for they depend on nobody.
Each kernel waits before its first dependent access, the first of the chain too. What comes out has to be equal to the
bit.

Nothing in handloom uses it: rows go to the table, and the decision is made from them.
"""
# ruff: noqa: N803

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

import common
from handloom.loading import DTYPES
from kernel_clock import Clock

FORMS = {"off": (False, False), "launch": (True, False), "prefetch": (True, True)}
CHAIN = 10
LINE = 128
"""Bytes that one request for a prefetch brings."""


@triton.jit
def _link_kernel(
    x,
    weight,
    out,
    rows,
    width,
    depth: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINE_VALUES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = x @ weight.T. x [rows, depth], at most 16 rows; weight [width, depth]."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    at = weight + columns.to(tl.int64)[:, None] * depth
    if PDL:
        gdc_launch_dependents()
        if PREFETCH:
            for start in range(0, depth, BLOCK_K):
                lines = at + start + tl.arange(0, BLOCK_K // LINE_VALUES)[None, :] * LINE_VALUES
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
                )
        gdc_wait()
    k, row = tl.arange(0, BLOCK_K), tl.arange(0, 16)
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        a = tl.load(x + row[:, None] * depth + start + k[None, :], mask=(row < rows)[:, None], other=0.0)
        b = tl.load(at + start + k[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    tl.store(out + row[:, None] * width + columns[None, :], acc, mask=(row < rows)[:, None] & inside[None, :])


def chain(x: Tensor, weights: list[Tensor], buffers: list[Tensor], form: str, *, block_n: int = 16) -> Tensor:
    """x [rows, n] through the weights [n, n]; each result to one of two buffers [rows, n], in turn."""
    overlapped, prefetched = FORMS[form]
    for at, weight in enumerate(weights):
        out = buffers[at % 2]
        width, depth = weight.shape
        _link_kernel[(triton.cdiv(width, block_n),)](
            x,
            weight,
            out,
            len(x),
            width,
            depth,
            PDL=overlapped,
            PREFETCH=prefetched,
            LINE_VALUES=LINE // x.element_size(),
            BLOCK_N=block_n,
            BLOCK_K=min(depth, 256),
            num_warps=4,
            **({"launch_pdl": True} if overlapped else {}),
        )
        x = out
    return x


def measure(rows: int, size: int, clock: Clock, dtype: torch.dtype, results: common.Results) -> bool:
    """Rows of every form that runs here. False: one gave other bits."""
    case = f"{CHAIN} of {rows} x {size} x {size}"
    x = torch.randn(rows, size, device=clock.device, dtype=dtype)
    weights = [torch.randn(size, size, device=clock.device).mul_(size**-0.5).to(dtype) for _ in range(CHAIN)]
    able = clock.on_gpu and torch.cuda.get_device_capability(clock.device) >= (9, 0)
    forms = [form for form, (overlapped, _) in FORMS.items() if able or not overlapped]
    runs: dict[str, Callable[[], object]] = {}
    found: dict[str, Tensor] = {}
    for form in forms:
        buffers = [torch.full_like(x, torch.nan) for _ in range(2)]
        runs[form] = lambda form=form, buffers=buffers: chain(x, weights, buffers, form)  # type: ignore[misc]
        found[form] = chain(x, weights, buffers, form).clone()
    same = all(torch.equal(out, found["off"]) for out in found.values())
    moved = CHAIN * weights[0].nbytes
    for form, (us, _) in zip(runs, clock.in_turn(list(runs.values())), strict=True):
        results.add(form, case, "kernel", "us", [each / CHAIN for each in us])
        results.add(form, case, "GB/s", "GB/s", [moved / each / 1e3 for each in us])
    results.add("all", case, "same bits", "", [same])
    return same and bool(found["off"].isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "gpu.jsonl")
    arguments = parser.parse_args()
    import report_gpu

    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    results = common.open_results("gpu pdl", arguments.output, device, dtype, model="a chain of products")
    sizes = (64,) if arguments.small else (1024, 2048, 4096)
    right = [measure(rows, size, Clock(device), dtype, results) for size in sizes for rows in (1, 16)]
    print(report_gpu.markdown(results.rows), end="")
    if not all(right):
        sys.exit("the forms do not give the same bits, or not finite ones")


if __name__ == "__main__":
    main()
