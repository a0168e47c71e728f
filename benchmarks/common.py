"""What every suite shares: the cases, the machine's limits beside them, and the one long table of results.

A result is a line of JSON in results/*.jsonl; tables and pictures are drawn from those lines alone (report.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import handloom as hl
from handloom import machine
from handloom.measure import limits, parity, speed
from handloom.measure.peer import Transformers
from handloom.measure.results import Results, open_results, revision
from handloom.measure.speed import Run
from handloom.measure.stats import interleave

__all__ = ["RESULTS", "SMALL", "Results", "Sizes", "generation_cases", "open_results", "revision"]

RESULTS = Path(__file__).resolve().parent / "results"
BATCH_LENGTHS = (16, 32, 64, 96, 128, 160, 208, 256)


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


NOMINAL = {  # bytes per second; operations in 16 bits per second, without sparsity
    "H100 PCIe": (2.0e12, 756e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8e12, 2250e12),
    "A100-SXM4-80GB": (2.04e12, 312e12),
}


@dataclass
class Rates:
    """The machine's roofs in bytes and operations per second: measured in this run, and nominal where they are known.

    read: of a buffer as large as the weights, or of a large one; copy: bytes read and written by a large copy.
    """

    read: float
    copy: float
    matmul: float
    nominal_bandwidth: float | None = None
    nominal_matmul: float | None = None

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device, nbytes: int | None = None) -> Rates:
        read, copy = machine.read_bandwidth(device=device, nbytes=nbytes), copy_bandwidth(device)
        return cls.known(read, copy, limits.matmul_rate(dtype, device), dtype, device)

    @classmethod
    def known(cls, read: float, copy: float, matmul: float, dtype: torch.dtype, device: torch.device) -> Rates:
        """What was measured, and what is nominal beside it."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        bandwidth, matmul_nominal = next((rates for card, rates in NOMINAL.items() if card in name), (None, None))
        return cls(read, copy, matmul, bandwidth, matmul_nominal if dtype.itemsize == 2 else None)

    @property
    def bandwidth(self) -> float:
        """The faster of reading and copying."""
        return max(self.read, self.copy)

    def tell(self, results: Results) -> None:
        found = {"read bandwidth": self.read, "copy bandwidth": self.copy, "nominal bandwidth": self.nominal_bandwidth}
        for metric, rate in found.items():
            if rate is not None:
                results.add("limit", "machine", metric, "GB/s", [rate / 1e9])
        for metric, rate in {"matrix product": self.matmul, "nominal matrix product": self.nominal_matmul}.items():
            if rate is not None:
                results.add("limit", "machine", metric, "GFLOP/s", [rate / 1e9])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, the best of some."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(12):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def add_use(
    results: Results, who: str, case: str, seconds: Sequence[float], moved: int, flops: int, rates: Rates
) -> None:
    """What was made of the machine in these times: GB/s and TFLOP/s that the work needs, MBU and MFU (Williams,
    Waterman and Patterson's two roofs) of what was measured and of what is nominal. moved, flops: 0 is not said."""
    roofs = {
        ("MBU", "GB/s", 1e9): (moved, {"measured": rates.bandwidth, "nominal": rates.nominal_bandwidth}),
        ("MFU", "TFLOP/s", 1e12): (flops, {"measured": rates.matmul, "nominal": rates.nominal_matmul}),
    }
    for (name, unit, scale), (work, against) in roofs.items():
        if work:
            results.add(who, case, unit, unit, [work / s / scale for s in seconds])
            for which, rate in against.items():
                if rate is not None:
                    results.add(who, case, f"{name}, {which}", "%", [100 * work / s / rate for s in seconds])


def generation_cases(lm: hl.LM, peer: Transformers, sizes: Sizes, results: Results) -> None:
    """Prefill, decode and a batch of prompts of different lengths, both engines in turn, limits beside them."""
    rates = Rates.measure(lm.dtype, lm.device, machine.weight_bytes_per_token(lm, lm.dtype))
    rates.tell(results)
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


def check_same_tokens(lm: hl.LM, peer: Transformers, prompt: list[int], new_tokens: int) -> parity.PromptParity:
    """Stop the benchmark unless both engines compute the same: a fast wrong answer is not worth timing."""
    found = parity.compare(lm, peer, [prompt], new_tokens)[0]
    if not found.ok:
        raise SystemExit(f"not in parity, so not worth timing: {found}")
    return found


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
