"""`handloom bench prefix`: what the prefix cache brings where requests begin alike, and costs where none do.

This module does not know how anything is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from handloom.cli import bench_table, common
from handloom.cli.arguments import Loading, ModelArgument, Quiet
from handloom.cli.bench_table import Row, row

if TYPE_CHECKING:
    from handloom.lm import LM
    from handloom.measure.prefixes import Prefixes

NOTES = (
    "cost at 0% hits: time that the cache adds where no two prompts begin alike, all requests at once, with it and "
    "without in turn; of each pair of runs the ratio",
    "ttft, shared: requests with one system prompt, one after another, without the cache and with it; the first one, "
    "which fills the cache, is left out of the latter",
    "limit of ttft: the operations of the tokens to compute at the measured rate of a large matrix product",
    "hit rate: share of the prompts' tokens that were cached; whole pages are, and never a prompt's last token",
)


def prefix(
    model: ModelArgument = None,
    *,
    requests: Annotated[int, typer.Option("--requests", "-n", help="Requests of a run.", min=2)] = 8,
    shared: Annotated[int, typer.Option(help="Tokens of the system prompt.", min=1)] = 256,
    own: Annotated[int, typer.Option(help="Tokens of a request's own question.", min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of the prompts.", min=0)] = 0,
    repeat: bench_table.Repeat = 5,
    threads: bench_table.Threads = None,
    format: bench_table.FormatOption = bench_table.Format.md,
    output: bench_table.Output = None,
    quiet: Quiet = False,
    loading: Loading,
) -> None:
    """Measure the prefix cache: the time to the first token with and without it, and its cost where nothing hits."""
    bench_table.check_output(output)
    with common.waiting("starting", quiet):
        import torch

        from handloom import machine
        from handloom.measure import prefixes
    if threads is not None:
        torch.set_num_threads(threads)
    busy = machine.is_busy()
    lm = common.load_model(model, loading, quiet=quiet)
    with common.waiting(f"1 + {repeat} rounds of {requests} requests, four times each", quiet):
        found = prefixes.measure(
            lm, count=requests, shared=shared, own=own, new_tokens=new_tokens, rounds=repeat, seed=seed
        )
    with common.waiting("measuring the machine", quiet):
        rows = _rows(lm, found, shared, own)
    what = f"{requests} requests of {shared} + {own} prompt tokens, {new_tokens} new ones, seed {seed}"
    environment = {**bench_table.environment(lm, busy), "workload": what}
    bench_table.write(rows, environment, (what, *NOTES), format, output, quiet)


def _rows(lm: LM, found: Prefixes, shared: int, own: int) -> list[Row]:
    from handloom.measure import limits

    rate = limits.matmul_rate(lm.dtype, lm.device)
    whole, rest = (limits.prefill_flops(lm.spec, length) for length in (shared + own, shared))
    cold, warm = ([1e3 * run.served[0].ttft for runs in taken for run in runs] for taken in (found.cold, found.warm))
    return [
        row("cost at 0% hits", "%", [100 * cost for cost in found.costs]),
        row("hit rate, nothing shared", "%", [100 * run.hit_rate for run in found.on]),
        row("hit rate, shared", "%", [100 * found.hit_rate]),
        row("ttft, shared, cache off", "ms", cold, limit=1e3 * whole / rate, tail=True),
        row("ttft, shared, cache on", "ms", warm, limit=1e3 * (whole - rest) / rate, tail=True),
        row("matrix product", "GFLOP/s", [rate / 1e9]),
    ]
