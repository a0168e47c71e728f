"""Loading a checkpoint, in fresh processes in turn: seconds until it is loaded and until a first token, and memory.

    python benchmarks/loading.py handloom FOLDER '{"device": "cpu", "dtype": "float32"}'     one process, as JSON

What from_pretrained imports is in its time. transformers maps float32 files instead of reading them: compare "load to
first token". On a GPU memory is the host's, and that of the device as torch counts it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PEERS = ("handloom", "transformers")
PROMPT = list(range(100, 108))


@dataclass(frozen=True)
class How:
    """Where and in what; rows, prompt, new: a batch that is generated after the first token, 0 for none."""

    device: str
    dtype: str
    backend: str = "auto"
    threads: int = 2
    rows: int = 0
    prompt: int = 0
    new: int = 0


def load_once(who: str, folder: Path, how: How) -> dict[str, float]:
    """Load the model, and the tokenizer where there is one, and generate one token, then the batch: seconds, MiB."""
    import psutil

    from handloom.measure.speed import peak_device_memory, peak_memory

    if who == "handloom":
        import handloom as hl
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    import torch

    torch.set_num_threads(how.threads)
    on_gpu, tokens = torch.device(how.device).type == "cuda", how.rows * (how.prompt + how.new + 16)
    imported, started = peak_memory(), time.perf_counter()
    if who == "handloom":
        room = {"kv_cache_tokens": tokens} if tokens else {}
        lm = hl.LM.from_pretrained(folder, dtype=how.dtype, device=how.device, backend=how.backend, **room)

        def generate(prompts: list[list[int]], new: int) -> None:
            lm.generate(prompts, max_new_tokens=new, do_sample=False, eos_token_id=None)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, how.dtype)).to(how.device)
        if (folder / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(folder)
        model.generation_config.eos_token_id = None

        def generate(prompts: list[list[int]], new: int) -> None:
            ids = torch.tensor(prompts, device=how.device)
            options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
            model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()

    if on_gpu:
        torch.cuda.synchronize()
    loaded, peak = time.perf_counter(), peak_memory()
    generate([PROMPT], 1)
    first = time.perf_counter()
    found = {
        "load": loaded - started,
        "process start to loaded": time.time() - (time.perf_counter() - loaded) - psutil.Process().create_time(),
        "load to first token": first - started,
        "peak memory of loading": (peak - imported) / 2**20,
        "peak memory to first token": peak_memory() / 2**20,
    }
    device = torch.device(how.device)
    if on_gpu:
        found["peak device memory to first token"] = (peak_device_memory(device) or 0) / 2**20
    if tokens:
        generate([[at % 400 for at in range(row, row + how.prompt)] for row in range(how.rows)], how.new)
        what = f"of {how.rows} x {how.prompt} + {how.new} tokens"
        found[f"peak memory {what}"] = peak_memory() / 2**20
        if on_gpu:
            found[f"peak device memory {what}"] = (peak_device_memory(device) or 0) / 2**20
    return found


def load_case(folder: Path, how: How, rounds: int, results: Any, warmup: int = 1) -> None:
    """Fresh processes in turn; the first round warms the system's file cache."""
    from handloom.measure.stats import interleave

    def child(who: str) -> dict[str, float]:
        command = [sys.executable, __file__, who, str(folder), json.dumps(asdict(how))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"loading with {who} failed: {done.stderr[-1500:]}")
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return measured

    taken = interleave({who: lambda who=who: child(who) for who in PEERS}, rounds=rounds, warmup=warmup)  # type: ignore[misc]
    for metric in taken[PEERS[0]][0]:
        for who in PEERS:
            unit = "MiB" if "memory" in metric else "s"
            results.add(who, "load", metric, unit, [values[metric] for values in taken[who]])
    results.add("limit", "load", "peak memory of loading", "MiB", [weights_bytes(folder, how.dtype) / 2**20])


def weights_bytes(folder: Path, dtype: str) -> int:
    """Bytes of the weights as held in that dtype."""
    from handloom.checkpoint import open_checkpoint
    from handloom.loading import DTYPES
    from handloom.model.families import read_config
    from handloom.model.spec import num_parameters

    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    return DTYPES[dtype].itemsize * num_parameters(read_config(checkpoint.config, checkpoint.name)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("how", type=lambda text: How(**json.loads(text)), help="the fields of How, as JSON")
    arguments = parser.parse_args()
    print(json.dumps(load_once(arguments.who, arguments.folder, arguments.how)))


if __name__ == "__main__":
    main()
