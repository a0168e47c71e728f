"""Tables, and a picture where matplotlib is installed, from the lines of results/*.jsonl.

    python -m benchmarks.report benchmarks/results/cpu_vs_transformers.jsonl [--picture out.svg]
    python -m benchmarks.report benchmarks/results/gpu.jsonl [--pictures FOLDER]

Of each case the newest row counts. Rows of `handloom bench cpu` and of gpu.py have tables and pictures of their own
(report_cpu.py, report_gpu.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS, THEIRS, LIMIT = "handloom", "transformers", "limit"
SMALLER_IS_BETTER = {"s", "ms", "MiB"}

Row = dict[str, Any]
Cases = dict[tuple[str, str, str], dict[str, Row]]


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def setting_of(row: Row) -> str:
    """What the rows of one table have in common."""
    return f"{row['suite']}: {row['model']}, {row['dtype']}, {row['device']}, {row['threads']} threads"


def newest(rows: Iterable[Row]) -> Cases:
    """{(setting, case, metric): {peer: row}}, in the order in which the cases first came."""
    cases: Cases = {}
    for row in rows:
        cases.setdefault((setting_of(row), row["case"], row["metric"]), {})[row["peer"]] = row
    return cases


def markdown(rows: Iterable[Row]) -> str:
    """One table per setting. Ratio above 1: handloom is better."""
    lines: list[str] = []
    last = ""
    for (setting, case, metric), peers in newest(rows).items():
        if setting != last:
            row = next(iter(peers.values()))
            lines += ["", f"**{setting}** ({row['time']}, revision {row['revision']}, {versions(row)})", ""]
            lines += ["The machine was busy: too low, and uneven.", ""] if row["machine_busy"] else []
            lines += ["| case | metric | handloom p50 (p20–p80) | transformers | ratio | limit | % of limit |"]
            lines += ["|---|---|---|---|---:|---:|---:|"]
            last = setting
        lines.append(_line(case, metric, peers))
    return "\n".join(lines).strip() + "\n"


def _line(case: str, metric: str, peers: dict[str, Row]) -> str:
    ours, theirs, limit = peers.get(OURS), peers.get(THEIRS), peers.get(LIMIT)
    unit = next(iter(peers.values()))["unit"]
    cells = [case, f"{metric}, {unit}", spread(ours), spread(theirs)]
    cells.append(f"{ratio(ours, theirs):.2f}" if ours and theirs else "")
    cells.append(number(limit["p50"]) if limit else "")
    cells.append(f"{100 * ours['p50'] / limit['p50']:.0f}" if ours and limit else "")
    return "| " + " | ".join(cells) + " |"


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

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path, help="of the suites of a CPU")
    parser.add_argument("--pictures", type=Path, help="a folder, for those of the suites and kernels of a GPU")
    arguments = parser.parse_args()
    rows = [row for file in arguments.files for row in read(file)]
    gpu = [row for row in rows if row["suite"].startswith(report_gpu.SUITE)]
    cpu = [row for row in rows if row["suite"] == "cpu"]
    ours = [row for row in rows if row not in gpu and row not in cpu]
    if arguments.picture and ours and cpu:
        parser.error("--picture: the suite cpu has a picture of its own; name its files apart")
    for report, some in ((markdown, ours), (report_cpu.markdown, cpu), (report_gpu.markdown, gpu)):
        if some:
            print(report(some), end="")
    if arguments.picture:
        (report_cpu.picture if cpu else picture)(cpu or ours, arguments.picture)
    if arguments.pictures:
        report_gpu.pictures(gpu, arguments.pictures)
        kernel_report.draw(gpu, arguments.pictures)


if __name__ == "__main__":
    main()
