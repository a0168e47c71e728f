"""benchmarks/kernels.py adds rows to the long table, through Triton's interpreter here, and goes on where it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LABELS = {
    "suite": "gpu kernels", "device": "a GPU", "dtype": "bfloat16", "threads": 1, "machine_busy": False,
    "versions": {"python": "3", "torch": "2", "transformers": "5", "triton": "3"}, "revision": "abc", "time": "1",
}  # fmt: skip


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = (sys.executable, *command)
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=BENCHMARKS.parent)


def test_every_case_has_rows_of_ours_and_of_peers_and_the_report_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command = [
        BENCHMARKS / "kernels.py",
        "--kernels",
        "norm",
        "kv_pages",
        "linear",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    first = run(*command, "--small", "--output", file)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = read(file)
    cases = {(row["model"], row["case"], row["peer"]) for row in rows if row["metric"] == "time"}
    assert {(model, peer) for model, _, peer in cases} >= {
        ("norm", "handloom"), ("norm", "torch"), ("kv_pages", "handloom")
    }  # fmt: skip
    assert len(rows) == len({(row["model"], row["case"], row["peer"], row["metric"]) for row in rows}), "none twice"
    assert {row["suite"] for row in rows} == {"gpu kernels"} and all(row["p50"] >= 0 for row in rows)
    apart = [row["p50"] for row in rows if row["metric"] == "difference from ours" and row["model"] == "norm"]
    assert apart and max(apart) < 1e-5
    again = run(*command, "--small", "--output", file, "--resume")
    assert again.returncode == 0 and again.stdout == first.stdout
    assert read(file) == rows, "what the table has is not measured again"
    report = run("-m", "benchmarks.report", file).stdout
    assert "**gpu kernels: norm, float32" in report and "| rms 2 x 64 | handloom |" in report
    if util.find_spec("matplotlib") is not None:
        assert run("-m", "benchmarks.report", file, "--pictures", tmp_path / "p").returncode == 0
        assert {"kernel_norm.svg", "kernel_kv_pages.svg"} <= {path.name for path in (tmp_path / "p").iterdir()}


class Told:
    """A process that says what it is told to, of each start its own."""

    lives: list[list[dict[str, Any]]]
    given: list[list[list[str]]]

    def __init__(self, kernels: Any, options: Any, done: list[list[str]]) -> None:
        Told.given.append([*done])

    def messages(self, deadline: float) -> Iterator[dict[str, Any]]:
        yield from Told.lives.pop(0)


def row(kernel: str, case: str, peer: str, metric: str = "time", value: float = 2.0, **own: Any) -> dict[str, Any]:
    numbers = {"n": 1, "mean": value, "sd": 0.0, "p20": value, "p50": value, "p80": value}
    return {"peer": peer, "case": case, "metric": metric, "unit": "us", **numbers, **LABELS, "model": kernel, **own}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    # under a name of its own: transformers looks for a package `kernels`, and finds our folder of that name
    spec = util.spec_from_file_location("kernels_benchmark", BENCHMARKS / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    Told.given = []
    monkeypatch.setattr(module, "Worker", Told)
    return module


def test_a_process_that_dies_is_a_row_and_the_next_begins_behind(kernels: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Told.lives = [
        [
            {"labels": LABELS}, {"begin": ["norm", "a", "handloom"]}, {"rows": [row("norm", "a", "handloom")]},
            {"begin": ["norm", "b", "torch"]}, {"end": "the process ended with status -11"},
        ],
        [
            {"labels": LABELS}, {"begin": ["norm", "c", "handloom"]},
            {"rows": [row("norm", "c", "handloom", "failed", why="no")]}, {"end": "the process ended with status 3"},
        ],
        [{"labels": LABELS}, {"begin": ["rope", "the next case", "handloom"]}, {"end": "no answer in 90 s"}],
        [{"end": ""}],
    ]  # fmt: skip
    table = kernels.Table(file, resume=False)
    assert kernels.measure(["norm", "rope", "draw"], [], table, 60.0) == []
    found = [(r["model"], r["case"], r["peer"], r["metric"], r.get("why")) for r in read(file)]
    assert found == [
        ("norm", "a", "handloom", "time", None),
        ("norm", "b", "torch", "failed", "the process ended with status -11"),
        ("norm", "c", "handloom", "failed", "no"),
        ("rope", "the next case", "handloom", "failed", "no answer in 90 s"),
    ]
    assert [[case[:2] for case in given] for given in Told.given] == [
        [], [["norm", "b"]], [["norm", "b"], ["norm", "c"]], [["norm", "b"], ["norm", "c"], ["rope", "the next case"]]
    ]  # fmt: skip
    assert kernels.Table(file, resume=True).done == [["norm", "a", "a GPU", "bfloat16", "abc"]]
    said = kernels.kernel_report.summary(read(file))
    assert "norm: c: handloom: no" in said and "norm: b: torch: the process ended with status -11" in said


def test_a_time_takes_the_place_of_an_older_failure_and_the_other_way_round(kernels: Any) -> None:
    report, failed = kernels.kernel_report, {"metric": "failed", "why": "no"}
    earlier, later = row("norm", "a", "handloom", **failed), row("norm", "a", "handloom", time="2")
    assert report.own_failures([earlier]) == [earlier] and report.own_failures([earlier, later]) == []
    assert report.own_failures([later, earlier]) == [earlier]
    import report_gpu

    assert "Failed: a: handloom: no" in report_gpu.markdown([earlier])
    assert "Failed" not in report_gpu.markdown([earlier, later])


def test_a_process_that_cannot_begin_ends_the_run(kernels: Any, tmp_path: Path) -> None:
    Told.lives = [[{"end": "the process ended with status 1"}]]
    with pytest.raises(SystemExit, match="ended before it began: the process ended with status 1"):
        kernels.measure(["norm"], [], kernels.Table(tmp_path / "rows.jsonl", resume=False), 60.0)
