"""`handloom bench`: every format says the same, percentages are of the measured limits, wrong sizes are errors."""

from __future__ import annotations

import csv
import io
import json
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from handloom.cli import app
from tiny_models import save, tiny_llama

TORCH = metadata.version("torch")
TESTS = ["load", "pp16", "tg4", "tg4 @ d16", "ttft @ 16", "peak memory, loading", "peak memory"]
TESTS += ["read bandwidth", "matrix product"]


pytestmark = pytest.mark.usefixtures("round_limits", "threads_as_before")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("llama"))


def bench(folder: Path, *options: str) -> Result:
    sizes = ("--pp", "16", "--tg", "4", "--repeat", "3", "--quiet")
    return CliRunner().invoke(app, ["bench", str(folder), *sizes, *options])


def test_json_has_every_test_with_its_share_of_the_limit(folder: Path) -> None:
    result = bench(folder, "--format", "json", "--threads", "1")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["test"] for row in found["rows"]] == TESTS
    rows = {row["test"]: row for row in found["rows"]}
    assert [rows[test]["n"] for test in TESTS[:5]] == [1, 3, 3, 3, 3]
    for test in ("pp16", "tg4", "tg4 @ d16"):
        row = rows[test]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["percent_of_limit"] == pytest.approx(100 * row["mean"] / row["limit"])
    parameters = sum(weight.numel() for weight in tiny_llama().parameters())
    looked_up, head_dim, kv = tiny_llama().model.embed_tokens.weight, 14, 3 * 2 * 2 * 14
    assert head_dim * 12 == kv  # three layers of K and V for two heads
    values = parameters - looked_up.numel() + looked_up.shape[1]
    for test, context in (("tg4", 1 + 2), ("tg4 @ d16", 16 + 2)):
        assert rows[test]["limit"] == pytest.approx(10e9 / (4 * (values + kv * context)))
    assert rows["peak memory"]["mean"] >= rows["peak memory, loading"]["mean"] > 0
    environment = found["environment"]
    assert (environment["threads"], environment["dtype"]) == (1, "float32")
    assert environment["versions"]["torch"] == TORCH
    assert "tokenising is not" in found["notes"][0]


def test_the_other_formats_say_the_same(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in bench(folder, "--format", "jsonl").stdout.splitlines()]
    table = list(csv.DictReader(io.StringIO(bench(folder, "--format", "csv").stdout)))
    for rows in (lines, table):
        assert [row["test"] for row in rows] == TESTS
        assert {row["torch_version"] for row in rows} == {TORCH}
        assert all(float(row["mean"]) > 0 for row in rows)
    file = tmp_path / "bench.md"
    assert bench(folder, "--output", str(file)).stdout == ""
    markdown = file.read_text()
    assert [line.split("|")[1].strip() for line in markdown.splitlines() if line.startswith("| ")][1:] == TESTS
    assert f"torch {TORCH}" in markdown
    assert "tokenising is not" in markdown


def test_a_prompt_of_one_token_has_one_decode_row(folder: Path) -> None:
    lines = bench(folder, "--pp", "1", "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["test"] for line in lines][:4] == ["load", "pp1", "tg4", "ttft @ 1"]


def test_what_does_not_fit_the_context_is_an_error_before_anything_runs(folder: Path) -> None:
    result = bench(folder, "--pp", "250", "--tg", "16")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "250 prompt tokens" in result.stderr
    assert "256" in result.stderr


def test_a_folder_that_is_not_there_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    result = bench(tmp_path / "no-model", "--output", str(tmp_path / "none" / "bench.md"))
    assert result.exit_code == 1
    assert "there is no folder" in result.stderr
