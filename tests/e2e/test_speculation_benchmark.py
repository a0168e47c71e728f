"""benchmarks/speculation.py runs to its end and writes every row it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import save, tiny_llama

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "speculation.py"
ROWS_OF_32 = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "head_dim": 16,
}  # for int4


@pytest.mark.slow
def test_the_benchmark_of_speculation_has_every_way_on_both_texts(tmp_path: Path) -> None:
    folder = save(tiny_llama(max_position_embeddings=2048, **ROWS_OF_32), tmp_path / "tiny")
    rows = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        SCRIPT,
        "--model",
        folder,
        "--output",
        rows,
        "--new",
        "12",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    drafters = {"prompt lookup", "suffix", "draft model"}
    for case in ("text to copy", "nothing to copy"):
        own = [row for row in found if row["case"] == case]
        assert {row["peer"] for row in own if row["metric"] == "decode"} == {"without", *drafters}
        assert {row["peer"] for row in own if row["metric"] == "gain"} == drafters
        accepted = {row["peer"]: row["p50"] for row in own if row["metric"] == "accepted"}
        drafted = {row["peer"]: row["p50"] for row in own if row["metric"] == "drafted"}
        assert all(accepted[name] <= drafted[name] for name in drafters)
