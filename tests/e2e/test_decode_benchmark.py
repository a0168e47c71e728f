"""benchmarks/gpu_decode.py runs to its end on a CPU, and its peers compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *words: object) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_decode_benchmark_has_rows_of_everybody(tmp_path: Path) -> None:
    rows, image = tmp_path / "rows.jsonl", tmp_path / "mbu.svg"
    peers = ["--peers", "plain", "dynamic", "static"]
    sizes = ["--shapes", "tiny", "--batch", 1, 3, "--prompt", 8, "--new", 6, "--rounds", 2]
    table = run(
        "gpu_decode.py",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--backend",
        "reference",
        *sizes,
        *peers,
        "--output",
        rows,
    )
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    for case in ("batch 1", "batch 3"):
        own = {(row["peer"], row["metric"]): row for row in found if row["case"] == case}
        others = ["handloom, kernel by kernel", "plain torch, compiled"]
        theirs = {"transformers, dynamic cache", "transformers, static cache"}
        assert {peer for peer, metric in own if metric == "step"} == {"handloom", *others, *theirs}
        for peer in others:
            assert own[peer, "tokens as handloom's"]["p50"] == 100, "float32: the same tokens"
        step, rate = own["handloom", "step"], own["handloom", "decode"]
        assert rate["p50"] == pytest.approx(1e3 * int(case[-1]) / step["p50"], rel=0.5)
        assert own["handloom", "MBU, measured"]["p50"] == pytest.approx(
            100 * rate["p50"] / own["limit", "decode"]["p50"], rel=0.5
        )
        assert 0 < own["handloom", "host's share"]["p50"] <= 100 and "captured in" in {metric for _, metric in own}
        assert f"| {case} | plain torch, compiled |" in table
    assert run("report_decode.py", rows, "--picture", image) == table
    assert "tiny, handloom" in image.read_text()
