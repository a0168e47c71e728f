"""Every kernel against what a user would call instead, beside the copy and matrix-product rates of the same run.

    python benchmarks/kernels.py                            all; adds rows to results/gpu.jsonl
    python benchmarks/kernels.py --kernels norm linear      some of them
    python benchmarks/kernels.py --resume                   the cases of which the table has no time of ours
    python -m benchmarks.report benchmarks/results/gpu.jsonl --pictures benchmarks/results/gpu
    TRITON_INTERPRET=1 python benchmarks/kernels.py --device cpu --dtype float32 --small    only to see that it runs

On a GPU, processes side by side first run every call once, for most of the time goes into compiling, and Triton and
torch.compile keep what they compiled. Then one process measures (kernel_clock.py says how), and each row is written as
it comes. A call that fails is a row that says why; a process that dies or falls silent is started again behind the case
that it was at. Peers that are compiled are left out under the interpreter. The cases stand in kernel_cases/.
"""

from __future__ import annotations

import argparse
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
from handloom.measure.results import Results
from kernel_report import DTYPES, FAILED, NEXT, OURS, SUITE, TIME, add_failure

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

    def __init__(self, kernels: Sequence[str], options: Sequence[str], done: Sequence[Sequence[str]]) -> None:
        command = [sys.executable, str(HERE / "kernel_worker.py"), *kernels, *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(done))
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
    """The rows of one run, added to a file as they come, and those that the file had of kernels.

    done: (kernel, case, device, dtype, revision) of which it had a time of ours.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        kept = [json.loads(line) for line in path.read_text().splitlines()] if resume and path.is_file() else []
        self.path, self.rows = path, [row for row in kept if row["suite"] == SUITE]
        self.labels: Row = {"command": "python benchmarks/kernels.py " + " ".join(sys.argv[1:])}
        names = ("model", "case", "device", "dtype", "revision")
        timed = [row for row in self.rows if (row["peer"], row["metric"]) == (OURS, TIME)]
        self.done = [[row[name] for name in names] for row in timed]

    def begin(self, labels: Row) -> None:
        """Take what the rows of a process share."""
        self.labels = {**labels, "command": self.labels["command"]}

    def add(self, rows: Sequence[Row]) -> None:
        new = [{**row, "command": self.labels["command"]} for row in rows]
        self.rows += new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        for row in new:
            if row["metric"] in (TIME, FAILED):
                said = row.get("why") or f"{row['p50']:.4g} {row['unit']}"
                print(f"{row['model']}: {row['case']}: {row['peer']}: {said}", file=sys.stderr, flush=True)

    def leave(self, kernel: str, case: str, who: str, why: str) -> None:
        """Say why there is no time of a case, unless the process did, and never begin it again in this run.

        Raises SystemExit if the process had not even said where it is.
        """
        if "device" not in self.labels:
            raise SystemExit(f"a process that measures ended before it began: {why}")
        self.done.append([kernel, case, *(self.labels[name] for name in ("device", "dtype", "revision"))])
        last = self.rows[-1] if self.rows else {}
        if [last.get(key) for key in ("model", "case", "peer", "metric")] != [kernel, case, who, FAILED]:
            one = Results(None, {**self.labels, "model": kernel}, show=lambda _: None)
            add_failure(one, who, case, why)
            self.add(one.rows)


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
            for message in Worker([kernel], [*options, "--once"], ()).messages(deadline):
                if message.get("rows") or message.get("end"):
                    print(f"  compiling {kernel}: {message}"[:400], file=sys.stderr, flush=True)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(jobs, len(kernels)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(kernels: Sequence[str], options: Sequence[str], table: Table, seconds: float) -> list[str]:
    """Fill the table; returns the kernels that the time did not suffice for, wholly or in part."""
    deadline, left = time.monotonic() + seconds, list(kernels)
    while left:
        kernel, case, who = left[0], NEXT, OURS
        for message in Worker(left, options, table.done).messages(deadline):
            if "labels" in message:
                table.begin(message["labels"])
            elif "begin" in message:
                kernel, case, who = message["begin"]
                left = left[left.index(kernel) :]
            elif "rows" in message:
                table.add(message["rows"])
            elif message["end"] == "time":
                return left
            elif not message["end"]:
                return []
            else:
                table.leave(kernel, case, who, message["end"])
        if case == NEXT:  # nothing behind it in this kernel can be reached
            left = left[1:]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="measure only what the table lacks")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything; what is not reached is said")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.jsonl")
    arguments = parser.parse_args()
    started = time.monotonic()
    table = Table(arguments.output, arguments.resume)
    not_reached = ["whatever it was at"]
    options = ["--device", arguments.device, "--dtype", arguments.dtype, *(["--small"] if arguments.small else [])]
    try:
        if arguments.device != "cpu":
            warm_up(arguments.kernels, options, arguments.jobs, arguments.seconds / 2)
            print(f"compiled in {time.monotonic() - started:.0f} s", file=sys.stderr)
        rest = started + arguments.seconds - time.monotonic()
        not_reached = measure(arguments.kernels, options, table, rest)
    finally:  # also when interrupted
        print(kernel_report.summary(table.rows))
        if not_reached:
            print(f"the time did not suffice for {', '.join(not_reached)}: go on with --resume", flush=True)
    sys.exit(1 if not_reached or kernel_report.own_failures(table.rows) else 0)


if __name__ == "__main__":
    main()
