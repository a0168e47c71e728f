"""Tables and pictures of the suites of gpu.py, from their rows alone.

This module does not know how anything was measured; report.py calls it with the rows whose suite is a GPU's. Of each
case the newest row counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kernel_report import FAILED
from report import LIMIT, OURS, Cases, Row, newest, number, ratio, read, spread, versions

__all__ = ["SUITE", "Row", "markdown", "pictures", "read"]

SUITE = "gpu "
"""What the names of these suites begin with."""
PART = "part: "
PLACES = ("device", "host")
"""Whose memory; a metric of the suite `memory` is "place: owner", the last owner IN_ALL."""
IN_ALL = "in all"
MAIN = ("decode", "prefill", "new tokens", "chosen", "load to first token", *(f"{place}: {IN_ALL}" for place in PLACES))
MACHINE = "machine"
COLOURS = ("#3b7a57", "#c96f2e", "#4668a8", "#8a5a9e", "#a8a03c", "#7d7d7d", "#b04a5a", "#4aa3a3")
KINDS = {"gpu latency": "o", "gpu batch": "s", "gpu prefill": "^"}


def markdown(rows: Iterable[Row]) -> str:
    """A table per suite, model and device: a line per case and peer, a column per metric."""
    lines: list[str] = []
    for (suite, model, device), own in by_setting(rows).items():
        first = next(iter(own.values()))
        row = next(iter(first.values()))
        lines += ["", f"**{suite}: {model}, {row['dtype']}, {device}** ({row['time']}, revision {row['revision']},"]
        lines += [f"{versions(row)}, triton {row['versions'].get('triton')})", ""]
        lines += ["The machine was busy: too low, and uneven.", ""] if row["machine_busy"] else []
        lines += [roofs(own), ""] if any(case == MACHINE for case, _ in own) else []
        lines += _table({key: peers for key, peers in own.items() if key[0] != MACHINE})
        lines += _parts(own) + _failures(own)
    return "\n".join(lines).strip() + "\n"


def by_setting(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Row]]]:
    """{(suite, model, device): {(case, metric): {peer: row}}}."""
    found: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        own = found.setdefault((row["suite"], row["model"], row["device"]), {})
        own.setdefault((row["case"], row["metric"]), {})[row["peer"]] = row
    return found


def roofs(own: dict[tuple[str, str], dict[str, Row]]) -> str:
    said = [(metric, peers[LIMIT]) for (case, metric), peers in own.items() if case == MACHINE]
    return ", ".join(f"{metric} {number(row['p50'])} {row['unit']}" for metric, row in said)


def _table(own: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    own = {key: peers for key, peers in own.items() if not key[1].startswith(PART) and key[1] != FAILED}
    metrics = {metric: next(iter(peers.values()))["unit"] for (_, metric), peers in own.items()}
    lines = ["| case | who | " + " | ".join(f"{m}, {u}" if u and u != m else m for m, u in metrics.items()) + " |"]
    lines += ["|---|---" + "|---:" * len(metrics) + "|"]
    for case in dict.fromkeys(case for case, _ in own):
        found = [own.get((case, metric), {}) for metric in metrics]
        for peer in dict.fromkeys(peer for peers in found for peer in peers):
            lines.append(f"| {case} | {peer} | " + " | ".join(spread(peers.get(peer)) for peers in found) + " |")
    return lines


def _parts(own: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    lines = []
    for case, parts in parts_of(own).items():
        total = sum(parts.values())
        shares = ", ".join(f"{part} {number(us)} us ({100 * us / total:.0f}%)" for part, us in parts.items())
        lines += ["", f"One step of {case}: {shares}."]
    return lines


def _failures(own: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    """What failed, and was not measured since."""
    since: dict[tuple[str, str], str] = {}
    for (case, metric), peers in own.items():
        for peer, row in peers.items():
            if metric != FAILED:
                since[case, peer] = max(since.get((case, peer), ""), row["time"])
    return [
        f"\nFailed: {case}: {peer}: {row['why']}"
        for (case, metric), peers in own.items()
        for peer, row in peers.items()
        if metric == FAILED and row["time"] >= since.get((case, peer), "")
    ]


def parts_of(own: dict[tuple[str, str], dict[str, Row]]) -> dict[str, dict[str, float]]:
    """{case: {part: microseconds}}, in the order in which they were written: the largest first."""
    found: dict[str, dict[str, float]] = {}
    for (case, metric), peers in own.items():
        if metric.startswith(PART) and OURS in peers:
            found.setdefault(case, {})[metric.removeprefix(PART)] = peers[OURS]["p50"]
    return found


def in_short(rows: Iterable[Row]) -> str:
    """A line per case: handloom's rate, its share of the limit, and how many times better it is than each peer."""
    lines = ["In short"]
    for (suite, model, _), own in by_setting(rows).items():
        for (case, metric), peers in own.items():
            if metric not in MAIN or OURS not in peers:
                continue
            ours, limit = peers[OURS], peers.get(LIMIT)
            line = f"{suite.removeprefix(SUITE)}: {model.removesuffix(', random')}: {case}: {metric} "
            line += f"{number(ours['p50'])} {ours['unit']}"
            line += f", {100 * ours['p50'] / limit['p50']:.0f}% of the limit" if limit else ""
            for name in ("MBU, nominal", "MFU, nominal", "host's share"):
                found = own.get((case, name), {}).get(OURS)
                line += f", {name} {number(found['p50'])}%" if found else ""
            others = [(peer, row) for peer, row in peers.items() if peer not in (OURS, LIMIT)]
            line += "".join(f"; x{ratio(ours, row):.2f} {peer}" for peer, row in others)
            lines.append(line[:320])
    return "\n".join(lines) + "\n"


# Pictures --------------------------------------------------------------------------------------


def pictures(rows: list[Row], folder: Path, suffix: str = "svg") -> list[Path]:
    """Draw what there are rows for: the roofline, MBU by batch size, time of one step by part, memory by owner.

    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    every = {"roofline": _roofline, "mbu_by_batch": _mbu, "step_by_part": _steps, "memory_by_owner": _memory}
    for name, draw in every.items():
        figure = draw(plt, rows)
        if figure is not None:
            drawn.append(folder / f"{name}.{suffix}")
            figure.savefig(drawn[-1], dpi=110)
            plt.close(figure)
    return drawn


def _label(row: Row) -> str:
    return str(row["model"]).removeprefix("llama ").removesuffix(", random")


def _title(rows: Iterable[Row]) -> str:
    found = dict.fromkeys(f"{row['device']}, {row['dtype']}" for row in rows)
    return "; ".join(found)


def _roofline(plt: Any, rows: list[Row]) -> Any:
    """handloom's points under the two roofs: what was measured drawn through, what is nominal dashed."""
    cases: Cases = newest(rows)
    limits = {metric: peers[LIMIT]["p50"] for (_, case, metric), peers in cases.items() if case == MACHINE}
    points = []
    for (setting, case, metric), peers in cases.items():
        moved = cases.get((setting, case, "GB/s"), {}).get(OURS)
        if metric == "TFLOP/s" and OURS in peers and moved is not None and peers[OURS]["suite"] in KINDS:
            points.append((peers[OURS], 1e3 * peers[OURS]["p50"], moved["p50"]))
    if not points or "matrix product" not in limits:
        return None
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    low = min(min(flops / moved for _, flops, moved in points) / 3, 0.5)
    high = max(3 * max(flops / moved for _, flops, moved in points), 3e3)
    bandwidth = max(limits["read bandwidth"], limits["copy bandwidth"])
    for kind, style, width in (("", "-", 1.5), ("nominal ", "--", 1.0)):
        slope = limits.get("nominal bandwidth") if kind else bandwidth
        flat = limits.get(f"{kind}matrix product")
        if slope and flat:
            axes.plot(
                [low, flat / slope, high], [low * slope, flat, flat], style, color="black", linewidth=width,
                label=f"{kind or 'measured '}roofs: {number(slope)} GB/s, {number(flat / 1e3)} TFLOP/s",
            )  # fmt: skip
    seen: dict[tuple[str, str], str] = {}
    models = list(dict.fromkeys(_label(row) for row, *_ in points))
    for row, flops, moved in points:
        key = row["suite"].removeprefix(SUITE), _label(row)
        label = None if key in seen else f"{key[1]}, {key[0]}"
        seen[key] = row["case"]
        colour = COLOURS[models.index(key[1]) % len(COLOURS)]
        axes.plot([flops / moved], [flops], KINDS[row["suite"]], color=colour, alpha=0.85, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that has to be moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"handloom under the roofs, {_title(row for row, *_ in points)}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2)
    return figure


def _mbu(plt: Any, rows: list[Row]) -> Any:
    """A line per model and peer: bytes of a step over its time and the measured bandwidth, by rows in the step."""
    lines: dict[str, dict[int, float]] = {}
    used = [row for row in rows if row["suite"] == "gpu batch" and row["metric"] == "MBU, measured"]
    for row in used:
        lines.setdefault(f"{_label(row)}, {row['peer']}", {})[int(row["case"].split(" x ")[0])] = row["p50"]
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    models = list(dict.fromkeys(_label(row) for row in used))
    peers = list(dict.fromkeys(row["peer"] for row in used))
    for name, values in lines.items():
        model, peer = name.split(", ", 1)
        style = ("-", "--", ":", "-.")[peers.index(peer) % 4]
        colour = COLOURS[models.index(model) % len(COLOURS)] if len(models) > 1 else COLOURS[peers.index(peer)]
        axes.plot(*zip(*sorted(values.items()), strict=True), style, marker="o", color=colour, label=name)
    sizes = sorted({size for values in lines.values() for size in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_ylim(0, max(100, *(value for values in lines.values() for value in values.values())) * 1.05)
    axes.axhline(100, color="black", linewidth=1)
    axes.set_xlabel("rows in a step")
    axes.set_ylabel("MBU of the bandwidth measured in the run, %")
    axes.set_title(f"Decoding by batch size, {_title(used)}", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    axes.grid(alpha=0.2)
    return figure


def _steps(plt: Any, rows: list[Row]) -> Any:
    """A bar per model and case: the shares of one decode step that its parts take, and its milliseconds."""
    bars = {
        (model.removeprefix("llama ").removesuffix(", random"), case): parts
        for (suite, model, _), own in by_setting(rows).items()
        for case, parts in parts_of(own).items()
        if suite in KINDS
    }
    if not bars:
        return None
    models = list(dict.fromkeys(model for model, _ in bars))
    bars = dict(sorted(bars.items(), key=lambda bar: (models.index(bar[0][0]), int(bar[0][1].split(" x ")[0]))))
    labelled = {f"{model}, {case}": parts for (model, case), parts in bars.items()}
    figure = _shares(plt, labelled, lambda total: f"{number(total / 1e3)} ms", "% of one decode step")
    figure.suptitle(f"Where a step's time goes, {_title(rows)}", fontsize=10)
    return figure


def _memory(plt: Any, rows: list[Row]) -> Any:
    """A bar per model, case and place: the shares that its owners have of the most that was held, and its MiB."""
    bars: dict[str, dict[str, float]] = {}
    used = [row for row in rows if row["suite"] == "gpu memory" and row["peer"] == OURS]
    for (_, model, _), own in by_setting(used).items():
        for (case, metric), peers in own.items():
            place, _, owner = metric.partition(": ")
            if place in PLACES and owner != IN_ALL:
                label = f"{model.removeprefix('llama ').removesuffix(', random')}, {case}, {place}"
                bars.setdefault(label, {})[owner] = peers[OURS]["p50"]
    if not bars:
        return None
    figure = _shares(plt, bars, lambda total: f"{number(total)} MiB", "% of the most that was held")
    figure.suptitle(f"Who holds memory, {_title(used)}", fontsize=10)
    return figure


def _shares(plt: Any, bars: dict[str, dict[str, float]], text: Callable[[float], str], what: str) -> Any:
    """A horizontal bar per label, its parts as shares of their sum, and what `text` says of that."""
    totals = [sum(parts.values()) for parts in bars.values()]
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(bars) + 2), layout="constrained")
    left = [0.0] * len(bars)
    for at, part in enumerate(dict.fromkeys(part for parts in bars.values() for part in parts)):
        shares = [100 * parts.get(part, 0.0) / total for parts, total in zip(bars.values(), totals, strict=True)]
        hatch = "//" if at >= len(COLOURS) else None
        drawn = axes.barh([*bars], shares, left=left, color=COLOURS[at % len(COLOURS)], hatch=hatch, label=part)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.bar_label(drawn, [text(total) for total in totals], padding=3, fontsize=8)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(what)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return figure
