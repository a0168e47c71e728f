"""Measures kernels in a process of its own, which may hang or die: kernels.py starts it and listens.

Line by line of JSON on stdout: {"labels": {...}} first of all, what all rows of the long table share; {"begin":
[kernel, case, who]} before anything that may fail; {"rows": [{...}, ...]} of us or a peer. A call that fails is a row
that says why; after an error that leaves the GPU unusable the process ends with status LOST. On stdin: the cases that
are done already, [[kernel, case, device, dtype, revision], ...].
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
from common import Rates, Results, add_use
from kernel_case import KernelCase
from kernel_clock import Clock, ceilings
from kernel_report import DTYPES, NEXT, OURS, SUITE, TIME, add_failure

LOST = 3
TESTS = Path(__file__).resolve().parent.parent / "tests"


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True, file=sys.__stdout__)


def say_rows(results: Results) -> None:
    """Those that are not said yet."""
    say(rows=results.rows)
    results.rows.clear()


def measure(kernel: str, case: KernelCase, clock: Clock, rates: Rates | None, results: Results) -> None:
    """Say rows of us and of each peer; without rates (to fill the compilers' caches) only of what fails."""
    peers = {name: run for name, run in case.peers.items() if clock.on_gpu or "compile" not in name}
    found: dict[str, object] = {}
    works: dict[str, Callable[[], object]] = {}
    for peer, run in {OURS: case.run, **peers}.items():
        say(begin=[kernel, case.name, peer])
        try:
            found[peer] = run()
            works[peer] = run
            if clock.on_gpu:
                torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler or a device throws: it becomes the row, and the run goes on
            works.pop(peer, None)
            add_failure(results, peer, case.name, error)
            say_rows(results)
            if is_lost(clock):
                return
    if rates is None:
        return
    differences = {peer: difference(found.get(OURS), found[peer]) for peer in works if peer != OURS}
    found.clear()
    for peer, why in case.missing.items():
        add_failure(results, peer, case.name, why)
    say(begin=[kernel, case.name, OURS])
    for (peer, _), (us, method) in zip(works.items(), clock.in_turn(list(works.values())), strict=True):
        results.add(peer, case.name, TIME, "us", us, method=method)
        add_use(results, peer, case.name, [each / 1e6 for each in us], case.bytes_moved, case.flops, rates)
        apart = differences.get(peer)
        if apart is not None:
            results.add(peer, case.name, "difference from ours", "", [apart])
    say_rows(results)


def is_lost(clock: Clock) -> bool:
    """Does the GPU answer no more? After an illegal access a process cannot use it again."""
    if not clock.on_gpu:
        return False
    try:
        torch.ones(1, device=clock.device).sum().item()
    except RuntimeError:
        return True
    return False


def difference(ours: object, theirs: object) -> float | None:
    """Largest difference over largest value; None where the two are not laid out alike."""
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        found = [part for pair in zip(ours, theirs, strict=False) if (part := difference(*pair)) is not None]
        return max(found, default=None)
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or not ours.is_floating_point():
        return None
    if ours.shape != theirs.shape or not ours.numel():
        return None
    mine, other = ours.double().flatten(), theirs.double().flatten()
    finite = mine.isfinite() & other.isfinite()
    if not finite.any():
        return None
    return ((mine - other)[finite].abs().max() / other[finite].abs().max().clamp(min=1e-30)).item()


def compile_for_each_shape() -> None:
    """A compiled peer gets code of its own for every shape, as ours does, and never goes back to eager unnoticed."""
    import torch._dynamo

    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def work(
    kernel: str, clock: Clock, arguments: argparse.Namespace, rates: Rates | None, results: Results, done: set[str]
) -> None:
    """All cases of a kernel that are not done, the roofs before the first."""
    cases: Iterator[KernelCase] | None = None
    dtype, told = getattr(torch, arguments.dtype), False
    while True:
        say(begin=[kernel, NEXT, OURS])
        try:
            of_kernel = importlib.import_module(f"kernel_cases.{kernel}")
            cases = cases or of_kernel.cases(clock.device, dtype, arguments.small)
            case = next(cases, None)
        except Exception as error:  # as in `measure`: a case that cannot be made ends its kernel, not the run
            add_failure(results, OURS, NEXT, error)
            say_rows(results)
            case = None
        if case is None:
            return
        if case.name in done:
            continue
        if rates is not None and not told:
            rates.tell(results)
            told = True
        measure(kernel, case, clock, rates, results)
        if is_lost(clock):
            sys.exit(LOST)
        if clock.on_gpu and rates is None:
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
    kept = json.loads(sys.stdin.read() or "[]")
    torch.manual_seed(0)
    clock, dtype = Clock(torch.device(arguments.device)), getattr(torch, arguments.dtype)
    shared = common.open_results(SUITE, None, clock.device, dtype).labels
    if clock.on_gpu:
        compile_for_each_shape()
    else:
        sys.path.append(str(TESTS))
        from interpreter import mend_interpreter

        mend_interpreter()
    rates = None
    say(labels=shared)
    if not arguments.once:
        copied, multiplied = ceilings(clock, dtype, arguments.small)
        rates = Rates.known(copied, copied, multiplied, dtype, clock.device)
    here = [shared[name] for name in ("device", "dtype", "revision")]
    for kernel in arguments.kernels:
        done = {case for other, case, *where in kept if other == kernel and where == here}
        work(kernel, clock, arguments, rates, Results(None, {**shared, "model": kernel}, show=lambda _: None), done)


if __name__ == "__main__":
    main()
