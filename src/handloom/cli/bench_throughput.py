"""`handloom bench throughput`: many requests of different lengths, all at once or as they arrive.

This module does not know how anything is measured.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from handloom.cli import bench_table, common
from handloom.cli.arguments import Loading, ModelArgument, Quiet
from handloom.cli.bench_table import Row, row
from handloom.errors import InvalidParam

if TYPE_CHECKING:
    from handloom.lm import LM
    from handloom.measure.peer_serving import Comparison
    from handloom.measure.workload import Asked

NOTES = (
    "times are from a request's arrival, ready for it or not; scheduling, greedy choosing and detokenising are inside, "
    "tokenising is not; eos is ignored; every engine's number of tokens is checked",
    "ttft: to the first non-empty text; tpot: (last token - ttft) / (tokens - 1); itl: every gap between two tokens",
    "limit of the rates: all operations at the measured rate of a large matrix product, or the weights for each step "
    "of the longest output and all K and V at the measured read bandwidth, whichever is slower; of pages: the pool",
    "pages: most that requests held at once, those taken ahead included",
    "peak memory: the most this process had resident after handloom's first run, before a peer was loaded",
)
PEER_NOTES = (
    "transformers, batches of n: generate on padded batches of requests with like outputs, each run to its longest; "
    "continuous: its continuous batching, a cache for all requests, made before the time starts",
)


class Peer(StrEnum):
    """Who else serves the same requests."""

    transformers = "transformers"


def throughput(
    model: ModelArgument = None,
    *,
    requests: Annotated[int, typer.Option("--requests", "-n", help="How many are drawn.", min=1)] = 64,
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of a prompt: a range, or a number.")] = "64-512",
    new_tokens: Annotated[str, typer.Option(help="Tokens to generate: a range, or a number.")] = "32-256",
    file: Annotated[
        Path | None,
        typer.Option(
            help="Requests from a file, a JSON object per line: prompt (text or ids) or prompt_tokens; new_tokens.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    rate: Annotated[
        float | None,
        typer.Option(help="Poisson arrivals per second, in real time; default: all at once.", show_default=False),
    ] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Goodput counts who kept to this many ms.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="… and to this many ms.")] = None,
    peers: Annotated[list[Peer] | None, typer.Option(help="Who else serves the same requests, in turn.")] = None,
    peer_batches: Annotated[str, typer.Option(help="Sizes of transformers' padded batches.")] = "4,8,16,32",
    max_running: Annotated[int, typer.Option(help="Most requests in flight.", min=1)] = 256,
    repeat: bench_table.Repeat = 1,
    threads: bench_table.Threads = None,
    format: bench_table.FormatOption = bench_table.Format.md,
    output: bench_table.Output = None,
    quiet: Quiet = False,
    loading: Loading,
) -> None:
    """Serve many requests of different lengths: rates, latencies, goodput, pages, memory, each beside its limit."""
    bench_table.check_output(output)
    if peers and rate is not None:
        raise InvalidParam("--peers serve all requests at once; leave --rate out")
    for name, slo in (("ttft", slo_ttft), ("tpot", slo_tpot)):
        if slo is not None and not slo > 0:
            raise InvalidParam(f"--slo-{name} {slo}: expected milliseconds, above 0")
    with common.waiting("starting", quiet):
        import torch

        from handloom import machine
        from handloom.checkpoint import open_checkpoint
        from handloom.measure import peer_serving, workload
    if threads is not None:
        torch.set_num_threads(threads)
    prompts, outputs = workload.Lengths.parse(prompt_tokens), workload.Lengths.parse(new_tokens)
    sizes = bench_table.sizes("--peer-batches", peer_batches)
    busy = machine.is_busy()
    path = Path()
    if peers:  # both read the very same files
        checkpoint = open_checkpoint(model, revision=loading.revision)
        checkpoint.close()
        path, model, loading = checkpoint.path, str(checkpoint.path), replace(loading, revision=None)
    lm = common.load_model(model, loading, quiet=quiet)
    if file is None:
        asked = workload.draw(lm.spec.vocab_size, requests, prompts, outputs, seed)
        what = f"{requests} requests drawn with seed {seed}: {prompts} prompt tokens, {outputs} new ones"
    else:
        asked = workload.read(file, lm.spec.vocab_size, outputs, lambda text: lm.encode(text).token_ids, seed)
        what = f"{len(asked)} requests from {file.name}"
    if rate is not None:
        asked = workload.arriving(asked, rate, seed)
        what += f", arriving at {rate:g} per second"
    found = peer_serving.in_turn(
        lm,
        asked,
        lambda who, total: common.tokens_bar(who, total, quiet),
        repeat=repeat,
        max_running=max_running,
        load_peer=(lambda: common.load_peer(path, lm, quiet=quiet)) if peers else None,
        batch_sizes=sizes,
    )
    with common.waiting("measuring the machine", quiet):
        rows = [*_rows(lm, asked, found, slo_ttft, slo_tpot), *_peer_rows(found)]
    environment = {**bench_table.environment(lm, busy), "workload": what, "max_running": max_running}
    failed = [f"not measured: {name}: {why}" for name, why in found.failed.items()]
    notes = (what, *NOTES, *(PEER_NOTES if peers else ()), *failed)
    bench_table.write(rows, environment, notes, format, output, quiet)


def _rows(
    lm: LM, requests: list[Asked], found: Comparison, slo_ttft: float | None, slo_tpot: float | None
) -> list[Row]:
    """handloom's rows, the machine's limits measured now. Times of all runs stand together."""
    from handloom import machine
    from handloom.measure import limits

    runs = found.ours
    bandwidth = machine.read_bandwidth(device=lm.device, nbytes=machine.weight_bytes_per_token(lm, lm.dtype))
    rate = limits.matmul_rate(lm.dtype, lm.device)
    sizes = [(len(request.prompt), request.new_tokens) for request in requests]
    fastest = limits.serving_seconds(lm, lm.dtype, sizes, bandwidth, rate)
    new = sum(size[1] for size in sizes)
    rows = [
        row("output", "tok/s", [run.output_rate for run in runs], limit=new / fastest),
        row("total", "tok/s", [run.total_rate for run in runs], limit=sum(map(sum, sizes)) / fastest),
        row("requests", "req/s", [run.request_rate for run in runs], limit=len(requests) / fastest),
    ]
    if slo_ttft is not None or slo_tpot is not None:
        kept = [f"{name} ≤ {slo:g} ms" for name, slo in (("ttft", slo_ttft), ("tpot", slo_tpot)) if slo is not None]
        ttft, tpot = (None if slo is None else slo / 1e3 for slo in (slo_ttft, slo_tpot))
        rows.append(row(f"goodput, {', '.join(kept)}", "req/s", [run.goodput(ttft, tpot) for run in runs]))
    served = [request for run in runs for request in run.served]
    times = {
        "ttft": [request.ttft for request in served],
        "tpot": [request.tpot for request in served if request.tpot is not None],
        "itl": [gap for request in served for gap in request.gaps],
    }
    rows += [row(name, "ms", [1e3 * value for value in values], tail=True) for name, values in times.items() if values]
    rows += [
        row("pages, peak", "pages", [run.peak_pages for run in runs], limit=runs[0].num_pages),
        row("waiting, peak", "requests", [run.queued for run in runs]),
        row("preemptions", "times", [run.num_preempted for run in runs]),
        row("peak memory", "MiB", [found.peak_memory / 2**20]),
        row("weights", "MiB", [sum(weight.nbytes for weight in lm.transformer.weights.held.values()) / 2**20]),
        row("KV pool", "MiB", [sum(storage.nbytes for storage in lm.pool.storages.values()) / 2**20]),
        row("read bandwidth", "GB/s", [bandwidth / 1e9], peer="machine"),
        row("matrix product", "GFLOP/s", [rate / 1e9], peer="machine"),
    ]
    return rows


def _peer_rows(found: Comparison) -> list[Row]:
    rows: list[Row] = []
    for name, runs in found.theirs.items():
        rows += [
            row("output", "tok/s", [run.output_rate for run in runs], peer=name),
            row("total", "tok/s", [run.total_rate for run in runs], peer=name),
            row("requests", "req/s", [run.request_rate for run in runs], peer=name),
        ]
    return rows
