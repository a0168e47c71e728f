"""What the README says of speed stands in the rows of benchmarks/results, and follows them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by `python -m benchmarks.report --readme`", "<!-- end -->"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "8 bits": "int8", "4 bits": "int4"}
CASES = {
    r"(\d+) new tokens": "tg{} b1", r"(\d+) new for each of (\d+)": "tg{} b{}", r"a prompt of (\d+)": "pp{} b1",
}  # fmt: skip
PEERS = {
    "handloom": {"handloom"}, "transformers": {"transformers"}, "llama.cpp": {"llama.cpp", "llama.cpp-plain"},
    "CTranslate2": {"ctranslate2"}, "OpenVINO": {"openvino"}, "ONNX Runtime": {"onnxruntime"}, "limit": {"limit"},
}  # fmt: skip


def rows(suite: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]


def section() -> str:
    return (ROOT / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]


def table() -> tuple[list[str], list[dict[str, str]]]:
    """(engines and limit, a line's cells by column); a weight that is not said is the one above."""
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section().splitlines() if line[:1] == "|"
    ]
    head, lines, weights = found[0], [], ""
    for cells in found[2:]:
        weights = cells[0] or weights
        lines.append({**dict(zip(head, cells, strict=True)), "weights": weights, "case": cells[1]})
    return head[2:], lines


def case_of(text: str) -> str:
    for pattern, name in CASES.items():
        if found := re.fullmatch(pattern, text):
            return name.format(*found.groups())
    raise AssertionError(text)


def as_shown(value: float) -> str:
    """At least three figures."""
    return f"{float(f'{value:.3g}'):#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def report(*options: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.report", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_every_figure_of_the_table_is_a_row_of_its_line_s_run() -> None:
    engines, lines = table()
    measured = rows("cpu")
    assert len(lines) == 15 and {"handloom", "transformers", "limit"} <= {*engines}
    for line in lines:
        wanted = DTYPES[line["weights"]], case_of(line["case"])
        own = [row for row in measured if (row["dtype"], row["case"]) == wanted and row["unit"] == "tok/s"]
        own = [row for row in own if not row["machine_busy"]]
        runs = []
        for run in sorted({row["time"] for row in own}):
            values = {row["peer"]: row["p50"] for row in own if row["time"] == run}
            said = {name: next((values[p] for p in PEERS[name] if p in values), None) for name in engines}
            share = f" ({100 * values['handloom'] / values['limit']:.0f}%)" if "handloom" in values else ""
            cells = {name: "" if value is None else as_shown(value) for name, value in said.items()}
            cells["handloom"] += share
            runs.append(cells)
        assert {name: line[name].replace("**", "") for name in engines} in runs, line
        best = max((float(line[name].replace("**", "").split()[0]), name) for name in engines[:-1] if line[name])[1]
        assert [name for name in engines if line[name].startswith("**")] == [best]


def test_the_words_around_the_table_have_figures_of_the_rows() -> None:
    many = {(r["peer"], r["metric"]): r["p50"] for r in rows("throughput") if r["case"].startswith("64 requests")}
    ours, best, limit = (many[who, "new tokens"] for who in ("handloom", "transformers", "limit"))
    said = " ".join(section().split())
    assert f"{as_shown(ours)} new tokens per second, {100 * ours / limit:.0f}% of the limit of {limit:.0f}" in said
    assert f"{ours / best:.2f} times the best of transformers'" in said
    beams = {(r["peer"], r["metric"]): as_shown(r["p50"]) for r in rows("beams")}
    least = f" (the machine needs {beams['limit', 'least time']})" if ("limit", "least time") in beams else ""
    assert (
        f"{beams['handloom', 'time']} s{least} and {beams['handloom', 'K and V']} MiB of K and V; transformers" in said
    )


def test_the_other_machine_s_figures_are_those_of_its_rows() -> None:
    told = " ".join(section().split()).partition("**Without AMX**")[2].partition("**")[0]
    found = [r for r in rows("cpu_without_amx") if r["case"] == "tg64 b1" and r["dtype"] == "int4"]
    speeds = {r["peer"]: r["p50"] for r in found if r["peer"] != "limit"}
    best = max(speed for peer, speed in speeds.items() if peer != "handloom")
    assert found[0]["device"] in told
    assert f"4 bits {as_shown(speeds['handloom'])} ({as_shown(best)});" in told


def test_readme_and_tables_are_what_the_rows_say() -> None:
    done = report("--readme", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_a_new_run_is_out_of_date_until_one_command_renews_it(copy: Path) -> None:
    pytest.importorskip("matplotlib")
    file = copy / "benchmarks" / "results" / "cpu.jsonl"
    ours = [row for row in rows("cpu") if (row["dtype"], row["case"]) == ("fp32", "tg64 b1")]
    newest = max(row["time"] for row in ours)
    later = [{**row, "time": "2999-01-01T00:00:00Z"} for row in ours if row["time"] == newest]
    for row in later:
        row["p50"] = {"handloom": 51.52, "limit": 64.4}.get(row["peer"], row["p50"])
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in later))
    before = (copy / "README.md").read_text()
    done = report("--readme", "--check", root=copy)
    assert done.returncode == 1 and "README.md: out of date" in done.stdout
    assert (copy / "README.md").read_text() == before
    assert report("--readme", root=copy).returncode == 0
    assert "| float32 | 64 new tokens | **51.5** (80%) |" in (copy / "README.md").read_text()
    picture = (copy / "benchmarks" / "results" / "speed.svg").read_text()
    assert ">51.5<" in picture and ">limit 64.4<" in picture and len(picture) < 80_000
    assert "51.5" in (copy / "benchmarks" / "results" / "README.md").read_text()
    assert report("--readme", "--check", root=copy).returncode == 0


def test_handloom_measured_alone_or_on_a_busy_machine_is_not_what_the_table_compares(copy: Path) -> None:
    file = copy / "benchmarks" / "results" / "cpu.jsonl"
    ours = [r for r in rows("cpu") if (r["dtype"], r["case"], r["metric"]) == ("fp32", "tg64 b1", "decode")]
    alone = [{**r, "time": "2999-01-01T00:00:00Z", "p50": 1.0} for r in ours if r["peer"] in ("handloom", "limit")]
    busy = [{**r, "time": "2999-01-02T00:00:00Z", "p50": 2.0, "machine_busy": True} for r in ours]
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in alone + busy))
    done = report("--readme", "--check", root=copy)
    assert done.stdout.splitlines() == ["benchmarks/results/README.md: out of date"], "README.md is not"


def test_the_picture_has_every_rate_of_the_table() -> None:
    engines, lines = table()
    picture = (RESULTS / "speed.svg").read_text()
    shown = set(re.findall(r">(?:limit )?([\d.]+)</text>", picture))
    assert len(picture) < 80_000
    assert {line[name].replace("**", "").split()[0] for line in lines for name in engines if line[name]} <= shown
