"""Block sizes per device and shape, from JSON files beside this one; `python -m handloom_kernels.tune` writes them.

A file is named after a device (`h100.json`) and holds, for each kernel, a list of entries tried in order:

    {"norm": [{"when": {"width": 4096, "dtype": "bfloat16"}, "config": {"BLOCK": 4096, "num_warps": 8}}]}

An entry fits where everything under "when" equals what the launcher says of the shape. Where none fits, or the device
has no file, the launcher's own default is used. Nothing is ever timed here, and launchers must not say how many rows a
call has: with other blocks a sum has another order, and a row's result would depend on its company.

This module does not know any kernel.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch

FOLDER = Path(__file__).parent
# what a device calls itself, and the file with its block sizes
DEVICES = {"H100": "h100", "H200": "h100", "A100": "a100", "B200": "b200", "MI300": "mi300"}


class Problem(NamedTuple):
    """One shape to tune: run(blocks=...) launches the kernel with these block sizes; the fastest of `candidates` is
    written down for `when`. Every candidate's result must agree with that of the launcher's own choice, run()."""

    when: Mapping[str, int | str | bool]
    candidates: Sequence[Mapping[str, int]]
    run: Callable[..., object]


def device_file(name: str) -> str:
    """The name of the file for a device that calls itself `name`; "default" for one that nobody has tuned."""
    return next((file for part, file in DEVICES.items() if part in name), "default")


@functools.lru_cache(maxsize=None)
def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@functools.lru_cache(maxsize=None)
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None of anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not is_hip() else None


@functools.lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    """How many programs the device runs side by side at least; how the work is dealt out, not what it gives."""
    return torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 2


def is_hip() -> bool:
    """Is this PyTorch one for AMD GPUs?"""
    return torch.version.hip is not None


@functools.lru_cache(maxsize=None)
def table(file: str) -> dict[str, list[dict[str, Any]]]:
    """The entries of one file by kernel; none where the file does not exist."""
    path = FOLDER / f"{file}.json"
    if not path.is_file():
        return {}
    content: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    return content


def config(
    kernel: str,
    device: torch.device,
    default: Mapping[str, int],
    override: Mapping[str, int] | None = None,
    **shape: int | str | bool,
) -> dict[str, int]:
    """Block sizes and launch options (num_warps, num_stages): `override`, else the device's own, else `default`.

    Multiplications and additions may be fused, whatever the version of Triton takes for granted.
    """
    chosen = {**default, "enable_fp_fusion": True}
    if override is not None:
        return {**chosen, **override}
    for entry in table(device_file(device_name(device))).get(kernel, ()):
        if all(shape.get(key) == value for key, value in entry["when"].items()):
            return {**chosen, **entry["config"]}
    return chosen
