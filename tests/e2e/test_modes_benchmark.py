"""benchmarks/modes.py runs to its end and writes every row it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import save, tiny_llama

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "modes.py"
MODES = {"greedy", "sampling", "4 samples", "4 beams", "4 sampled beams", "guidance", "prompt lookup"}


@pytest.mark.slow
def test_the_benchmark_of_modes_has_both_in_every_mode(tmp_path: Path) -> None:
    folder, rows = save(tiny_llama(max_position_embeddings=2048), tmp_path / "tiny"), tmp_path / "rows.jsonl"
    command = [sys.executable, SCRIPT, "--model", folder, "--output", rows, "--new", "4", "--rounds", "1"]
    done = subprocess.run([*map(str, command), "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {(row["peer"], row["case"].split(",")[0]) for row in found} == {
        (peer, mode) for peer in ("handloom", "transformers") for mode in MODES
    }
