"""Tables, and a picture where matplotlib is installed, from the lines of results/*.jsonl.

    python -m benchmarks.report benchmarks/results/cpu_vs_transformers.jsonl [--picture out.svg]
    python -m benchmarks.report benchmarks/results/gpu.jsonl [--pictures FOLDER]
    python -m benchmarks.report --readme [--check]

Of each case the newest row counts. Rows of gpu.py have tables of their own, and they and those of `handloom bench cpu`
pictures (report_gpu.py, report_cpu.py). --readme writes what the README says of speed, the picture beside it, and the
tables of all results into results/README.md (report_readme.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS, THEIRS, LIMIT = "handloom", "transformers", "limit"
SMALLER_IS_BETTER = {"s", "ms", "µs", "MiB"}

Row = dict[str, Any]
Cases = dict[tuple[str, str, str], dict[str, Row]]


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def setting_of(row: Row) -> str:
    """What the rows of one table have in common."""
    named = [str(row["model"])] if "model" in row else []
    return f"{row['suite']}: {', '.join([*named, row['dtype'], row['device']])}, threads: {row['threads']}"


def newest(rows: Iterable[Row]) -> Cases:
    """{(setting, case, metric): {peer: row}}, in the order in which the cases first came."""
    cases: Cases = {}
    for row in rows:
        cases.setdefault((setting_of(row), row["case"], row["metric"]), {})[row["peer"]] = row
    return cases


def markdown(rows: Iterable[Row]) -> str:
    """A table per setting: medians (p20–p80) of everybody, and the limit. Ratio above 1: handloom is better."""
    tables: dict[str, list[tuple[str, str, dict[str, Row]]]] = {}
    for (setting, case, metric), peers in newest(rows).items():
        tables.setdefault(setting, []).append((case, metric, peers))
    lines: list[str] = []
    for setting, cases in tables.items():
        measured = [row for *_, peers in cases for row in peers.values()]
        lines += ["", f"**{setting}**", "", *_runs(measured), "", *_held(measured)]
        lines += ["The machine was busy: too low, and uneven.", ""] if any(r["machine_busy"] for r in measured) else []
        lines += _table(cases)
    return "\n".join(lines).strip() + "\n"


def _runs(rows: Iterable[Row]) -> list[str]:
    """A line about each run that these rows are of."""
    said = {(row["time"], row["revision"], row["command"]): versions(row) for row in rows}
    return [f"- {time}, revision {of}, {known}: `{command}`" for (time, of, command), known in sorted(said.items())]


def _held(rows: Iterable[Row]) -> list[str]:
    """How each engine held the weights, and its version, where that is said."""
    held = {row["peer"]: f"{row['held']}, {row['version']}" for row in rows if "held" in row}
    return ["; ".join(f"{peer}: {what}" for peer, what in held.items()), ""] if held else []


def _table(cases: list[tuple[str, str, dict[str, Row]]]) -> list[str]:
    """Columns of everybody who was measured, handloom first; ratio and limit where there are any."""
    everybody = dict.fromkeys(peer for *_, found in cases for peer in found)
    peers = sorted((peer for peer in everybody if peer != LIMIT), key=lambda peer: peer != OURS)
    against, limited = {OURS, THEIRS} <= {*peers}, LIMIT in everybody
    ends = ["ratio"] * against + ["limit", "% of limit"] * limited
    lines = [f"| {' | '.join(['case', 'metric', *peers, *ends])} |", f"|---|---{'|---:' * len([*peers, *ends])}|"]
    for case, metric, found in cases:
        ours, theirs, limit = found.get(OURS), found.get(THEIRS), found.get(LIMIT)
        unit = next(iter(found.values()))["unit"]
        cells = [case, f"{metric}, {unit}", *(spread(found.get(peer)) for peer in peers)]
        cells += [f"{ratio(ours, theirs):.2f}" if ours and theirs and _compares(ours) else ""] * against
        cells += [number(limit["p50"]) if limit else ""] * limited
        cells += [f"{100 * ours['p50'] / limit['p50']:.0f}" if ours and limit else ""] * limited
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _compares(row: Row) -> bool:
    """Whether twice as much, or half as much, is twice as good."""
    return row["unit"] in SMALLER_IS_BETTER or row["unit"].endswith("/s")


def ratio(ours: Row, theirs: Row) -> float:
    """How many times better handloom is."""
    less = ours["unit"] in SMALLER_IS_BETTER
    return float(theirs["p50"] / ours["p50"] if less else ours["p50"] / theirs["p50"])


def spread(row: Row | None) -> str:
    if row is None:
        return ""
    return number(row["p50"]) + (f" ({number(row['p20'])}–{number(row['p80'])})" if row["n"] > 1 else "")


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def versions(row: Row) -> str:
    names = ("python", "torch", "transformers")
    return ", ".join(f"{name} {row['versions'][name]}" for name in names)


def picture(rows: Iterable[Row], file: Path) -> None:
    """A bar per case: how many times better handloom is than transformers."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    pairs = [
        (f"{case}\n{metric}", ratio(peers[OURS], peers[THEIRS]))
        for (_, case, metric), peers in newest(rows).items()
        if OURS in peers and THEIRS in peers
    ]
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(pairs) + 1), layout="constrained")
    bars = axes.barh([name for name, _ in pairs], [value for _, value in pairs], color="#3b7a57")
    axes.bar_label(bars, fmt="%.2f×", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("times better than transformers generate")
    figure.savefig(file)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # run as a module it would not find its neighbours
    import kernel_report
    import report_cpu
    import report_gpu
    import report_readme

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--picture", type=Path, help="of the suites of a CPU")
    parser.add_argument("--pictures", type=Path, help="a folder, for those of the suites and kernels of a GPU")
    parser.add_argument("--readme", action="store_true", help="renew README.md and results/README.md from results/")
    parser.add_argument("--check", action="store_true", help="with --readme: write nothing, fail where it would change")
    arguments = parser.parse_args()
    if arguments.readme == bool(arguments.files) or (arguments.check and not arguments.readme):
        parser.error("name files of rows, or give --readme, which reads all of results/; --check is for --readme")
    if arguments.readme:
        sys.exit(report_readme.renew(check=arguments.check))
    rows = [row for file in arguments.files for row in read(file)]
    gpu = [row for row in rows if row["suite"].startswith(report_gpu.SUITE)]
    others = [row for row in rows if not row["suite"].startswith(report_gpu.SUITE)]
    cpu = [row for row in others if row["suite"] == "cpu"]
    if arguments.picture and 0 < len(cpu) < len(others):
        parser.error("--picture: the suite cpu has a picture of its own; name its files apart")
    for report, some in ((markdown, others), (report_gpu.markdown, gpu)):
        if some:
            print(report(some), end="")
    if arguments.picture:
        (report_cpu.picture if cpu else picture)(others, arguments.picture)
    if arguments.pictures:
        report_gpu.pictures(gpu, arguments.pictures)
        kernel_report.draw(gpu, arguments.pictures)


if __name__ == "__main__":
    main()
