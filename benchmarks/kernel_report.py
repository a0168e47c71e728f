"""The kernel benchmark's rows in the long table: what names them, a summary for the terminal, a picture per kernel.

A row's model is the kernel. A call that failed has one row of metric FAILED that says why; the newest row of a peer in
a case counts. This module does not know how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handloom.measure.results import Results

SUITE = "gpu kernels"
OURS = "handloom"
NEXT = "the next case"  # one that could not be made, or that nobody knows the name of
TIME, FAILED = "time", "failed"
SHARES = ("MBU, measured", "MFU, measured")
DTYPES = ("bfloat16", "float16", "float32")
MOST_FAILURES = 15
Row = dict[str, Any]
Case = dict[str, dict[str, Row]]


def add_failure(results: Results, peer: str, case: str, reason: object) -> None:
    """A row that says why there is no time."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    named = f"{type(reason).__name__}: {text}" if isinstance(reason, Exception) else text
    results.add(peer, case, FAILED, "", [1], why=named[:300])


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Case]]:
    """{kernel: {case: {peer: {metric: row}}}}, in the order in which they came; a peer's time, or why there is none."""
    found: dict[str, dict[str, Case]] = {}
    for row in rows:
        if row["suite"] != SUITE or row["peer"] == "limit":
            continue
        metrics = found.setdefault(row["model"], {}).setdefault(row["case"], {}).setdefault(row["peer"], {})
        for former in {TIME: (FAILED,), FAILED: [*metrics]}.get(row["metric"], ()):
            metrics.pop(former, None)
        metrics[row["metric"]] = row
    return {kernel: _timed(cases) for kernel, cases in found.items()}


def _timed(cases: dict[str, Case]) -> dict[str, Case]:
    """Without the case that has no name, once others came."""
    return {name: case for name, case in cases.items() if name != NEXT or len(cases) == 1}


def own_failures(rows: Iterable[Row]) -> list[Row]:
    """Of the cases in which our kernel failed, the rows that say so."""
    return [
        case[OURS][FAILED]
        for cases in by_case(rows).values()
        for case in cases.values()
        if FAILED in case.get(OURS, {})
    ]


def summary(rows: Sequence[Row]) -> str:
    """A line per kernel: cases; share of the nearer roof; how many times faster than the fastest peer of each case
    (lowest, geometric mean, highest). Then what failed. At most some 5000 characters."""
    lines = [
        f"{'kernel':<24}{'cases':>6}{'failed':>7}{'% of roof: least':>17}{'median':>8}{'best':>6}   x fastest peer"
    ]
    broken: list[Row] = []
    for kernel, cases in by_case(rows).items():
        shares: list[float] = []
        ratios: list[float] = []
        failed = 0
        for peers in cases.values():
            broken += [metrics[FAILED] for metrics in peers.values() if FAILED in metrics]
            failed += FAILED in peers.get(OURS, {})
            times = {peer: metrics[TIME]["p50"] for peer, metrics in peers.items() if TIME in metrics}
            ours = times.pop(OURS, None)
            if ours is not None:
                shares.append(share(peers[OURS]))
                ratios += [min(times.values()) / ours] if times else []
        line = f"{kernel:<24}{len(cases):>6}{failed:>7}"
        if shares:
            ordered = sorted(shares)
            line += f"{ordered[0]:>17.0f}{ordered[len(ordered) // 2]:>8.0f}{ordered[-1]:>6.0f}"
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            line += f"   {min(ratios):.2f} .. {mean:.2f} .. {max(ratios):.2f}"
        lines.append(line)
    broken.sort(key=lambda row: row["peer"] != OURS)
    lines += [f"{row['model']}: {row['case']}: {row['peer']}: {row['why']}"[:180] for row in broken[:MOST_FAILURES]]
    if len(broken) > MOST_FAILURES:
        lines.append(f"and {len(broken) - MOST_FAILURES} more that failed; the table has them all")
    return "\n".join(lines)


def share(metrics: dict[str, Row]) -> float:
    """Percent of the nearer of the two roofs of the same run."""
    return max((metrics[name]["p50"] for name in SHARES if name in metrics), default=0.0)


def draw(rows: Iterable[Row], folder: Path) -> list[Path]:
    """One picture per kernel: for every case, ours and the peers as a share of the nearer of the two roofs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for kernel, cases in by_case(rows).items():
        bars = [
            (case, peer, metrics)
            for case, peers in cases.items()
            for peer, metrics in sorted(peers.items(), key=lambda item: item[0] != OURS)
            if TIME in metrics
        ]
        if not bars:
            continue
        figure, axes = plt.subplots(figsize=(9, 0.28 * len(bars) + 1.2), layout="constrained")
        colours = ["#3b7a57" if peer == OURS else "#b8b8b8" for _, peer, _ in bars]
        names = [f"{case}  {peer}" if peer == OURS else peer for case, peer, _ in bars]
        bar = axes.barh(range(len(bars)), [share(metrics) for *_, metrics in bars], color=colours)
        axes.bar_label(bar, [f"{metrics[TIME]['p50']:.3g} us" for *_, metrics in bars], padding=3, fontsize=8)
        axes.set_yticks(range(len(bars)), names, fontsize=8)
        axes.axvline(100, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("% of the copy or matrix-product rate of the same run, whichever is nearer")
        first = bars[0][2][TIME]
        axes.set_title(f"{kernel}, {first['dtype']}, {first['device']}", fontsize=10)
        drawn.append(folder / f"kernel_{kernel}.svg")
        figure.savefig(drawn[-1])
        plt.close(figure)
    return drawn
