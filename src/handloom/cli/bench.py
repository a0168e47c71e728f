"""`handloom bench`: how fast a model runs here, beside how fast it could.

Tests have the names of llama-bench: pp512 processes a prompt of 512 tokens, tg128 generates 128 tokens from an
empty context (a prompt of one token), "tg128 @ d512" does so with 512 tokens in the cache.

This module does not know how anything is measured.
"""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handloom.cli import common
from handloom.errors import InvalidParam

if TYPE_CHECKING:
    from collections.abc import Sequence

    from handloom.lm import LM
    from handloom.measure.speed import Run
    from handloom.measure.stats import Summary

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


class Format(StrEnum):
    """What the results are written as."""

    md = "md"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """One test's result; limit, and the percentage of it that was reached, where there is one."""

    test: str
    unit: str
    n: int
    mean: float
    sd: float
    p20: float
    p50: float
    p80: float
    limit: float | None = None
    percent_of_limit: float | None = None


def bench(
    model: common.ModelArgument = None,
    pp: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    tg: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 128,
    repeat: Annotated[int, typer.Option(help="Runs that count.", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before that, which do not.", min=0)] = 1,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: as many as PyTorch takes.", min=1, show_default=False)
    ] = None,
    format: Annotated[Format, typer.Option(help="Markdown, CSV, JSON, or a JSON object per line.")] = Format.md,
    output: Annotated[Path | None, typer.Option(help="Write to this file, not to standard output.")] = None,
    quiet: common.Quiet = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    backend: common.BackendName = "auto",
    max_context: common.MaxContext = None,
    revision: common.Revision = None,
) -> None:
    """Measure prompt processing, generation, load time and memory, each beside what the machine would allow."""
    if output is not None and not output.parent.is_dir():
        raise InvalidParam(f"--output {output}: there is no folder {output.parent}")
    with common.waiting("starting", quiet):
        import torch

        import handloom.lm  # noqa: F401  (so that its import is not part of the load time)
        from handloom import machine
        from handloom.measure import speed
    if threads is not None:
        torch.set_num_threads(threads)
    busy = machine.is_busy()
    wanted = common.ModelOptions(
        model=model, device=device, dtype=dtype, backend=backend, max_context=max_context, revision=revision
    )
    started = time.perf_counter()
    lm = common.load_model(wanted, quiet=quiet)
    load_seconds, load_peak = time.perf_counter() - started, speed.peak_memory()
    runs = _run(lm, pp, tg, repeat, warmup, quiet)
    peaks = {"load": load_peak, "runs": speed.peak_memory(), "device": speed.peak_device_memory(lm.device)}
    with common.waiting("measuring the machine", quiet):  # last, or its buffers would be the peak of memory
        rows = _rows(lm, pp, tg, runs, load_seconds, peaks)
    text = FORMATS[format](_environment(lm, busy), rows)
    if output is None:
        print(text, end="", flush=True)
    else:
        output.write_text(text)
        common.say(f"written to {output}", quiet)


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
    from handloom.measure import limits, stats

    bandwidth = machine.read_bandwidth(device=lm.device)
    rate = limits.matmul_rate(lm.dtype, lm.device)

    def decode_row(name: str, context: int) -> Row:
        limit = machine.decode_limit(lm, lm.dtype, bandwidth, context + tg // 2)
        return _row(name, "tok/s", stats.summarize([run.decode_rate for run in runs[context]]), limit)

    prefill = stats.summarize([run.prefill_rate for run in runs[pp]])
    rows = [
        _row("load", "s", stats.summarize([load_seconds])),
        _row(f"pp{pp}", "tok/s", prefill, limits.prefill_limit(lm.spec, pp, rate)),
        decode_row(f"tg{tg}", 1),
    ]
    if pp > 1:
        rows.append(decode_row(f"tg{tg} @ d{pp}", pp))
    rows.append(_row(f"ttft @ {pp}", "ms", stats.summarize([1e3 * run.first_text for run in runs[pp]])))
    names = {"load": "peak memory, loading", "runs": "peak memory", "device": "peak GPU memory"}
    rows += [
        _row(names[key], "MiB", stats.summarize([peak / 2**20])) for key, peak in peaks.items() if peak is not None
    ]
    rows.append(_row("read bandwidth", "GB/s", stats.summarize([bandwidth / 1e9])))
    rows.append(_row("matrix product", "GFLOP/s", stats.summarize([rate / 1e9])))
    return rows


def _row(test: str, unit: str, summary: Summary, limit: float | None = None) -> Row:
    percent = None if limit is None else 100 * summary.mean / limit
    return Row(test, unit, **asdict(summary), limit=limit, percent_of_limit=percent)


def _environment(lm: LM, busy: bool) -> dict[str, Any]:
    """What the numbers hold for; plain JSON."""
    import torch

    from handloom import machine

    found = machine.describe()
    cpu, gpus, versions = found["cpu"], found["gpus"], found["versions"]
    is_gpu = lm.device.type == "cuda"
    return {
        "model": lm.name,
        "origin": lm.origin,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "backend": lm.backend.name,
        "device": gpus[lm.device.index or 0]["name"] if is_gpu else f"{cpu['name']}, {cpu['usable_cores']:g} cores",
        "threads": torch.get_num_threads(),
        "machine_busy": busy,
        "os": found["os"],
        "versions": {name: version for name, version in versions.items() if version is not None},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# Formats ---------------------------------------------------------------------------------------


def _markdown(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    versions = environment["versions"]
    head = (
        f"{environment['model']} · {environment['dtype']} · {environment['backend']} backend · {environment['device']} "
        f"· {environment['threads']} threads · handloom {versions['handloom']}, torch {versions['torch']}, "
        f"Python {versions['python']} · {environment['time']}"
    )
    busy = ["**Other programs were using the machine: these numbers are too low.**", ""]
    lines = [head, "", *(busy if environment["machine_busy"] else [])]
    lines += ["| test | mean ± sd | p50 | unit | limit | % of limit |", "|---|---:|---:|---|---:|---:|"]
    for row in rows:
        mean = _number(row.mean) + (f" ± {_number(row.sd)}" if row.n > 1 else "")
        limit = "" if row.limit is None else _number(row.limit)
        percent = "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f}"
        lines.append(f"| {row.test} | {mean} | {_number(row.p50)} | {row.unit} | {limit} | {percent} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES), ""])


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _flat(environment: dict[str, Any], row: Row) -> dict[str, Any]:
    plain = {name: value for name, value in environment.items() if name != "versions"}
    return asdict(row) | plain | {f"{name}_version": v for name, v in environment["versions"].items()}


def _csv(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    flat = [_flat(environment, row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _json(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    whole = {"environment": environment, "notes": NOTES, "rows": [asdict(row) for row in rows]}
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def _jsonl(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    return "".join(json.dumps(_flat(environment, row), ensure_ascii=False) + "\n" for row in rows)


FORMATS = {Format.md: _markdown, Format.csv: _csv, Format.json: _json, Format.jsonl: _jsonl}
