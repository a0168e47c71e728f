"""The picture of `handloom bench cpu`: every precision, tok/s beside the limit and beside every peer.

This module does not know how anything was measured; report.py calls it with the rows of suite "cpu".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report import LIMIT, OURS, Row, newest, setting_of

COLOURS = ("#3b7a57", "#c96f2e", "#4668a8", "#8a5a9e", "#a8a03c", "#7d7d7d", "#b04a5a")


def _peers(rows: Iterable[Row]) -> list[str]:
    """Who was measured, handloom first."""
    names = dict.fromkeys(row["peer"] for row in rows if row["peer"] != LIMIT)
    return sorted(names, key=lambda name: name != OURS)


def picture(rows: list[Row], file: Path) -> None:
    """A panel for each precision and kind of test: a bar per batch and engine, the limit as a line above them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rates = [row for row in rows if row["unit"] == "tok/s"]
    cases = newest(rates)
    settings = list(dict.fromkeys(setting for setting, *_ in cases))
    metrics = list(dict.fromkeys(metric for *_, metric in cases))
    peers = _peers(rates)
    size = (6 * len(metrics), 2.4 * len(settings) + 0.6)
    figure, panels = plt.subplots(len(settings), len(metrics), figsize=size, layout="constrained", squeeze=False)
    for line, setting in zip(panels, settings, strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            found = {case: rows for (s, case, m), rows in cases.items() if (s, m) == (setting, metric)}
            _bars(axes, found, peers)
            precision = next(row["dtype"] for row in rates if setting_of(row) == setting)
            axes.set_title(f"{precision}: {metric}", fontsize=10)
    by_label = {}
    for axes in figure.axes:
        by_label.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=len(by_label))
    figure.savefig(file)
    plt.close(figure)


def _bars(axes: Any, cases: dict[str, dict[str, Row]], peers: list[str]) -> None:
    """Medians with p20 to p80, a group of bars per case, and its limit."""
    names, width = list(cases), 0.8 / len(peers)
    for i, peer in enumerate(peers):
        bars = [
            (at - 0.4 + (i + 0.5) * width, cases[case][peer]) for at, case in enumerate(names) if peer in cases[case]
        ]
        if bars:
            places, heights = [place for place, _ in bars], [row["p50"] for _, row in bars]
            spreads = [[row["p50"] - row["p20"] for _, row in bars], [row["p80"] - row["p50"] for _, row in bars]]
            axes.bar(places, heights, width, yerr=spreads, color=COLOURS[i % len(COLOURS)], label=peer, capsize=2)
    for at, case in enumerate(names):
        if LIMIT in cases[case]:
            label = LIMIT if at == 0 else None
            axes.hlines(cases[case][LIMIT]["p50"], at - 0.45, at + 0.45, color="black", label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("tok/s")
    axes.set_ylim(bottom=0)
