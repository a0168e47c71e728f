"""Every kernel against what a user would call instead, beside the copy and matrix-product rates of the same run.

    python benchmarks/kernels.py                            all; writes results/kernels.csv and pictures
    python benchmarks/kernels.py --kernels norm linear      some of them
    python benchmarks/kernels.py --draw results/kernels.csv pictures from a table, without a GPU
    TRITON_INTERPRET=1 python benchmarks/kernels.py --device cpu --dtype float32 --small    only to see that it runs

Times are medians of CUDA-graph replays, ours and the peers in turn. Before each call a buffer of twice the second-level
cache is read, so that weights and pages come from memory as they do in a model; its own time, measured alike, is taken
off. What cannot be captured in a graph is timed with events, and the table says so. Under the interpreter compiled
peers are left out. The cases stand in kernel_cases/.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from kernel_case import KernelCase

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
KERNELS = sorted(path.stem for path in (HERE / "kernel_cases").glob("*.py"))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS = "handloom"
REPEATS, ROUNDS = 20, 15
Row = dict[str, Any]


# Timing ------------------------------------------------------------------------------------------


class Clock:
    """Times calls on one device in microseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._sweep = torch.randn(2 * cache // 4, device=device)

    def in_turn(self, runs: Sequence[Callable[[], object]]) -> list[tuple[list[float], str]]:
        """For each call (microseconds per round, method); rounds of all calls alternate."""
        if not self.on_gpu:
            return [([1e6 * _seconds(run)], "interpreter") for run in runs]
        graphs = [self._graph(run) for run in runs]
        empty = self._graph(lambda: None)
        assert empty is not None
        replayed: list[list[float]] = [[] for _ in runs]
        for _ in range(ROUNDS):
            base = self._replay(empty)
            for times, graph in zip(replayed, graphs, strict=True):
                if graph is not None:
                    times.append(max(self._replay(graph) - base, 1e-3))
        return [
            (times, "graph") if graph is not None else (self._events(run), "events")
            for run, graph, times in zip(runs, graphs, replayed, strict=True)
        ]

    def _graph(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        """REPEATS times (sweep the cache, run), or None where that cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(REPEATS):
                    self._sweep.amax()
                    run()
        except RuntimeError as error:
            print(f"  not captured: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
            return None
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end) / REPEATS

    def _events(self, run: Callable[[], object]) -> list[float]:
        return [1000 * ms for ms in triton.testing.do_bench(run, return_mode="all")]


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ceilings(clock: Clock, dtype: torch.dtype, small: bool) -> tuple[float, float]:
    """(bytes per second of a large copy, read and written; operations per second of a large matrix product)."""
    size, side = (1 << 20, 64) if small else (1 << 29, 8192)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    (copied, _), (multiplied, _) = clock.in_turn([lambda: target.copy_(source), lambda: left @ right])
    return 2e6 * size / statistics.median(copied), 2e6 * side**3 / statistics.median(multiplied)


# Measuring ---------------------------------------------------------------------------------------


def measure(kernel: str, case: KernelCase, clock: Clock, roofs: tuple[float, float]) -> list[Row]:
    """One row for us and one for each peer; of a peer that cannot run, with the reason instead of a time."""
    peers = {name: run for name, run in case.peers.items() if clock.on_gpu or "compile" not in name}
    runs = {OURS: case.run, **peers}
    ours = case.run()
    rows: list[Row] = []
    for (peer, run), (times, method) in zip(runs.items(), clock.in_turn(list(runs.values())), strict=True):
        median = statistics.median(times)
        spread = statistics.quantiles(times, n=5) if len(times) > 1 else [median] * 4
        rows.append(
            {
                "kernel": kernel,
                "case": case.name,
                "peer": peer,
                "us": f"{median:.3f}",
                "us_p20": f"{spread[0]:.3f}",
                "us_p80": f"{spread[3]:.3f}",
                "GB/s": f"{case.bytes_moved / median / 1e3:.1f}",
                "TFLOP/s": f"{case.flops / median / 1e6:.3f}",
                "% of copy": f"{1e8 * case.bytes_moved / median / roofs[0]:.1f}",
                "% of matmul": f"{1e8 * case.flops / median / roofs[1]:.1f}",
                "difference": "" if peer == OURS else difference(ours, run()),
                "method": method,
            }
        )
        print("  ".join(str(rows[-1][key]) for key in list(rows[-1])[:10]), file=sys.stderr, flush=True)
    for peer, reason in case.missing.items():
        row = dict.fromkeys(rows[0], "") | {"kernel": kernel, "case": case.name, "peer": peer}
        rows.append(row | {"method": f"not available: {reason}"})
    return rows


def difference(ours: object, theirs: object) -> str:
    """Largest difference over largest value; empty where the two are not laid out alike."""
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        found = [float(part) for pair in zip(ours, theirs, strict=False) if (part := difference(*pair))]
        return f"{max(found):.2g}" if found else ""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or not ours.is_floating_point():
        return ""
    if ours.shape != theirs.shape or not ours.numel():
        return ""
    mine, other = ours.double().flatten(), theirs.double().flatten()
    finite = mine.isfinite() & other.isfinite()
    return f"{((mine - other)[finite].abs().max() / other[finite].abs().max()).item():.2g}" if finite.any() else ""


def labels(device: torch.device, dtype: torch.dtype, roofs: tuple[float, float]) -> Row:
    """What all rows share."""
    import common

    return {
        "copy GB/s": f"{roofs[0] / 1e9:.0f}",
        "matmul TFLOP/s": f"{roofs[1] / 1e12:.1f}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "revision": common.revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python benchmarks/kernels.py", *sys.argv[1:]]),
    }


# Pictures ----------------------------------------------------------------------------------------


def draw(rows: Iterable[Row], folder: Path) -> None:
    """One picture per kernel: for every case, ours and the peers as a share of the nearer of the two ceilings."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    by_kernel: dict[str, dict[str, list[Row]]] = {}
    for row in (row for row in rows if row["us"]):
        by_kernel.setdefault(row["kernel"], {}).setdefault(row["case"], []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for kernel, cases in by_kernel.items():
        bars = [(case, row) for case, found in cases.items() for row in found]
        figure, axes = plt.subplots(figsize=(9, 0.28 * len(bars) + 1.2), layout="constrained")
        shares = [max(float(row["% of copy"]), float(row["% of matmul"])) for _, row in bars]
        colours = ["#3b7a57" if row["peer"] == OURS else "#b8b8b8" for _, row in bars]
        names = [f"{case}  {row['peer']}" if row["peer"] == OURS else row["peer"] for case, row in bars]
        drawn = axes.barh(range(len(bars)), shares, color=colours)
        axes.bar_label(drawn, [f"{float(row['us']):.3g} us" for _, row in bars], padding=3, fontsize=8)
        axes.set_yticks(range(len(bars)), names, fontsize=8)
        axes.axvline(100, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("% of the copy or matrix-product rate of the same run, whichever is nearer")
        axes.set_title(f"{kernel}, {bars[0][1]['dtype']}, {bars[0][1]['device']}", fontsize=10)
        figure.savefig(folder / f"{kernel}.svg")
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.csv")
    parser.add_argument("--pictures", type=Path, default=RESULTS / "kernels")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="only draw the pictures of this table")
    arguments = parser.parse_args()
    if arguments.draw:
        with arguments.draw.open(newline="") as file:
            draw(csv.DictReader(file), arguments.pictures)
        return

    torch.manual_seed(0)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    clock = Clock(device)
    roofs = ceilings(clock, dtype, arguments.small)
    shared = labels(device, dtype, roofs)
    print(f"copy {shared['copy GB/s']} GB/s, matrix product {shared['matmul TFLOP/s']} TFLOP/s", file=sys.stderr)
    rows: list[Row] = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for kernel in arguments.kernels:
            for case in importlib.import_module(f"kernel_cases.{kernel}").cases(device, dtype, arguments.small):
                new = [{**row, **shared} for row in measure(kernel, case, clock, roofs)]
                if writer is None:
                    writer = csv.DictWriter(file, list(new[0]))
                    writer.writeheader()
                writer.writerows(new)
                file.flush()
                rows += new
    try:
        draw(rows, arguments.pictures)
    except ImportError:
        print(
            f"matplotlib is not installed: draw the pictures elsewhere with --draw {arguments.output}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
