"""Measures kernels in a process of its own, which may hang or die: kernels.py starts it and listens.

Line by line of JSON on stdout: {"begin": [kernel, case, who]} before anything that may fail, {"row": {...}} for us and
each peer, and first of all {"labels": {...}}, what all rows share. A call that fails is a row that says why; after an
error that leaves the GPU unusable the process ends with status LOST. On stdin: the cases that are done already,
[[kernel, case], ...].
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from kernel_case import KernelCase
from kernel_clock import Clock, ceilings
from kernel_report import COLUMNS, DTYPES, NEXT, OURS, failed

LOST = 3
Row = dict[str, Any]


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True, file=sys.__stdout__)


def measure(kernel: str, case: KernelCase, clock: Clock, roofs: tuple[float, float] | None) -> Iterator[Row]:
    """One row for us and one for each peer; without roofs (to fill the compilers' caches) only for what fails."""
    peers = {name: run for name, run in case.peers.items() if clock.on_gpu or "compile" not in name}
    results: dict[str, object] = {}
    works: dict[str, Callable[[], object]] = {}
    for peer, run in {OURS: case.run, **peers}.items():
        say(begin=[kernel, case.name, peer])
        try:
            results[peer] = run()
            works[peer] = run
            if clock.on_gpu:
                torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler or a device throws: it becomes the row, and the run goes on
            works.pop(peer, None)
            yield failed(kernel, case.name, peer, error)
            if is_lost(clock):
                return
    if roofs is None:
        return
    differences = {peer: "" if peer == OURS else difference(results.get(OURS), results[peer]) for peer in works}
    results.clear()
    say(begin=[kernel, case.name, OURS])
    for (peer, _), (times, method) in zip(works.items(), clock.in_turn(list(works.values())), strict=True):
        median = statistics.median(times)
        spread = statistics.quantiles(times, n=5) if len(times) > 1 else [median] * 4
        shown = (
            f"{median:.3f}",
            f"{spread[0]:.3f}",
            f"{spread[3]:.3f}",
            f"{case.bytes_moved / median / 1e3:.1f}",
            f"{case.flops / median / 1e6:.3f}",
            f"{1e8 * case.bytes_moved / median / roofs[0]:.1f}",
            f"{1e8 * case.flops / median / roofs[1]:.1f}",
            differences[peer],
        )
        yield {
            "kernel": kernel,
            "case": case.name,
            "peer": peer,
            **dict(zip(COLUMNS, shown, strict=True)),
            "method": method,
        }


def is_lost(clock: Clock) -> bool:
    """Does the GPU answer no more? After an illegal access a process cannot use it again."""
    if not clock.on_gpu:
        return False
    try:
        torch.ones(1, device=clock.device).sum().item()
    except RuntimeError:
        return True
    return False


def difference(ours: object, theirs: object) -> str:
    """Largest difference over largest value; empty where the two are not laid out alike."""
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        found = [float(part) for pair in zip(ours, theirs, strict=False) if (part := difference(*pair))]
        return f"{max(found):.2g}" if found else ""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or not ours.is_floating_point():
        return ""
    if ours.shape != theirs.shape or not ours.numel():
        return ""
    mine, other = ours.double().flatten(), theirs.double().flatten()
    finite = mine.isfinite() & other.isfinite()
    return f"{((mine - other)[finite].abs().max() / other[finite].abs().max()).item():.2g}" if finite.any() else ""


def labels(device: torch.device, dtype: torch.dtype, roofs: tuple[float, float]) -> Row:
    """What all rows share."""
    import common

    return {
        "copy GB/s": f"{roofs[0] / 1e9:.0f}",
        "matmul TFLOP/s": f"{roofs[1] / 1e12:.1f}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "revision": common.revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def compile_for_each_shape() -> None:
    """A compiled peer gets code of its own for every shape, as ours does, and never goes back to eager unnoticed."""
    import torch._dynamo

    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def work(kernel: str, clock: Clock, dtype: torch.dtype, small: bool, roofs: Any, done: set[tuple[str, str]]) -> None:
    """All cases of a kernel that are not done."""
    cases: Iterator[KernelCase] | None = None
    while True:
        say(begin=[kernel, NEXT, OURS])
        try:
            cases = cases or importlib.import_module(f"kernel_cases.{kernel}").cases(clock.device, dtype, small)
            case = next(cases, None)
        except Exception as error:  # as in `measure`: a case that cannot be made ends its kernel, not the run
            say(row=failed(kernel, NEXT, OURS, error))
            case = None
        if case is None:
            return
        if (kernel, case.name) in done:
            continue
        for row in measure(kernel, case, clock, roofs):
            say(row=row)
        if is_lost(clock):
            sys.exit(LOST)
        if clock.on_gpu and roofs is None:
            torch.cuda.empty_cache()  # others are at work beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--once", action="store_true", help="run every call once, untimed: the compilers keep the results"
    )
    arguments = parser.parse_args()
    sys.stdout = sys.stderr  # whatever others print is not for who listens
    done = {(kernel, case) for kernel, case in json.loads(sys.stdin.read() or "[]")}
    torch.manual_seed(0)
    clock, dtype = Clock(torch.device(arguments.device)), getattr(torch, arguments.dtype)
    roofs = None
    if clock.on_gpu:
        compile_for_each_shape()
    if not arguments.once:
        roofs = ceilings(clock, dtype, arguments.small)
        say(labels=labels(clock.device, dtype, roofs))
    for kernel in arguments.kernels:
        work(kernel, clock, dtype, arguments.small, roofs, done)


if __name__ == "__main__":
    main()
