"""`handloom bench MODEL`, or `bench speed MODEL`: how fast a model runs here, beside how fast it could.

Tests have the names of llama-bench: pp512 processes a prompt of 512 tokens, tg128 generates 128 tokens from an
empty context (a prompt of one token), "tg128 @ d512" does so with 512 tokens in the cache.

This module does not know how anything is measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from handloom.cli import bench_table, common
from handloom.cli.arguments import Loading, ModelArgument, Quiet, guarded
from handloom.cli.bench_cpu import cpu
from handloom.cli.bench_prefix import prefix
from handloom.cli.bench_table import Row, row
from handloom.cli.bench_throughput import throughput

if TYPE_CHECKING:
    from handloom.lm import LM
    from handloom.measure.speed import Run

NOTES = (
    "greedy decoding and detokenising are inside the times, tokenising is not (prompts are random, fixed token ids); "
    "eos is ignored; warm-up runs are left out",
    "limit: of decoding, measured read bandwidth over the bytes a token needs (weights, and K and V of the mean "
    "context); of the prompt, the measured rate of a large matrix product over the operations it needs",
    "load: from the call to a model ready to run, imports not counted, files cached by the system or not as it was",
    "ttft: from the call to the first non-empty piece of text, the first token's where it has any",
    "peak memory: the most this process ever had resident: Python and libraries, weights, the written part of the KV "
    "cache, temporaries, mapped file pages that were read",
)


def speed(
    model: ModelArgument = None,
    *,
    pp: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    tg: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 128,
    repeat: bench_table.Repeat = 5,
    warmup: Annotated[int, typer.Option(help="Runs before that, which do not.", min=0)] = 1,
    threads: bench_table.Threads = None,
    format: bench_table.FormatOption = bench_table.Format.md,
    output: bench_table.Output = None,
    quiet: Quiet = False,
    loading: Loading,
) -> None:
    """Measure prompt processing, generation, load time and memory, each beside what the machine would allow."""
    bench_table.check_output(output)
    with common.waiting("starting", quiet):
        import torch

        import handloom.lm  # noqa: F401  (so that its import is not part of the load time)
        from handloom import machine
        from handloom.measure.speed import peak_device_memory, peak_memory
    if threads is not None:
        torch.set_num_threads(threads)
    busy = machine.is_busy()
    started = time.perf_counter()
    lm = common.load_model(model, loading, quiet=quiet)
    load_seconds, load_peak = time.perf_counter() - started, peak_memory()
    runs = _run(lm, pp, tg, repeat, warmup, quiet)
    peaks = {"load": load_peak, "runs": peak_memory(), "device": peak_device_memory(lm.device)}
    with common.waiting("measuring the machine", quiet):  # last, or its buffers would be the peak of memory
        rows = _rows(lm, pp, tg, runs, load_seconds, peaks)
    bench_table.write(rows, bench_table.environment(lm, busy), NOTES, format, output, quiet)


def _run(lm: LM, pp: int, tg: int, repeat: int, warmup: int, quiet: bool) -> dict[int, list[Run]]:
    """Timed runs by length of the prompt: 1 and pp, in turn. Raises ContextOverflow."""
    from handloom.measure import speed, stats

    ids = speed.random_ids(lm.spec.vocab_size, pp)
    speed.check_room(lm, pp, tg + 1)
    with common.waiting(f"{warmup} + {repeat} runs of pp{pp} and tg{tg}", quiet):
        runs = stats.interleave(
            {str(n): lambda n=n: speed.run(lm, [ids[:n]], tg + 1) for n in sorted({1, pp})},  # type: ignore[misc]
            rounds=repeat,
            warmup=warmup,
        )
    return {int(n): taken for n, taken in runs.items()}


def _rows(
    lm: LM, pp: int, tg: int, runs: dict[int, list[Run]], load_seconds: float, peaks: dict[str, int | None]
) -> list[Row]:
    """The table, the machine's limits measured now."""
    from handloom import machine
    from handloom.measure import limits

    bandwidth = machine.read_bandwidth(device=lm.device, nbytes=machine.weight_bytes_per_token(lm, lm.dtype))
    rate = limits.matmul_rate(lm.dtype, lm.device)

    def decode_row(name: str, context: int) -> Row:
        limit = machine.decode_limit(lm, lm.dtype, bandwidth, context + tg // 2)
        return row(name, "tok/s", [run.decode_rate for run in runs[context]], limit=limit)

    prefill = [run.prefill_rate for run in runs[pp]]
    rows = [
        row("load", "s", [load_seconds]),
        row(f"pp{pp}", "tok/s", prefill, limit=limits.prefill_limit(lm.spec, pp, rate)),
        decode_row(f"tg{tg}", 1),
    ]
    if pp > 1:
        rows.append(decode_row(f"tg{tg} @ d{pp}", pp))
    rows.append(row(f"ttft @ {pp}", "ms", [1e3 * run.first_text for run in runs[pp]]))
    names = {"load": "peak memory, loading", "runs": "peak memory", "device": "peak GPU memory"}
    rows += [row(names[key], "MiB", [peak / 2**20]) for key, peak in peaks.items() if peak is not None]
    rows.append(row("read bandwidth", "GB/s", [bandwidth / 1e9]))
    rows.append(row("matrix product", "GFLOP/s", [rate / 1e9]))
    return rows


class _Group(TyperGroup):
    """`speed` is what is meant where no command is named; a folder called like a command is `./throughput`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["speed", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(cls=_Group, help="Measure speed: `bench MODEL`, or one of the commands below.")
for command in (speed, throughput, prefix, cpu):
    bench.command()(guarded(command))
