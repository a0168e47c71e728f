"""What every suite shares: the cases, the machine's limits beside them, and the one long table of results.

A result is a line of JSON in results/*.jsonl; tables and pictures are drawn from those lines alone (report.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
