"""benchmarks/throughput.py runs to its end and writes every row it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import save, tiny_llama

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "throughput.py"


@pytest.mark.slow
def test_the_throughput_benchmark_has_rows_of_everybody_and_of_the_prefix_cache(tmp_path: Path) -> None:
    folder, rows = save(tiny_llama(), tmp_path / "tiny"), tmp_path / "rows.jsonl"
    command = [sys.executable, SCRIPT, "--small", "--threads", "1", "--model", folder, "--output", rows]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    rates = {row["peer"]: row["p50"] for row in found if row["metric"] == "new tokens"}
    peers = ["transformers, batches of 2", "transformers, continuous"]
    assert list(rates) == ["handloom", "transformers", *peers, "limit"]
    assert rates["transformers"] == max(rates[peer] for peer in peers)
    metrics = {row["metric"] for row in found}
    assert {"ttft p99", "tpot", "itl", "pages, peak", "peak memory", "hit rate"} <= metrics
    assert {row["suite"] for row in found} == {"throughput"}
    assert "| ratio |" in done.stdout
