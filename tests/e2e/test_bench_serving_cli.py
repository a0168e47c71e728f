"""`handloom bench throughput` and `bench prefix`: every row is there, of the requests asked for, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from handloom.cli import app
from tiny_models import save, tiny_llama

RATES = ["output", "total", "requests"]
TIMES = ["ttft", "tpot", "itl"]
REST = ["pages, peak", "waiting, peak", "preemptions", "peak memory", "weights", "KV pool"]
MACHINE = ["read bandwidth", "matrix product"]
SIZES = ("-n", "6", "--prompt-tokens", "3-20", "--new-tokens", "2-9", "--threads", "1", "--quiet")


pytestmark = pytest.mark.usefixtures("round_limits", "threads_as_before")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("llama"))


def bench(*words: Any) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def rows(result: Result) -> dict[str, dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return {row["test"]: row for row in json.loads(result.stdout)["rows"]}


def test_throughput_has_rates_times_pages_and_memory(folder: Path) -> None:
    slo = ("--slo-ttft", "1e6", "--slo-tpot", "1e-6")
    result = bench("throughput", folder, *SIZES, *slo, "--kv-cache-tokens", 96, "--repeat", 2, "--format", "json")
    found = rows(result)
    goodput = "goodput, ttft ≤ 1e+06 ms, tpot ≤ 1e-06 ms"
    assert list(found) == [*RATES, goodput, *TIMES, *REST, *MACHINE]
    assert [found[name]["n"] for name in ("output", "ttft", "pages, peak")] == [2, 12, 2]
    for name in TIMES:
        assert 0 <= found[name]["p20"] <= found[name]["p50"] <= found[name]["p80"] <= found[name]["p99"]
    assert found[goodput]["mean"] == 0
    assert 0 < found["pages, peak"]["mean"] <= found["pages, peak"]["limit"] == 6
    kv_bytes = 96 * 3 * 2 * 2 * 14 * 4  # tokens, layers, K and V, heads, head_dim, float32
    assert found["KV pool"]["mean"] * 2**20 == kv_bytes
    assert found["peak memory"]["mean"] > found["weights"]["mean"] + found["KV pool"]["mean"]
    assert found["output"]["percent_of_limit"] == pytest.approx(
        100 * found["output"]["mean"] / found["output"]["limit"]
    )
    environment = json.loads(result.stdout)["environment"]
    assert environment["workload"] == "6 requests drawn with seed 0: 3-20 prompt tokens, 2-9 new ones"


def test_throughput_serves_a_file_at_a_rate(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    lines = [{"prompt_tokens": 5, "new_tokens": 4}, {"prompt": "hello there", "new_tokens": 2}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    result = bench("throughput", folder, "--file", file, "--rate", 50, "--threads", 1, "--format", "json", "-q")
    found = rows(result)
    assert (found["ttft"]["n"], found["tpot"]["n"], found["itl"]["n"]) == (2, 2, 3 + 1)
    assert json.loads(result.stdout)["environment"]["workload"] == (
        "2 requests from asked.jsonl, arriving at 50 per second"
    )


def test_throughput_beside_transformers_in_every_way_it_has(folder: Path) -> None:
    result = bench("throughput", folder, *SIZES, "--peers", "transformers", "--peer-batches", "2,4", "--format", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    theirs = [(row["peer"], row["test"]) for row in report["rows"] if row["peer"].startswith("transformers")]
    names = ["batches of 2", "batches of 4", "continuous"]
    assert theirs == [(f"transformers, {name}", test) for name in names for test in RATES]
    assert any("padded" in note for note in report["notes"])


def test_prefix_has_its_cost_and_what_it_brings(folder: Path) -> None:
    sizes = ("-n", 3, "--shared", 40, "--own", 8, "--new-tokens", 2, "--repeat", 2, "--threads", 1, "-q")
    found = rows(bench("prefix", folder, *sizes, "--format", "json"))
    assert [found[name]["n"] for name in found] == [2, 2, 1, 6, 4, 1]
    assert found["hit rate, nothing shared"]["mean"] == 0
    assert found["hit rate, shared"]["mean"] == pytest.approx(100 * 32 / 48)
    assert found["ttft, shared, cache on"]["limit"] < found["ttft, shared, cache off"]["limit"]
    assert found["ttft, shared, cache off"]["percent_of_limit"] < 100


def test_a_table_has_a_column_for_peers_and_tails_only_where_there_are_some(folder: Path) -> None:
    plain = bench("throughput", folder, *SIZES).stdout
    assert "| test | mean ± sd | p50 | p99 | unit | limit | % of limit |" in plain
    lines = [line for line in plain.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--prompt-tokens", "9-3"), "lengths from 9 to 3"),
        (("--new-tokens", "x"), "lengths 'x'"),
        (("--rate", "0"), "rate is 0.0"),
        (("--rate", "5", "--peers", "transformers"), "leave --rate out"),
        (("--slo-ttft", "-1"), "--slo-ttft -1.0"),
        (("--slo-tpot", "nan"), "--slo-tpot nan"),
        (("--peer-batches", "4,,8"), "--peer-batches"),
        (("--peer-batches", "0"), "--peer-batches"),
        (("--prompt-tokens", "250", "--new-tokens", "99"), "needs a context of 349"),
        (("--file", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_status_1(folder: Path, words: tuple[str, ...], why: str) -> None:
    result = bench("throughput", folder, *words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert why in result.stderr and "Traceback" not in result.stderr


def test_a_model_without_a_command_before_it_is_measured_as_by_speed(folder: Path) -> None:
    words = (folder, "--pp", 4, "--tg", 2, "--repeat", 1, "--quiet", "--format", "jsonl")
    tests = [[json.loads(line)["test"] for line in bench(*own, *words).stdout.splitlines()] for own in ((), ("speed",))]
    assert tests[0] == tests[1] != []
    assert "throughput" in bench("--help").stdout
