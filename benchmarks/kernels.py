"""Every kernel against what a user would call instead, beside the copy and matrix-product rates of the same run.

    python benchmarks/kernels.py                            all; writes results/kernels.csv and pictures
    python benchmarks/kernels.py --kernels norm linear      some of them
    python benchmarks/kernels.py --resume                   what the table lacks or has as failed; the rest stays
    python benchmarks/kernels.py --draw results/kernels.csv pictures and a summary from a table, without a GPU
    TRITON_INTERPRET=1 python benchmarks/kernels.py --device cpu --dtype float32 --small    only to see that it runs

On a GPU, processes side by side first run every call once, for most of the time goes into compiling, and Triton and
torch.compile keep what they compiled. Then one process measures (kernel_clock.py says how), and each row is written as
it comes. A call that fails is a row that says why; a process that dies or falls silent is started again behind the case
that it was at. Peers that are compiled are left out under the interpreter. The cases stand in kernel_cases/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kernel_report
from kernel_report import DTYPES, NEXT, OURS, failed

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# what a decode step is made of first, should the time not suffice
FIRST = ("decode_attention", "norm_qkv", "linear", "lm_head", "selection", "draw", "prefill_attention", "sampling")
KERNELS = sorted((path.stem for path in (HERE / "kernel_cases").glob("*.py")), key=lambda k: (k not in FIRST, k))
SILENCE = 90.0  # seconds without a word after which a process counts as hung
Row = dict[str, Any]
Message = dict[str, Any]


class Worker:
    """A process of kernel_worker.py and what it says, until it ends, hangs, or the time is over."""

    def __init__(self, kernels: Sequence[str], options: Sequence[str], done: set[tuple[str, str]]) -> None:
        command = [sys.executable, str(HERE / "kernel_worker.py"), *kernels, *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(sorted(done)))
        self.process.stdin.close()
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def messages(self, deadline: float) -> Iterator[Message]:
        """What it says; last of all {"end": why}, "" where all was well and "time" at the deadline."""
        while True:
            patience = min(SILENCE, deadline - time.monotonic())
            try:
                line = self._lines.get(timeout=max(patience, 0.0))
            except queue.Empty:
                self.stop()
                yield {"end": "time" if time.monotonic() >= deadline else f"no answer in {SILENCE:.0f} s"}
                return
            if line is None:
                status = self.process.wait()
                yield {"end": f"the process ended with status {status}" if status else ""}
                return
            if line.startswith("{"):
                yield json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Table:
    """The rows of one file, written as they come."""

    def __init__(self, path: Path, resume: bool) -> None:
        kept = kernel_report.read(path) if resume and path.is_file() else []
        self.path, self.rows = path, [row for row in kept if row["case"] != NEXT]
        self._again = {(row["kernel"], row["case"]) for row in self.rows if not row["us"]}
        self.done = {(row["kernel"], row["case"]) for row in self.rows} - self._again

    def has_failed(self, kernel: str, case: str, who: str) -> bool:
        """Is that what the last row says?"""
        last = self.rows[-1] if self.rows else {}
        return [last.get(key) for key in ("kernel", "case", "peer", "us")] == [kernel, case, who, ""]

    def add(self, row: Row) -> None:
        case = row["kernel"], row["case"]
        if case in self._again:  # its old rows have had their time
            self._again.discard(case)
            self.rows = [old for old in self.rows if (old["kernel"], old["case"]) != case]
        self.rows.append(row)
        self.done.add(case)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(max(self.rows, key=len)), restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        shown = ("kernel", "case", "peer", "us", "GB/s", "TFLOP/s", "% of copy", "% of matmul", "method")
        print("  ".join(str(row[key]) for key in shown), file=sys.stderr, flush=True)


def warm_up(kernels: Sequence[str], options: Sequence[str], jobs: int, seconds: float) -> None:
    """Run every call of these kernels once, in `jobs` processes, so that it is compiled when it is measured."""
    deadline = time.monotonic() + seconds
    left = queue.SimpleQueue[str]()
    for kernel in kernels:
        left.put(kernel)

    def run() -> None:
        while time.monotonic() < deadline:
            try:
                kernel = left.get_nowait()
            except queue.Empty:
                return
            for message in Worker([kernel], [*options, "--once"], set()).messages(deadline):
                if "row" in message or message.get("end"):
                    print(f"  compiling {kernel}: {message}"[:400], file=sys.stderr, flush=True)

    threads = [threading.Thread(target=run) for _ in range(min(jobs, len(kernels)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(kernels: Sequence[str], options: Sequence[str], table: Table, seconds: float) -> list[str]:
    """Fill the table; returns the kernels that the time did not suffice for, wholly or in part."""
    deadline = time.monotonic() + seconds
    left, labels = list(kernels), Row()
    while left:
        kernel, case, who = left[0], NEXT, OURS
        for message in Worker(left, options, table.done).messages(deadline):
            if "labels" in message:
                labels = {**message["labels"], "command": " ".join(["python benchmarks/kernels.py", *sys.argv[1:]])}
                print(f"copy {labels['copy GB/s']} GB/s, matmul {labels['matmul TFLOP/s']} TFLOP/s", file=sys.stderr)
            elif "begin" in message:
                kernel, case, who = message["begin"]
                left = left[left.index(kernel) :]
            elif "row" in message:
                table.add({**message["row"], **labels})
            elif message["end"] == "time":
                return left
            elif not message["end"]:
                return []
            elif not table.has_failed(kernel, case, who):  # else it said why before it ended
                table.add({**failed(kernel, case, who, message["end"]), **labels})
        if case == NEXT:  # nothing behind it in this kernel can be reached
            left = left[1:]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep what the table has and measure what it lacks")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything; what is not reached is said")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.csv")
    parser.add_argument("--pictures", type=Path, default=RESULTS / "kernels")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="only pictures and a summary of this table")
    arguments = parser.parse_args()
    started = time.monotonic()
    table = Table(arguments.draw or arguments.output, arguments.draw is not None or arguments.resume)
    not_reached: list[str] = []
    if not arguments.draw:
        options = ["--device", arguments.device, "--dtype", arguments.dtype, *(["--small"] if arguments.small else [])]
        if arguments.device != "cpu":
            warm_up(arguments.kernels, options, arguments.jobs, arguments.seconds / 2)
            print(f"compiled in {time.monotonic() - started:.0f} s", file=sys.stderr)
        rest = started + arguments.seconds - time.monotonic()
        not_reached = measure(arguments.kernels, options, table, rest)
    print(kernel_report.summary(table.rows))
    if not_reached:
        print(f"the time did not suffice for {', '.join(not_reached)}: go on with --resume")
    try:
        kernel_report.draw(table.rows, arguments.pictures)
    except ImportError as error:
        print(f"no pictures ({error}): draw them elsewhere with --draw {arguments.output}")
    sys.exit(1 if not_reached or kernel_report.own_failures(table.rows) else 0)


if __name__ == "__main__":
    main()
