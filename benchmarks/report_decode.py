"""The table and the picture of gpu_decode.py, from the lines of its results.

    python benchmarks/report_decode.py benchmarks/results/gpu_decode.jsonl [--picture mbu.svg]

Of each case the newest row counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from report import Cases, Row, newest, number, read, spread

COLUMNS = ("step", "decode", "MBU, measured", "MBU, nominal", "host's share", "kernels per step")


def markdown(rows: Iterable[Row]) -> str:
    """One table per setting, a line per batch size and peer."""
    rows = [row for row in rows if row["suite"] == "decode"]
    cases = newest(rows)
    lines: list[str] = []
    for setting in dict.fromkeys(setting for setting, _, _ in cases):
        own = {(case, metric): peers for (where, case, metric), peers in cases.items() if where == setting}
        row = next(iter(next(iter(own.values())).values()))
        lines += ["", f"**{setting}** ({row['time']}, revision {row['revision']})", ""]
        lines += ["The machine was busy: too low, and uneven.", ""] if row["machine_busy"] else []
        lines += ["| case | peer | ms per step | tok/s | MBU of measured, % | of nominal, % | host, % | kernels |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        for case in dict.fromkeys(case for case, _ in own):
            for peer in own[case, "step"]:
                cells = [own.get((case, metric), {}).get(peer) for metric in COLUMNS]
                lines.append(f"| {case} | {peer} | " + " | ".join(map(spread, cells)) + " |")
            lines.append(f"| {case} | limit | | {number(own[case, 'decode']['limit']['p50'])} | 100 | | | |")
    return "\n".join(lines).strip() + "\n"


def points(cases: Cases, metric: str) -> dict[str, list[tuple[int, float]]]:
    """{model and peer: (batch size, value)}."""
    found: dict[str, list[tuple[int, float]]] = {}
    for (_, case, name), peers in cases.items():
        for peer, row in peers.items():
            if name == metric and peer != "limit":
                found.setdefault(f"{row['model'].removesuffix(', random')}, {peer}", []).append(
                    (int(case.split()[1]), row["p50"])
                )
    return {name: sorted(values) for name, values in found.items()}


def picture(rows: Iterable[Row], file: Path) -> None:
    """MBU by batch size, a line per model and peer."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, values in points(newest(rows), "MBU, measured").items():
        axes.plot(*zip(*values, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.set_xlabel("rows in a step")
    axes.set_ylabel("bytes of a step over time and measured bandwidth, %")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    rows = [row for file in arguments.files for row in read(file)]
    print(markdown(rows), end="")
    if arguments.picture:
        picture(rows, arguments.picture)


if __name__ == "__main__":
    main()
