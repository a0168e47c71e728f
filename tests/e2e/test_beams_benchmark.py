"""benchmarks/beams.py runs to its end and writes every row it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import save, tiny_llama

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "beams.py"


@pytest.mark.slow
def test_the_benchmark_of_beams_has_time_and_memory_of_both(tmp_path: Path) -> None:
    folder, rows = save(tiny_llama(), tmp_path / "tiny"), tmp_path / "rows.jsonl"
    sizes = ["--beams", "4", "--prompt", "64", "--new", "6", "--rounds", "2", "--threads", "1"]
    command = [sys.executable, SCRIPT, "--model", folder, "--output", rows, *sizes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    memory = {row["peer"]: row["p50"] for row in found if row["metric"] == "K and V"}
    assert memory["handloom"] < 0.6 * memory["transformers"]
    assert {row["peer"] for row in found if row["metric"] == "time"} == {"handloom", "transformers"}
    (least,) = (row["p50"] for row in found if (row["peer"], row["metric"]) == ("limit", "least time"))
    assert 0 < least < min(row["p50"] for row in found if row["metric"] == "time")
