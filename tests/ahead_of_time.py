"""Compile a kernel's launches for GPUs that are not there: `python tests/ahead_of_time.py norm [target ...]`.

The cases of compile_cases/<kernel>.py call the launchers on fake tensors (shapes without memory), and every launch is
caught with its arguments, so that what is compiled is what would run. One JSON object per compiled kernel and target
goes to stdout. A launcher that asked a tensor for its values, which on a GPU would make the host wait, fails here.

Must run in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info
from triton.runtime.jit import JITFunction

from handloom_kernels import tuning


class Target(NamedTuple):
    """A GPU: what it calls itself, what Triton calls it, and the shared memory a program may have there, in bytes.

    The consumer cards of the sm_80 family have less than the A100, and the untuned default must fit them.
    """

    device_name: str
    gpu: GPUTarget
    shared: int

    @property
    def capability(self) -> tuple[int, int] | None:
        return divmod(self.gpu.arch, 10) if self.gpu.backend == "cuda" else None


TARGETS = {
    "sm_80": Target("an untuned card", GPUTarget("cuda", 80, 32), 101_376),
    "sm_90": Target("NVIDIA H100 80GB HBM3", GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Target("NVIDIA B200", GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": Target("AMD Instinct MI300X", GPUTarget("hip", "gfx942", 64), 65_536),
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Case:
    """A call of a launcher. `ptx`: by target ("cuda" for all of NVIDIA's), a regular expression that the PTX of one of
    its kernels must hold, for the instructions that were meant."""

    name: str
    call: Callable[[], object]
    ptx: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = tuple(TARGETS)


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


def launches_of(case: Case, target: Target) -> list[Launch]:
    """What a case would launch on the target."""
    found: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(self, args, options))

    with (
        FakeTensorMode(),
        torch.device("cuda"),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tuning, "device_name", lambda device: target.device_name),
        mock.patch.object(tuning, "is_hip", lambda: target.gpu.backend == "hip"),
        mock.patch.object(tuning, "capability", lambda device: target.capability),
    ):
        case.call()
    return found


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel specialised as Triton's own launcher would, and the compile options."""
    options = dict(launch.options)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = options.pop(name) if name in options else values.get(name, parameter.default)
        signature[name], aligned = specialise(value, parameter)
        if signature[name] == "constexpr":
            constants[name] = value
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def specialise(value: Any, parameter: Any) -> tuple[str, bool]:
    """(the type in Triton's words, is it a multiple of 16?)"""
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0 and not parameter.do_not_specialize
    return "fp32", False


def compiled(launch: Launch, target: Target) -> dict[str, Any]:
    """Compile one launch: shared memory and spills in bytes, registers, assembly."""
    source, options = source_of(launch)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target.gpu))
    with mock.patch.object(target_info, "driver", driver):
        out = triton.compile(source, target=target.gpu, options=options)
    report = {"kernel": launch.kernel.__name__, "shared": out.metadata.shared}
    if target.gpu.backend == "hip":
        text = out.asm["amdgcn"]
        spilled = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
        return report | {"spills": 4 * spilled, "assembly": text}
    return report | resources(out.asm["cubin"]) | {"assembly": out.asm["ptx"]}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes, as NVIDIA's own tool reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "spills": int(usage["STACK"]) + int(usage["LOCAL"])}


def reports(kernel: str, targets: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every case of a kernel on every target; a launch that is the same as an earlier one is compiled once."""
    cases = importlib.import_module(f"compile_cases.{kernel}").cases
    for name in targets:
        target, done = TARGETS[name], {}
        for case in cases():
            if name not in case.targets:
                continue
            found: list[dict[str, Any]] = []
            for launch in launches_of(case, target):
                source, options = source_of(launch)
                key = source.hash() + repr(sorted(options.items()))
                if key not in done:
                    done[key] = compiled(launch, target)
                found.append(done[key])
            wanted = [pattern for key, pattern in case.ptx.items() if key in (name, target.gpu.backend)]
            missing = [pattern for pattern in wanted if not any(re.search(pattern, each["assembly"]) for each in found)]
            yield {
                "case": case.name,
                "target": name,
                "shared_limit": target.shared,
                "missing": missing,
                "kernels": [{key: value for key, value in each.items() if key != "assembly"} for each in found],
            }


if __name__ == "__main__":
    for report in reports(sys.argv[1], tuple(sys.argv[2:]) or tuple(TARGETS)):
        print(json.dumps(report), flush=True)
