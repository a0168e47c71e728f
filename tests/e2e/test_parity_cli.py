"""`handloom parity`: it passes what is right, fails what is wrong, and compares what it says it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gguf_files import export
from handloom.cli import app
from handloom.measure.peer import Transformers
from parity_checks import hf_generate
from tiny_models import TINY, save, tiny_llama, tiny_tokenizer

PROMPTS = "Once upon a time\n\nthe cat sat on the mat\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_bytes(PROMPTS.encode())
    return file


def parity(model: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["parity", str(model), "-n", "8", "--quiet", *options])


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_is_in_parity(family: str, tmp_path: Path, prompts: Path) -> None:
    result = parity(save(TINY[family](), tmp_path / "model"), "--prompts", str(prompts), "--no-speed", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["parity"] is True
    assert 0 < found["largest_logits_difference"] < 1e-4
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for text, one in zip(("Once upon a time", "the cat sat on the mat"), found["prompts"], strict=True):
        ids = tiny_tokenizer().encode(text)
        assert one["theirs"] == hf_generate(hf, ids, max_new_tokens=8, do_sample=False)
        assert one["ours"] == one["theirs"]
        assert one["positions"] == one["prompt_tokens"] + len(one["theirs"]) == len(ids) + len(one["theirs"])


def test_a_gguf_file_is_compared_with_transformers_own_reading_of_it(tmp_path: Path, prompts: Path) -> None:
    file = export(tiny_llama(), tmp_path / "tiny.gguf")
    result = parity(file, "--prompts", str(prompts), "--no-speed")
    assert result.exit_code == 0, result.output
    assert f"in parity: {file}" in result.stdout


def test_the_table_shows_prompts_and_the_speed_of_both(folder: Path) -> None:
    result = parity(folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("equal") == 6  # the built-in prompts
    speed = [line.split() for line in result.stdout.splitlines() if line.rstrip().endswith("×")]
    assert len(speed) == 2
    for line in speed:
        ours, theirs, ratio = (float(word.rstrip("×")) for word in line[-3:])
        assert ratio == pytest.approx(ours / theirs, abs=0.01)


def test_a_model_that_computes_something_else_is_not_in_parity(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Transformers.load

    def spoiled(*args: Any) -> Transformers:
        peer = load(*args)
        with torch.no_grad():
            peer.model.model.layers[1].self_attn.o_proj.weight *= 1.5
        return peer

    monkeypatch.setattr(Transformers, "load", spoiled)
    result = parity(folder, "--prompts", str(prompts), "--no-speed")
    assert result.exit_code == 1
    assert "NOT in parity" in result.stdout
    assert "DIFFERENT from" in result.stdout
    found = json.loads(parity(folder, "--prompts", str(prompts), "--no-speed", "--json").stdout)
    assert found["parity"] is False
    assert found["largest_logits_difference"] > 1e-3


def test_without_a_tokenizer_prompts_are_token_ids(tmp_path: Path) -> None:
    model = save(tiny_llama(), tmp_path / "model", tokenizer=False)
    assert parity(model, "--no-speed").exit_code == 0  # the built-in ones are random ids
    file = tmp_path / "ids.txt"
    file.write_text("5 6 7\n300\n")
    found = json.loads(parity(model, "--no-speed", "--json", "--prompts", str(file)).stdout)
    assert [one["prompt_tokens"] for one in found["prompts"]] == [3, 1]
    file.write_text("Once upon a time\n")
    result = parity(model, "--prompts", str(file))
    assert result.exit_code == 1
    assert "no tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "has 0 prompts"), (b"caf\xe9\n", "not UTF-8"), (b"x\n" * 1001, "1001"), (b" " * 2_000_000, "bytes")],
)
def test_a_bad_file_of_prompts_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    result = parity(tmp_path / "no-model", "--prompts", str(file))
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_missing_file_of_prompts_is_an_error(tmp_path: Path) -> None:
    result = parity(tmp_path / "no-model", "--prompts", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "there is no such file" in result.stderr
