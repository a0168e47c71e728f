"""What every suite shares: the cases, the machine's limits beside them, and the one long table of results.

A result is a line of JSON in results/*.jsonl; tables and pictures are drawn from those lines alone (report.py).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import handloom as hl
from handloom import machine
from handloom.measure import limits, parity, speed
from handloom.measure.peer import Transformers
from handloom.measure.speed import Run
from handloom.measure.stats import interleave, summarize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BATCH_LENGTHS = (16, 32, 64, 96, 128, 160, 208, 256)


@dataclass
class Results:
    """One suite's rows, written to a file as they come; `labels` are the columns that all rows share."""

    file: Path
    labels: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, peer: str, case: str, metric: str, unit: str, values: Sequence[float]) -> None:
        """Append a row. peer: who was measured, or "limit"; metric: what; values: one per round."""
        row = {"peer": peer, "case": case, "metric": metric, "unit": unit, **asdict(summarize(values)), **self.labels}
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{case}: {metric}: {peer} {row['p50']:.4g} {unit}", file=sys.stderr, flush=True)


def open_results(suite: str, file: Path, device: torch.device, dtype: torch.dtype, **labels: Any) -> Results:
    """Results of a run that starts now, with all that the numbers depend on."""
    found = machine.describe()
    gpus, cpu = found["gpus"], f"{found['cpu']['name']}, {found['cpu']['usable_cores']:g} cores"
    return Results(
        file,
        {
            "suite": suite,
            **labels,
            "device": gpus[device.index or 0]["name"] if device.type == "cuda" else cpu,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "machine_busy": machine.is_busy(),
            "versions": {name: version for name, version in found["versions"].items() if version},
            "revision": revision(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join(["python", *(Path(sys.argv[0]).name, *sys.argv[1:])]),
        },
    )


def revision() -> str:
    """The commit of this checkout, with "+changes" if src or kernels differ from it; "unknown" outside of git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "kernels")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much is run: a prompt's tokens, new tokens, prompts of a batch, new tokens of each, rounds."""

    prefill: int = 512
    decode_prompt: int = 128
    decode: int = 128
    batch: tuple[int, ...] = BATCH_LENGTHS
    batch_new: int = 64
    rounds: int = 7


SMALL = Sizes(prefill=32, decode_prompt=8, decode=4, batch=(4, 9, 16), batch_new=4, rounds=2)


@dataclass
class Rates:
    """The machine's two roofs: bytes read and operations done per second."""

    read: float
    matmul: float


def generation_cases(lm: hl.LM, peer: Transformers, sizes: Sizes, results: Results) -> None:
    """Prefill, decode and a batch of prompts of different lengths, both engines in turn, limits beside them."""
    rates = Rates(machine.read_bandwidth(device=lm.device), limits.matmul_rate(lm.dtype, lm.device))
    results.add("limit", "machine", "read bandwidth", "GB/s", [rates.read / 1e9])
    results.add("limit", "machine", "matrix product", "GFLOP/s", [rates.matmul / 1e9])
    ids = speed.random_ids(lm.spec.vocab_size, max(sizes.prefill, sizes.decode_prompt, max(sizes.batch)))
    check_same_tokens(lm, peer, ids[: sizes.decode_prompt], min(sizes.decode, 32))

    case = f"pp{sizes.prefill}"
    runs = in_turn(lm, peer, [ids[: sizes.prefill]], 1, sizes.rounds)
    add_runs(results, case, "prefill", runs, lambda run: run.prefill_rate)
    results.add("limit", case, "prefill", "tok/s", [limits.prefill_limit(lm.spec, sizes.prefill, rates.matmul)])

    case = f"tg{sizes.decode} @ d{sizes.decode_prompt}"
    runs = in_turn(lm, peer, [ids[: sizes.decode_prompt]], sizes.decode + 1, sizes.rounds)
    add_runs(results, case, "decode", runs, lambda run: run.decode_rate)
    context = sizes.decode_prompt + sizes.decode // 2
    results.add("limit", case, "decode", "tok/s", [machine.decode_limit(lm, lm.dtype, rates.read, context)])

    case = f"batch of {len(sizes.batch)}, prompts {min(sizes.batch)}–{max(sizes.batch)}, {sizes.batch_new} new each"
    prompts = [ids[-length:] for length in sizes.batch]
    runs = in_turn(lm, peer, prompts, sizes.batch_new, sizes.rounds)
    add_runs(results, case, "new tokens", runs, lambda run: run.output_rate)
    results.add("limit", case, "new tokens", "tok/s", [batch_limit(lm, sizes.batch, sizes.batch_new, rates)])


def in_turn(
    lm: hl.LM, peer: Transformers, prompts: list[list[int]], new_tokens: int, rounds: int
) -> dict[str, list[Run]]:
    """Timed runs of both engines on the same prompts, A B A B …, after one warm-up each."""
    return interleave(
        {
            "handloom": lambda: speed.run(lm, prompts, new_tokens),
            "transformers": lambda: peer.run(prompts, new_tokens),
        },
        rounds=rounds,
    )


def add_runs(
    results: Results, case: str, metric: str, runs: dict[str, list[Run]], rate: Callable[[Run], float]
) -> None:
    for name, taken in runs.items():
        results.add(name, case, metric, "tok/s", [rate(run) for run in taken])


def check_same_tokens(lm: hl.LM, peer: Transformers, prompt: list[int], new_tokens: int) -> None:
    """Stop the benchmark unless both engines compute the same: a fast wrong answer is not worth timing."""
    found = parity.compare(lm, peer, [prompt], new_tokens)[0]
    if not found.ok:
        raise SystemExit(f"not in parity, so not worth timing: {found}")


def batch_limit(lm: hl.LM, lengths: Sequence[int], new_tokens: int, rates: Rates) -> float:
    """New tokens per second of a batch: prefill at the machine's matrix rate, then each step at its slower roof."""
    spec, dtype = lm.spec, lm.dtype
    seconds = sum(limits.prefill_flops(spec, length) for length in lengths) / rates.matmul
    operations = 2 * machine.weight_bytes_per_token(spec, dtype) // dtype.itemsize * len(lengths)
    for step in range(1, new_tokens):
        kv = sum(machine.kv_bytes_read(spec, dtype, length + step) for length in lengths)
        moved = machine.weight_bytes_per_token(spec, dtype) + kv
        seconds += max(moved / rates.read, operations / rates.matmul)
    return len(lengths) * new_tokens / seconds
