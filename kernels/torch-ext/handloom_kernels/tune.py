"""Find the fastest block sizes on this machine's GPU: `python -m handloom_kernels.tune [KERNEL ...]`.

Every kernel module offers `tuning_problems(device)`. Each problem's candidates are timed (median of CUDA-graph replays;
before each launch a buffer larger than the second-level cache is read, so that weights and pages come from memory as in
a model), those that do not compile, do not fit or give another result are left out, and the winner goes into
tuning/<device>.json. Run it again after a change of kernel, Triton or driver.

This module does not know any kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
import triton
from torch import Tensor

from . import KERNELS
from . import __getattr__ as kernel_named
from .checks import require
from .tuning import FOLDER, Problem, device_file, device_name

Timer = Callable[[Callable[[], object]], float]


def agrees(result: Any, expected: Any) -> bool:
    """Are two results the same up to the rounding of their dtypes?"""
    if isinstance(expected, Tensor):
        if not expected.is_floating_point():
            return bool(torch.equal(result, expected))
        tolerance = 16 * torch.finfo(expected.dtype).eps
        scale = max(float(expected.abs().max()), 1e-30) if expected.numel() else 1.0
        return bool((result.double() - expected.double()).abs().max() <= tolerance * scale)
    return all(agrees(mine, theirs) for mine, theirs in zip(result, expected))


def timer(device: torch.device) -> Timer:
    """A function that times a call on the device, in microseconds, with nothing of it in the second-level cache."""
    cache = torch.randn(torch.cuda.get_device_properties(device).L2_cache_size // 2, device=device)

    def swept(run: Callable[[], object]) -> float:
        def both() -> None:
            cache.amax()
            run()

        return 1000 * float(triton.testing.do_bench_cudagraph(both, return_mode="median"))

    sweep = swept(lambda: None)
    return lambda run: swept(run) - sweep


def best(problem: Problem, time: Timer) -> tuple[dict[str, int], float]:
    """(the fastest candidate, its microseconds). Raises KernelError where none works."""
    expected = problem.run()
    times: dict[str, float] = {}
    for candidate in problem.candidates:
        name, run = json.dumps(dict(candidate)), partial(problem.run, blocks=candidate)
        try:
            if agrees(run(), expected):
                times[name] = time(run)
            else:
                print(f"  {name}: another result, left out", file=sys.stderr)
        except (triton.CompilationError, triton.runtime.errors.OutOfResources) as error:
            print(f"  {name}: {type(error).__name__}, left out", file=sys.stderr)
    require(bool(times), f"none of the candidates for {dict(problem.when)} works here")
    winner = min(times, key=lambda name: times[name])
    return dict(json.loads(winner)), times[winner]


def tune(kernels: list[str], device: torch.device, folder: Path) -> Path:
    """Tune these kernels and write their entries; other kernels' entries in the file stay. Returns the file."""
    time = timer(device)
    path = folder / f"{device_file(device_name(device))}.json"
    content: dict[str, list[Mapping[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}
    for kernel in kernels:
        entries: list[Mapping[str, Any]] = []
        for problem in kernel_named(kernel).tuning_problems(device):
            winner, microseconds = best(problem, time)
            entries.append({"when": dict(problem.when), "config": winner})
            print(f"{kernel} {dict(problem.when)}: {winner}, {microseconds:.2f} us", file=sys.stderr)
        content[kernel] = entries
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: all of {', '.join(KERNELS)}")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the JSON files")
    arguments = parser.parse_args()
    unknown = set(arguments.kernels) - set(KERNELS)
    if unknown:
        parser.error(f"no kernel is called {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here to time kernels on")
    print(tune(arguments.kernels or list(KERNELS), torch.device("cuda"), arguments.output))


if __name__ == "__main__":
    main()
