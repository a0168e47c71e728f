"""`handloom bench cpu` from end to end on a tiny model: the table, the rows, and the report of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from handloom.cli import app
from handloom.cli.bench_cpu import _contenders
from tiny_models import save, tiny_llama

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "report.py"
SMALL = ("--batch", "2,1", "--pp", "8", "--tg", "4", "--repeat", "2", "--threads", "1")


pytestmark = pytest.mark.usefixtures("round_limits", "threads_as_before")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("llama"))


def bench(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["bench", "cpu", str(folder), *SMALL, *options])


def test_every_precision_and_batch_has_its_rows_and_a_report(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    options = ("--precisions", "fp32,int8", "--peers", "none", "--starts", "0", "--output", str(file))
    result = bench(folder, *options)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rates = {(row["dtype"], row["case"], row["peer"]): row for row in rows if row["unit"] == "tok/s"}
    names = ("pp8 b1", "tg4 b1", "pp8 b2", "tg4 b2")
    assert set(rates) == {(p, n, w) for p in ("fp32", "int8") for n in names for w in ("handloom", "limit")}
    assert all(row["n"] == (2 if row["peer"] == "handloom" else 1) and row["p50"] > 0 for row in rates.values())
    int8, fp32 = (rates[precision, "tg4 b1", "limit"]["p50"] for precision in ("int8", "fp32"))
    assert int8 > 2 * fp32  # its weights are held in a quarter, vectors and K and V are not
    assert {row["held"] for row in rows if row["peer"] == "handloom" and row["dtype"] == "fp32"} == {"float32"}
    assert {row["suite"] for row in rows} == {"cpu"}
    assert {(row["threads"], row["model"]) for row in rows} == {(1, folder.name)}
    for part in ("pp8 b1", "tg4 b2", "fp32", "int8", "limit"):
        assert part in result.stdout
    check_report(file, tmp_path / "picture.svg")


def check_report(file: Path, picture: Path) -> None:
    """The report of these rows alone: a table per precision and the picture."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(REPORT), str(file), "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| case | metric | handloom | limit | % of limit |") == 2
    assert "| tg4 b2 | decode, tok/s |" in done.stdout
    assert picture.read_text().count("int8: decode") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--precisions", "fp32,gguf"), "only of a quantised .gguf file"),
        (("--precisions", "int2"), "'int2'"),
        (("--batch", "1,0"), "'1,0'"),
        (("--peers", "vllm"), "'vllm'"),
        (("--peers", "none", "--peer-python", "llama.cpp=/bin/python"), "not one of --peers"),
        (("--pp", "250", "--tg", "0", "--peers", "none", "--pp", "256"), "257"),
        (("--pp", "0", "--tg", "0"), "nothing to measure"),
    ],
)
def test_wrong_options_are_errors_before_anything_runs(folder: Path, options: tuple[str, ...], named: str) -> None:
    result = bench(folder, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert named in result.stderr


def test_the_python_of_a_peer_is_a_path_of_any_name() -> None:
    contenders = _contenders("transformers,llama.cpp", ["llama.cpp=/opt/a=b/python", "/opt/python"])
    assert [one.python for one in contenders] == [sys.executable, "/opt/python", "/opt/a=b/python"]
