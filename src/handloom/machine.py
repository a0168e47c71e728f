"""The machine underneath: how fast it reads memory, what it has, which versions run on it.

The decode limit is that of Williams, Waterman and Patterson's roofline (CACM 52(4), 2009) for a step
that reads every weight once: memory bandwidth over bytes per token.

This module does not know how a model is loaded or run, or how any of this is shown.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch

from handloom.checkpoint import memory
from handloom.checkpoint.quantization import QuantizedMatrix
from handloom.model.spec import ModelSpec, looked_up, model_parameters
from handloom.ops import QuantizedPanels, Weight, cpu
from handloom.ops.cores import cgroup, usable_cores
from handloom.ops.cpu.reading import PANEL_BYTES, reader

if TYPE_CHECKING:
    from handloom.model.transformer import Transformer

MIN_BUFFER_BYTES = 512 << 20
ROW_VALUES = 4096
READ_SECONDS = 0.4
CPU_SLICES = 16
SLICE_BYTES = 32 << 20
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "huggingface_hub", "safetensors", "gguf", "numpy")


class Loaded(Protocol):
    """A model in memory; `handloom.LM` is one."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def transformer(self) -> Transformer: ...


# Speed -----------------------------------------------------------------------------------------


def read_bandwidth(
    threads: int | None = None, device: str | torch.device = "cpu", *, nbytes: int | None = None
) -> float:
    """Bytes per second that `device` reads, measured now, in about half a second.

    The best of many short reads, of two kinds (a sum, a matrix-vector product), on a CPU with the compiled kernels also
    of a third, one row's product by these; going round a buffer: short ones, because on a busy machine they still find
    free moments. threads: on a CPU, how many read at once; None for what torch is set to. nbytes: on a CPU, of the
    buffer, such as a model's weights, which a large cache may hold; by default twice the last-level cache, so that it
    is memory that is read, as on other devices always.
    """
    where, before = torch.device(device), torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return _read_bandwidth(where, nbytes)
    finally:
        torch.set_num_threads(before)


def _read_bandwidth(device: torch.device, nbytes: int | None) -> float:
    on_cpu = device.type == "cpu"
    size = _buffer_bytes(device)
    if nbytes is not None and on_cpu:
        size = max(SLICE_BYTES, min(nbytes, size))
    count = max(1, min(CPU_SLICES, size // SLICE_BYTES)) if on_cpu else 1
    shape = size // (count * PANEL_BYTES) * count * PANEL_BYTES // (4 * ROW_VALUES), ROW_VALUES
    # pages as those of weights: huge ones are read faster
    buffer = memory.empty(shape, torch.float32) if on_cpu else torch.empty(shape, dtype=torch.float32, device=device)
    buffer.fill_(1.0)  # written, or no memory lies behind it
    vector = torch.ones(ROW_VALUES, dtype=torch.float32, device=device)
    slices = buffer.chunk(count)
    reads: list[list[Callable[[], object]]] = [[part.sum, partial(torch.mv, part, vector)] for part in slices]
    for part, kinds in zip(slices if on_cpu and cpu.is_loaded() else [], reads, strict=False):
        kinds.append(reader(part))
    best, deadline = 0.0, time.perf_counter() + READ_SECONDS
    while time.perf_counter() < deadline:
        for kind in range(len(reads[0])):
            for part, kinds in zip(slices, reads, strict=True):
                _wait(device)
                start = time.perf_counter()
                kinds[kind]()
                _wait(device)
                best = max(best, part.nbytes / (time.perf_counter() - start))
    return best


def is_busy() -> bool:
    """Whether others want the cores too (load average of the last minute), so that what is measured now is too low."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > usable_cores() + 0.5


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _buffer_bytes(device: torch.device) -> int:
    """Twice the last-level cache, at least 512 MiB, at most a quarter of the free memory."""
    if device.type == "cuda":
        wanted, free = 4 * MIN_BUFFER_BYTES, torch.cuda.mem_get_info(device)[0]
    else:
        wanted, free = max(MIN_BUFFER_BYTES, 2 * last_level_cache_bytes()), psutil.virtual_memory().available
    return min(wanted, free // 4)


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache; 0 where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def weight_bytes_per_token(model: ModelSpec | Loaded, dtype: torch.dtype) -> int:
    """Bytes of weights that one decode step reads at batch 1: of a loaded model as it holds them, else in dtype.

    Every weight once, a tied head included; of the tables that are only looked up (positions, and the
    embedding where the head is untied) one row.
    """
    if isinstance(model, ModelSpec):
        sizes = {name: parameter.numel * dtype.itemsize for name, parameter in model_parameters(model).items()}
        return bytes_per_token(model, sizes)
    held = model.transformer.weights.held
    return bytes_per_token(model.spec, {name: _useful_bytes(weight) for name, weight in held.items()})


def bytes_per_token(spec: ModelSpec, sizes: Mapping[str, int]) -> int:
    """As weight_bytes_per_token, of weights that take so many bytes each."""
    shapes, by_row = model_parameters(spec), looked_up(spec)
    return sum(size // (shapes[name].shape[0] if name in by_row else 1) for name, size in sizes.items())


def _useful_bytes(weight: Weight) -> int:
    """What a weight takes, but not what only fills up the last panel of one in floats."""
    quantized = isinstance(weight, QuantizedMatrix | QuantizedPanels)
    return weight.nbytes if quantized else weight.shape.numel() * weight.dtype.itemsize


def kv_bytes_read(spec: ModelSpec, dtype: torch.dtype, context: int) -> int:
    """Bytes of K and V that one decode step reads with `context` tokens in the cache; windows bound it."""
    values = 0
    for layer in spec.layers:
        mixer = layer.mixer
        seen = context if mixer.window is None else min(context, mixer.window)
        values += 2 * seen * mixer.num_kv_heads * mixer.head_dim
    return values * dtype.itemsize


def decode_limit(model: ModelSpec | Loaded, dtype: torch.dtype, bandwidth: float, context: int = 0) -> float:
    """Tokens per second that decoding at batch 1 cannot exceed: bandwidth over the bytes that a token needs.

    dtype: of KV cache, and of weights if they are not loaded; bandwidth: bytes per second; context: tokens already in
    the cache.
    """
    spec = model if isinstance(model, ModelSpec) else model.spec
    return bandwidth / (weight_bytes_per_token(model, dtype) + kv_bytes_read(spec, dtype, context))


# What there is ---------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """What a benchmark or a bug report has to state; every value is plain JSON, sizes are in bytes.

    cpu: name, cores (of the machine), usable_cores (affinity and cgroup quota), threads (torch's),
    last_level_cache; memory: total, available, limit (cgroup, or None); gpus: name, memory,
    capability, driver of each; versions: of Python and packages, None where one is not installed.
    """
    ram = psutil.virtual_memory()
    return {
        "os": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "last_level_cache": last_level_cache_bytes(),
        },
        "memory": {"total": ram.total, "available": ram.available, "limit": memory_limit()},
        "gpus": gpus(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Versions of handloom, Python and the packages that generation depends on."""
    from handloom import __version__

    found: dict[str, str | None] = {"handloom": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def memory_limit() -> int | None:
    """The cgroup's memory limit in bytes, or None."""
    limit = cgroup("memory.max").strip()
    return int(limit) if limit.isdecimal() else None


def gpus() -> list[dict[str, Any]]:
    """The CUDA devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    version = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\b\d+\.\d+(\.\d+)?\b", version.read_text()) if version.exists() else None
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "driver": driver[0] if driver else None,
            }
        )
    return found
