"""Tables of measurements: what a row is, what it holds for, and the formats it is written in.

This module does not know what is measured, or how.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handloom.cli import common
from handloom.errors import InvalidParam

if TYPE_CHECKING:
    from handloom.lm import LM

Repeat = Annotated[int, typer.Option(help="Runs that count.", min=1)]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; default: as many as PyTorch takes.", min=1, show_default=False)
]

TIMES = ("s", "ms")


class Format(StrEnum):
    """What the results are written as."""

    md = "md"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"


FormatOption = Annotated[Format, typer.Option("--format", help="Markdown, CSV, JSON, or a JSON object per line.")]
Output = Annotated[Path | None, typer.Option(help="Write to this file, not to standard output.")]


@dataclass(frozen=True, slots=True)
class Row:
    """One test's result; limit, and the percentage of it that was reached, where there is one; p99 where it says
    something; peer: who was measured."""

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
    p99: float | None = None
    peer: str = "handloom"


def row(
    test: str,
    unit: str,
    values: Sequence[float],
    *,
    limit: float | None = None,
    tail: bool = False,
    peer: str = "handloom",
) -> Row:
    """A row of at least one value; limit: the best there could be, of a time the least; tail: with its p99."""
    from handloom.measure import stats

    summary = stats.summarize(values)
    percent = None
    if limit is not None:
        percent = 100 * (limit / summary.mean if unit in TIMES else summary.mean / limit)
    p99 = stats.percentile(values, 99) if tail else None
    return Row(test, unit, **asdict(summary), limit=limit, percent_of_limit=percent, p99=p99, peer=peer)


def check_output(output: Path | None) -> None:
    """Before anything is measured. Raises InvalidParam."""
    if output is not None and not output.parent.is_dir():
        raise InvalidParam(f"--output {output}: there is no folder {output.parent}")


def sizes(option: str, text: str) -> list[int]:
    """Numbers from 1 to 1024 between commas, each once, the smallest first. Raises InvalidParam."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 5 and 0 < int(part) <= 1024 for part in parts):
        raise InvalidParam(f"{option} {text[:40]!r}: expected sizes from 1 to 1024, as 1,4,8")
    return sorted({int(part) for part in parts})


def write(
    rows: Sequence[Row],
    environment: dict[str, Any],
    notes: Sequence[str],
    format: Format,
    output: Path | None,
    quiet: bool,
) -> None:
    """To the file, or to standard output."""
    text = FORMATS[format](environment, rows, notes)
    if output is None:
        print(text, end="", flush=True)
    else:
        output.write_text(text)
        common.say(f"written to {output}", quiet)


def environment(lm: LM, busy: bool) -> dict[str, Any]:
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
        "weights": "/".join(lm.held),
        "backend": lm.backend.name,
        "device": gpus[lm.device.index or 0]["name"] if is_gpu else f"{cpu['name']}, {cpu['usable_cores']:g} cores",
        "threads": torch.get_num_threads(),
        "machine_busy": busy,
        "os": found["os"],
        "versions": {name: version for name, version in versions.items() if version is not None},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# Formats ---------------------------------------------------------------------------------------


def _markdown(environment: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> str:
    versions = environment["versions"]
    head = (
        f"{environment['model']} · {environment['weights']} · {environment['backend']} backend · "
        f"{environment['device']} · {environment['threads']} threads · handloom {versions['handloom']}, "
        f"torch {versions['torch']}, Python {versions['python']} · {environment['time']}"
    )
    busy = ["**Other programs were using the machine: these numbers are too low.**", ""]
    lines = [head, "", *(busy if environment["machine_busy"] else [])]
    peers, tails = len({row.peer for row in rows} - {"machine"}) > 1, any(row.p99 is not None for row in rows)
    names = ["test", *(["peer"] if peers else []), "mean ± sd", "p50", *(["p99"] if tails else []), "unit", "limit"]
    lines += [f"| {' | '.join([*names, '% of limit'])} |"]
    lines += ["|---" * (1 + peers) + "|---:" * (2 + tails) + "|---|---:|---:|"]
    for row in rows:
        mean = _number(row.mean) + (f" ± {_number(row.sd)}" if row.n > 1 else "")
        cells = [row.test, *([row.peer] if peers else []), mean, _number(row.p50)]
        cells += [_number(row.p99)] if tails else []
        cells += [row.unit, _number(row.limit), "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _flat(environment: dict[str, Any], row: Row) -> dict[str, Any]:
    plain = {name: value for name, value in environment.items() if name != "versions"}
    return asdict(row) | plain | {f"{name}_version": v for name, v in environment["versions"].items()}


def _csv(environment: dict[str, Any], rows: Sequence[Row], _: Sequence[str]) -> str:
    flat = [_flat(environment, row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _json(environment: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> str:
    whole = {"environment": environment, "notes": notes, "rows": [asdict(row) for row in rows]}
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def _jsonl(environment: dict[str, Any], rows: Sequence[Row], _: Sequence[str]) -> str:
    return "".join(json.dumps(_flat(environment, row), ensure_ascii=False) + "\n" for row in rows)


FORMATS: dict[Format, Callable[[dict[str, Any], Sequence[Row], Sequence[str]], str]] = {
    Format.md: _markdown,
    Format.csv: _csv,
    Format.json: _json,
    Format.jsonl: _jsonl,
}
