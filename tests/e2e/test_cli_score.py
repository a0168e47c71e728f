"""`handloom score`: a text's likelihood, and what quantisation costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from handloom.cli import app
from handloom.measure import perplexity as measure
from parity_checks import Pair, load_pair
from tiny_chat import save_chat

TEXT = "Water boils at 100 °C; ice melts at 0. " * 9


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(save_chat(tmp_path_factory.mktemp("chat"), context=256))


@pytest.fixture
def handloom(pair: Pair) -> Callable[..., Result]:
    def run(*arguments: Any, input: str | None = None) -> Result:
        return CliRunner().invoke(app, ["score", "--model", str(pair.folder), *map(str, arguments)], input=input)

    return run


def test_a_file_is_scored_as_one_sequence(pair: Pair, handloom: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:80], encoding="utf-8")
    result = handloom(file, "--json", "--quiet")
    expected = pair.lm().score(TEXT[:80])
    found = json.loads(result.stdout)
    assert found["log_likelihood"] == expected.total
    assert found["perplexity"] == expected.perplexity
    assert found["tokens"] == len(expected.token_ids)
    assert json.loads(handloom("-", "--json", "--quiet", input=TEXT[:80]).stdout)["perplexity"] == expected.perplexity


def test_perplexity_says_what_quantisation_costs(pair: Pair, handloom: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    result = handloom("--perplexity", file, "--quantize", "int8", "--against-floats", "--window", 64, "--json", "-q")
    found = json.loads(result.stdout)
    assert found["perplexity_in_float32"] == measure.perplexity(pair.lm(), TEXT, window=64).value
    assert found["cost"] == pytest.approx(found["perplexity"] / found["perplexity_in_float32"] - 1)
    assert 0 < abs(found["cost"]) < 0.05
    assert found["same_likeliest_token"] > 0.9
    assert "int8" in found["held"]


def test_perplexity_has_a_text_of_its_own(
    handloom: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(measure, "BUNDLED", short)
    result = handloom("--perplexity")
    assert result.exit_code == 0
    assert "bundled: A. N. Whitehead" in result.stdout
    assert "perplexity" in result.stdout


def test_what_makes_no_sense_is_a_usage_error(handloom: Callable[..., Result], tmp_path: Path) -> None:
    assert handloom().exit_code == 2
    assert handloom("-", "--against-floats", input="x").exit_code == 2
    missing = handloom(tmp_path / "none.txt")
    assert missing.exit_code == 1
    assert "none.txt" in missing.stderr
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt is not UTF-8" in handloom(tmp_path / "latin.txt").stderr
