"""benchmarks/gpu.py runs to its end on a CPU, its peers compute the same, and its report is drawn from its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.slow
def test_the_memory_suite_says_who_holds_it(tmp_path: Path) -> None:
    rows, pictures = tmp_path / "rows.jsonl", tmp_path / "pictures"
    table = suites(rows, "memory")
    held = {(row["peer"], row["metric"]): row["p50"] for row in read(rows)}
    owners = ("libraries", "weights", "KV pool", "workspace", "other")
    assert {metric for _, metric in held} == {f"host: {owner}" for owner in (*owners, "in all")}
    assert held["handloom", "host: in all"] == pytest.approx(sum(held["handloom", f"host: {each}"] for each in owners))
    assert held["limit", "host: weights"] == pytest.approx(4 * 125_248 / 2**20), "a llama of that shape in float32"
    assert held["limit", "host: weights"] < held["handloom", "host: weights"] < held["handloom", "host: in all"]
    assert 0 < held["limit", "host: KV pool"] <= held["handloom", "host: KV pool"]
    assert "memory: llama tiny: 2 x pp32 + tg3: host: in all" in table.partition("In short")[2]
    run("-m", "benchmarks.report", rows, "--pictures", pictures)
    assert {path.name for path in pictures.iterdir()} == {"memory_by_owner.svg"}


def test_a_gpu_s_memory_is_shared_out_by_torch_s_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 1000 bytes that numbers play: another process holds 100 of them, libraries take 30."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_memory

    now = {"allocated": 0, "reserved": 0, "most": 0, "past torch": 100}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: now["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: now["reserved"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: now["most"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000 - now["past torch"] - now["reserved"], 1000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: now.update(reserved=now["kept"]))
    now.update(allocated=2, reserved=8)
    counters = gpu_memory.Counters(torch.device("cuda"))
    now.update(allocated=302, reserved=320, kept=304)
    assert counters.allocated() == 300, "weights"
    now.update(allocated=502, reserved=520, kept=504)
    assert counters.allocated() == 200, "KV pool"
    before = counters.reserved()
    assert before == 504
    now.update(reserved=560, kept=544)
    graphs = counters.reserved() - before
    assert graphs == 40
    now.update(most=644, reserved=600, **{"past torch": 130})
    assert counters.after(before + graphs) == (100, 30), "workspace, other"


def test_the_requests_are_nano_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_serving

    requests = gpu_serving.draw(256, 1024)
    assert sum(request.new_tokens for request in requests) == 133_966, "as its README says"
    assert {len(request.prompt) >= 100 for request in requests} == {True}
