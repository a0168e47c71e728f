"""benchmarks/gpu.py runs to its end on a CPU, its peers compute the same, and its report is drawn from its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PEERS = ["plain", "dynamic", "static", "torch", "continuous"]


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def suites(rows: Path, *words: object) -> str:
    common = ["--device", "cpu", "--dtype", "float32", "--backend", "reference", "--shapes", "tiny", "--small"]
    return run(BENCHMARKS / "gpu.py", *words, *common, "--rounds", 2, "--output", rows)


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.slow
def test_the_generating_suites_have_rows_of_everybody(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    table = suites(rows, "latency", "batch", "prefill", "--batch", 1, 3, "--peers", *PEERS)
    found = read(rows)
    for suite, case in (("latency", "1 x pp8 + tg6"), ("batch", "3 x pp8 + tg6")):
        own = {(r["peer"], r["metric"]): r for r in found if (r["suite"], r["case"]) == (f"gpu {suite}", case)}
        others = {"handloom, kernel by kernel", "handloom, backend torch", "transformers, dynamic cache"}
        if suite == "latency":
            others |= {"plain torch, compiled", "transformers, static cache"}
        assert {peer for peer, metric in own if metric == "TPOT"} == {"handloom", *others}
        for peer in others:
            assert own[peer, "tokens as handloom's"]["p50"] == 100, "float32: the same tokens"
        step, rate = own["handloom", "TPOT"], own["handloom", "decode"]
        assert rate["p50"] == pytest.approx(1e3 * int(case[0]) / step["p50"], rel=0.5)
        assert own["handloom", "MBU, measured"]["p50"] == pytest.approx(
            100 * rate["p50"] / own["limit", "decode"]["p50"], rel=0.5
        )
        assert 0 < own["handloom", "host's share"]["p50"] <= 100
        metrics = {metric for _, metric in own}
        assert {"captured in", "TTFT", "MFU, measured", "part: paged_attention", "part: draw"} <= metrics
        assert f"| {case} | handloom, kernel by kernel |" in table
    assert {row["case"] for row in found if row["metric"] == "prefill"} == {"1 x pp16", "4 x pp8"}
    assert all(row["p50"] < 1e-2 for row in found if row["metric"] == "difference of logits")
    before = rows.read_text()
    suites(rows, "latency", "prefill", "--resume")
    assert rows.read_text() == before, "what the table has is not measured again"
    pictures = tmp_path / "pictures"
    assert run("-m", "benchmarks.report", rows, "--pictures", pictures) == table.partition("\nIn short")[0]
    assert {path.stem for path in pictures.iterdir()} == {"roofline", "mbu_by_batch", "step_by_part"}
    assert "tiny, handloom" in (pictures / "mbu_by_batch.svg").read_text()


@pytest.mark.slow
def test_the_serving_sampling_and_loading_suites_have_theirs(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    table = suites(rows, "throughput", "sampling", "load", "--batches", 2)
    found = read(rows)
    metrics = {
        suite: {row["metric"] for row in found if row["suite"] == f"gpu {suite}" and row["peer"] == peer}
        for suite, peer in (("throughput", "handloom"), ("sampling", "torch"), ("load", "transformers"))
    }
    assert {"new tokens", "ttft", "tpot p99", "MBU, measured", "MFU, measured", "peak memory"} <= metrics["throughput"]
    assert {"choice", "chosen", "MBU, measured"} <= metrics["sampling"]
    assert {"load to first token", "peak memory to first token"} <= metrics["load"]
    rates = {row["peer"] for row in found if row["metric"] == "new tokens"}
    assert {"handloom", "transformers, batches of 2", "transformers, continuous", "limit"} <= rates
    assert "throughput: llama tiny: 5 requests, 22 new tokens: new tokens" in table.partition("In short")[2]


def test_the_requests_are_nano_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_serving

    requests = gpu_serving.draw(256, 1024)
    assert sum(request.new_tokens for request in requests) == 133_966, "as its README says"
    assert {len(request.prompt) >= 100 for request in requests} == {True}
