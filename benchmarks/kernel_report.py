"""The kernel benchmark's table: its rows, a summary for the terminal, a picture per kernel if matplotlib is there."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "handloom"
NEXT = "the next case"  # one that could not be made, or that nobody knows the name of
DTYPES = ("bfloat16", "float16", "float32")
COLUMNS = ("us", "us_p20", "us_p80", "GB/s", "TFLOP/s", "% of copy", "% of matmul", "difference")
MOST_FAILURES = 15
Row = dict[str, Any]


def failed(kernel: str, case: str, peer: str, reason: object) -> Row:
    """A row without numbers, whose method says why."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    named = f"{type(reason).__name__}: {text}" if isinstance(reason, Exception) else text
    empty = dict.fromkeys(COLUMNS, "")
    return {"kernel": kernel, "case": case, "peer": peer, **empty, "method": f"failed: {named[:300]}"}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def own_failures(rows: Iterable[Row]) -> list[Row]:
    """The cases in which our kernel failed."""
    return [row for row in rows if row["peer"] == OURS and not row["us"]]


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """{kernel: {case: rows}}, in the order in which they came."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["kernel"], {}).setdefault(row["case"], []).append(row)
    return found


def summary(rows: Sequence[Row]) -> str:
    """A line per kernel: cases; share of the nearer ceiling; how many times faster than the fastest peer of each case
    (lowest, geometric mean, highest). Then what failed. At most some 5000 characters."""
    lines = [
        f"{'kernel':<24}{'cases':>6}{'failed':>7}{'% of roof: least':>17}{'median':>8}{'best':>6}   x fastest peer"
    ]
    for kernel, cases in by_case(rows).items():
        shares: list[float] = []
        ratios: list[float] = []
        for found in cases.values():
            times = {row["peer"]: float(row["us"]) for row in found if row["us"]}
            ours = times.pop(OURS, None)
            if ours is not None:
                shares.append(max(share(row) for row in found if row["peer"] == OURS))
                ratios += [min(times.values()) / ours] if times else []
        failed = len(own_failures(row for found in cases.values() for row in found))
        line = f"{kernel:<24}{len(cases):>6}{failed:>7}"
        if shares:
            ordered = sorted(shares)
            line += f"{ordered[0]:>17.0f}{ordered[len(ordered) // 2]:>8.0f}{ordered[-1]:>6.0f}"
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            line += f"   {min(ratios):.2f} .. {mean:.2f} .. {max(ratios):.2f}"
        lines.append(line)
    broken = [row for row in rows if not row["us"]]
    lines += [f"{row['kernel']}: {row['case']}: {row['peer']}: {row['method']}"[:180] for row in broken[:MOST_FAILURES]]
    if len(broken) > MOST_FAILURES:
        lines.append(f"and {len(broken) - MOST_FAILURES} more that failed; the table has them all")
    return "\n".join(lines)


def share(row: Row) -> float:
    """Percent of the nearer of the two ceilings."""
    return max(float(row["% of copy"]), float(row["% of matmul"]))


def draw(rows: Iterable[Row], folder: Path) -> None:
    """One picture per kernel: for every case, ours and the peers as a share of the nearer of the two ceilings."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for kernel, cases in by_case(row for row in rows if row["us"]).items():
        bars = [(case, row) for case, found in cases.items() for row in found]
        figure, axes = plt.subplots(figsize=(9, 0.28 * len(bars) + 1.2), layout="constrained")
        colours = ["#3b7a57" if row["peer"] == OURS else "#b8b8b8" for _, row in bars]
        names = [f"{case}  {row['peer']}" if row["peer"] == OURS else row["peer"] for case, row in bars]
        drawn = axes.barh(range(len(bars)), [share(row) for _, row in bars], color=colours)
        axes.bar_label(drawn, [f"{float(row['us']):.3g} us" for _, row in bars], padding=3, fontsize=8)
        axes.set_yticks(range(len(bars)), names, fontsize=8)
        axes.axvline(100, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("% of the copy or matrix-product rate of the same run, whichever is nearer")
        axes.set_title(f"{kernel}, {bars[0][1]['dtype']}, {bars[0][1]['device']}", fontsize=10)
        figure.savefig(folder / f"{kernel}.svg")
        plt.close(figure)
