"""The one long table of results that suites write to and reports are drawn from: a line of JSON per row.

This module does not know what is measured.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from handloom import machine
from handloom.measure.stats import summarize

ROOT = Path(__file__).resolve().parents[3]
"""Of the checkout, where this is one."""


def tell(text: str) -> None:
    """A line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Results:
    """One suite's rows, written to a file (where there is one) as they come; `labels` are columns that all rows share.

    show: called with a line about each row.
    """

    file: Path | None
    labels: dict[str, Any]
    show: Callable[[str], None] = tell
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, peer: str, case: str, metric: str, unit: str, values: Sequence[float], **own: Any) -> None:
        """Append a row. peer: who was measured, or "limit"; metric: what; values: one per round; own: labels of its
        own, which go before those of all rows."""
        measured = {"peer": peer, "case": case, "metric": metric, "unit": unit, **asdict(summarize(values))}
        row = {**measured, **self.labels, **own}
        self.rows.append(row)
        self._write([row])
        self.show(f"{case}: {metric}: {peer} {row['p50']:.4g} {unit}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is added within is written at the end; nothing of it where an exception, or an interrupt, ends it."""
        file, before = self.file, len(self.rows)
        self.file = None
        try:
            yield
        finally:
            self.file = file
        self._write(self.rows[before:])

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.file is not None and rows:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))


def open_results(suite: str, file: Path | None, device: torch.device, dtype: torch.dtype, **labels: Any) -> Results:
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
    """The commit of this checkout, with "+changes" if src or kernels differ from it; "unknown" outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if not (ROOT / "kernels" / "torch-ext").is_dir():  # installed, maybe inside of another project's checkout
        return "unknown"
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "kernels")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
