"""What a decode step on the Triton backend would launch on a GPU that is not there: `python tests/step_launches.py`.

A model in the shape of a real one and the tensors of a step are fake, shapes without memory on "cuda", so that an
operation on tensors of two devices, or one that asks a tensor for its values, fails here as it would fail a capture.
One JSON object per step to stdout: its launches (kernel, grid, how often) and what torch itself does.

Must run in a process of its own, without TRITON_INTERPRET. Nothing here knows what a kernel computes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import ahead_of_time
from handloom.cache.pages import PagePool
from handloom.engine.decode_step import DecodeStep
from handloom.loading import PAGE_SIZE
from handloom.model.families import read_config
from handloom.model.spec import model_parameters
from handloom.model.transformer import Transformer
from handloom.ops import choose_backend
from handloom_kernels import tuning

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

MOST_BLOCKS = (2**31 - 1, 65_535, 65_535)
CUDA = torch.device("cuda", 0)


class Views(TorchFunctionMode):
    """Takes views of fake tensors by functions: `[...]` asks for a CUDA that torch may be built without."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        view, index = args
        dim = 0
        for each in index if isinstance(index, tuple) else (index,):
            if each is None:
                view = view.unsqueeze(dim)
            elif isinstance(each, int):
                view, dim = view.select(dim, each), dim - 1
            else:
                start, stop, _ = each.indices(view.shape[dim])
                view = view.narrow(dim, start, stop - start)
            dim += 1
        return view


class Torchs(TorchDispatchMode):
    """Counts torch's own operations, and refuses those whose arguments come from, or go to, host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
        host = [each for each in flat if isinstance(each, Tensor) and each.device.type != "cuda"]
        if host:
            raise RuntimeError(f"{func}: {[tuple(each.shape) for each in host]} in host memory")
        if not func.is_view:
            self.counts[str(func.overloadpacket).removeprefix("aten.")] += 1
        return out


def steps(shape: str, rows: int, width: int, dtype: torch.dtype) -> Iterator[tuple[dict[str, bool], Any]]:
    """(way, what runs the step in that way)."""
    from random_llama import config_of

    _, spec = read_config(config_of(shape), shape)
    weights = {name: torch.empty(p.shape, dtype=dtype, device=CUDA) for name, p in model_parameters(spec).items()}
    backend = choose_backend(CUDA, "triton", {layer.mixer.head_dim for layer in spec.layers})
    pool = PagePool(spec, 4096, PAGE_SIZE, dtype=dtype, device=CUDA)
    step = DecodeStep(Transformer(spec, weights, backend), pool, rows, width)
    for way in ({"drawn": False, "cut": False}, {"drawn": True, "cut": False}, {"drawn": True, "cut": True}):
        yield way, lambda way=way: step.run(**way)


def report(shape: str, rows: int, width: int, compiles: bool) -> Iterator[dict[str, Any]]:
    """A dictionary for each way to choose tokens, of the step's second run. Raises where a launch could not be."""
    target = ahead_of_time.TARGETS["sm_90"]
    launches: list[tuple[ahead_of_time.Launch, tuple[int, ...]]] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((ahead_of_time.Launch(self, args, options), grid))

    with (
        FakeTensorMode(),
        Views(),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tuning, "device_name", lambda device: target.device_name),
        mock.patch.object(tuning, "capability", lambda device: target.capability),
        mock.patch.object(tuning, "processors", lambda device: 132),
    ):
        for way, run_step in steps(shape, rows, width, torch.bfloat16):
            found = []
            for _ in range(2):
                launches.clear()
                with Torchs() as torchs:
                    run_step()
                found.append([(each, grid, key_of(each)) for each, grid in launches])
            first, second = found
            assert [key for *_, key in first] == [key for *_, key in second], "a later step would compile again"
            for each, grid, _ in second:
                check(each, grid)
            kernels = Counter(
                f"{each.kernel.__name__.strip('_')} {'x'.join(map(str, grid))}" for each, grid, _ in second
            )
            made = {key: each for each, _, key in second}
            built = [ahead_of_time.compiled(each, target) for each in made.values()] if compiles else []
            yield {
                "step": f"{shape}, {rows} rows of {width} pages, {way}",
                "launches": dict(kernels),
                "torch": dict(torchs.counts),
                "different": len(made),
                "compiled": [{key: each[key] for key in ("kernel", "shared", "spills")} for each in built],
                "shared_limit": target.shared,
            }


def key_of(launch: ahead_of_time.Launch) -> str:
    """What its code is compiled for, and its numbers, which a captured launch has for good."""
    source, options = ahead_of_time.source_of(launch)
    numbers = [value for value in launch.args if isinstance(value, int | float)]
    return f"{source.hash()} {sorted(options.items())} {numbers}"


def check(launch: ahead_of_time.Launch, grid: tuple[int, ...]) -> None:
    """Raise AssertionError for a launch that CUDA would refuse, or that would read host memory."""
    name = launch.kernel.__name__
    given = [value for value in (*launch.args, *launch.options.values()) if isinstance(value, Tensor)]
    assert given and all(tensor.device == CUDA for tensor in given), f"{name} is given a tensor in host memory"
    assert all(1 <= size <= most for size, most in zip(grid, MOST_BLOCKS, strict=False)), f"{name} has grid {grid}"


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        shape, rows, width, *compiles = asked.split(",")
        for each in report(shape, int(rows), int(width), bool(compiles)):
            print(json.dumps(each), flush=True)
