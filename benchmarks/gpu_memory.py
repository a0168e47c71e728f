"""The suite `memory`: who holds memory when a batch needs most of it, in a fresh process for each shape.

    python benchmarks/gpu_memory.py '{"shape": "tiny", "device": "cpu", "dtype": "float32"}'     one process, as JSON

Of a GPU as torch counts it: the weights, the pool of K and V, the graphs of decode steps, the workspace that one run
took and gave back, and other: what went past torch since the context was there. Of the host by its resident set:
libraries when nothing is made yet, and on a CPU the weights, the pages of K and V that were written, and the workspace,
that of making the weights included; other is what was kept besides. The limit is the bytes that the weights need, and K
and V of the batch's tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

import handloom as hl
from contenders import OURS, Handloom, Prompts
from handloom import machine
from handloom.cache.pages import PagePool
from handloom.engine.graphs import Way
from handloom.engine.stream import CudaStream, EagerStream
from handloom.loading import DTYPES, PAGE_SIZE
from handloom.measure.speed import peak_memory, random_ids
from random_llama import make_transformer

if TYPE_CHECKING:
    from gpu import Session

Owners = dict[str, float]


@dataclass(frozen=True)
class How:
    """What is made and run, and where: `rows` prompts of `prompt` tokens, `new` more of each."""

    shape: str
    device: str
    dtype: str
    backend: str = "auto"
    threads: int = 1
    rows: int = 2
    prompt: int = 32
    new: int = 3


def by_owner(how: How) -> dict[str, Owners]:
    """{"device" or "host": {owner: bytes, "in all" last}, "limit": {owner: bytes}}; needs a fresh process."""
    device, dtype = torch.device(how.device), DTYPES[how.dtype]
    on_gpu, pages = device.type == "cuda", -(-(how.prompt + how.new) // PAGE_SIZE) + 1
    torch.zeros(1, device=device)  # what the device needs before anything is made
    libraries, on_device = _resident(), Counters(device) if on_gpu else None
    transformer = make_transformer(how.shape, dtype, device, how.backend)
    weights = on_device.allocated() if on_device else _resident() - libraries
    pool = PagePool(transformer.spec, how.rows * pages, PAGE_SIZE, dtype=dtype, device=device)
    lm = hl.LM(transformer, None, pool, name=how.shape)
    kv = on_device.allocated() if on_device else 0
    ours = Handloom(lm, CudaStream(device) if on_gpu else EagerStream())
    assert ours.graphs is not None
    before = on_device.reserved() if on_device else 0
    ours.graphs.ready(how.rows, pages, Way(drawn=False, cut=False))
    graphs = on_device.reserved() - before if on_device else 0
    prompts: Prompts = [random_ids(lm.spec.vocab_size, how.prompt, seed) for seed in range(how.rows)]
    ours(prompts, how.new)
    needed = how.rows * machine.kv_bytes_read(lm.spec, dtype, how.prompt + how.new)
    found = {"limit": {"weights": float(machine.weight_bytes_per_token(lm.spec, dtype)), "KV pool": float(needed)}}
    if on_device:
        found["device"] = _rest(
            {"weights": weights, "KV pool": kv, "graphs": graphs}, *on_device.after(before + graphs)
        )
        return {**found, "host": _rest({"libraries": libraries}, 0, peak_memory() - libraries)}
    written = min(how.rows * -(-(how.prompt + how.new) // PAGE_SIZE), pool.num_pages) * pool.page_bytes
    kept = _resident() - libraries - weights - written
    return {
        **found,
        "host": _rest(
            {"libraries": libraries, "weights": weights, "KV pool": written}, peak_memory() - _resident(), kept
        ),
    }


def _rest(owners: Owners, workspace: float, other: float) -> Owners:
    parts = {**owners, "workspace": max(0, workspace), "other": max(0, other)}
    return {**parts, "in all": sum(parts.values())}


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


class Counters:
    """Of torch on a GPU, and of the GPU itself, from now on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, torch.cuda.memory_allocated(device)
        self.free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)

    def allocated(self) -> int:
        """Bytes of tensors that were made since the last look."""
        before, self.last = self.last, torch.cuda.memory_allocated(self.device)
        return self.last - before

    def reserved(self) -> int:
        """Bytes that torch holds, what nobody uses given back."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def after(self, before: int) -> tuple[int, int]:
        """(bytes that a run took past `before`, bytes that went past torch)."""
        held = torch.cuda.memory_reserved(self.device)
        other = self.free - torch.cuda.mem_get_info(self.device)[0] - held
        return torch.cuda.max_memory_reserved(self.device) - before, other


def measure(session: Session) -> None:
    arguments = session.arguments
    rows, prompt, new = (2, 2 * PAGE_SIZE, 3) if arguments.small else (32, 1024, 32)
    dtype = str(session.dtype).removeprefix("torch.")
    for shape in arguments.shapes:
        how = How(shape, str(session.device), dtype, arguments.backend, torch.get_num_threads(), rows, prompt, new)
        results = session.results("memory", f"llama {shape}, random")
        name = f"{rows} x pp{prompt} + tg{new}"
        session.case(results, name, lambda how=how, name=name, results=results: _case(how, name, results))  # type: ignore[misc]


def _case(how: How, name: str, results: Any) -> None:
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asdict(how))], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"its process failed: {done.stderr[-1500:]}")
    found: dict[str, Owners] = json.loads(done.stdout.splitlines()[-1])
    needed = found.pop("limit")
    for place, owners in found.items():
        for owner, held in owners.items():
            results.add(OURS, name, f"{place}: {owner}", "MiB", [held / 2**20])
            if owner in needed:
                results.add("limit", name, f"{place}: {owner}", "MiB", [needed[owner] / 2**20])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", type=lambda text: How(**json.loads(text)), help="the fields of How, as JSON")
    how = parser.parse_args().how
    torch.set_num_threads(how.threads)
    print(json.dumps(by_owner(how)))


if __name__ == "__main__":
    main()
