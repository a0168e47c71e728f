"""`handloom chat`, on a pipe and on a real terminal."""

from __future__ import annotations

import codecs
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from handloom.cli import app
from parity_checks import Pair, load_pair
from tiny_chat import save_chat
from tiny_models import save, tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(save_chat(tmp_path_factory.mktemp("chat"), context=8192))


@pytest.fixture(scope="module")
def chat(pair: Pair) -> Callable[..., Result]:
    """Run the command in this process with these lines on standard input."""

    def run(*lines: str | bytes, arguments: tuple[str, ...] = ("-n", "12")) -> Result:
        data = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        return CliRunner().invoke(app, ["chat", "--model", str(pair.folder), "-q", *arguments], input=data)

    return run


def answers(pair: Pair, *messages: str, system: str | None = None, **options: Any) -> str:
    """What the model says to these messages, one after the other, each from a fresh start."""
    history = [] if system is None else [{"role": "system", "content": system}]
    out = ""
    for message in messages:
        history.append({"role": "user", "content": message})
        text = pair.lm().chat(history, **({"max_new_tokens": 12} | options)).text
        history.append({"role": "assistant", "content": text})
        out += text if text.endswith("\n") else text + "\n"
    return out


def test_every_line_of_a_pipe_is_a_message_and_only_answers_come_out(pair: Pair, chat: Callable[..., Result]) -> None:
    result = chat("Hello?", "", "Größe 日本", "on \\", "two lines")
    assert (result.exit_code, result.stdout) == (0, answers(pair, "Hello?", "Größe 日本", "on \ntwo lines"))


def test_options_and_the_system_message_count(pair: Pair, chat: Callable[..., Result]) -> None:
    options = {"temperature": 1.3, "top_k": 30, "seed": 5}
    arguments = tuple(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value)))
    result = chat("Hi", "Ho", arguments=("-n", "9", "--system", "Be brief.", *arguments))
    assert result.stdout == answers(pair, "Hi", "Ho", system="Be brief.", max_new_tokens=9, **options)


def test_commands(pair: Pair, chat: Callable[..., Result]) -> None:
    result = chat("/help", "Hi", "/reset", "/system Be brief.", "/system", "/frobnicate", "Ho", "/exit", "never said")
    assert (result.exit_code, result.stdout) == (0, answers(pair, "Hi") + answers(pair, "Ho", system="Be brief."))
    for note in ("/reset ", "forgotten", "system message: Be brief.", "there is no /frobnicate", "cut after 12 tokens"):
        assert note in result.stderr


def test_a_full_context_is_said_and_a_reset_helps(pair: Pair, chat: Callable[..., Result]) -> None:
    arguments = ("--max-context", "64", "-n", "1000")
    alone = chat("Hello?", arguments=arguments)
    result = chat("Hello?", "Hm?", "/reset", "Hello?", arguments=arguments)
    assert (result.exit_code, result.stdout) == (1, 2 * alone.stdout)
    assert result.stderr.count("the context of 64 is full; /reset starts anew") == 2
    assert result.stderr.count("error: the conversation has") == 1


def test_a_model_that_cannot_chat_says_so_at_once(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "-q", "--model", str(save(tiny_llama(), tmp_path))], input="never read")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this model has no chat template")


def test_a_pipe_that_is_no_text_is_an_error(chat: Callable[..., Result]) -> None:
    result = chat("Hi", b"a\xffb\n")
    assert result.exit_code == 1
    assert "error: standard input is not UTF-8 text: byte 0xff at offset 1" in result.stderr


class TerminalSession:
    """The command line on a pseudo-terminal of its own, as a person has it."""

    PROGRAM = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # Ctrl-C there is a signal here
        "from handloom.cli import main; main()"
    )

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.shown = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.terminal, own = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, *arguments],
            stdin=own,
            stdout=own,
            stderr=own,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        os.close(own)

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def read(self, seconds: float, pressing: str = "") -> bool:
        """Read what is there, waiting for something to come (if in vain, press keys); False at the end."""
        if not select.select([self.terminal], [], [], seconds)[0]:
            self.type(pressing)
            return True
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.shown += self.decoder.decode(data)
        return bool(data)

    def until(self, text: str, after: int = 0, pressing: str = "") -> int:
        """Wait for a text, pressing keys every second; returns where it ends in all that was shown."""
        deadline = time.monotonic() + 60
        while (at := self.shown.find(text, after)) < 0:
            assert time.monotonic() < deadline and self.read(1, pressing), f"no {text!r} in {self.shown[after:]!r}"
        return at + len(text)

    def wait(self) -> int:
        while self.read(1):
            pass
        os.close(self.terminal)
        return self.process.wait(60)


def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_program(pair: Pair) -> None:
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT / 'kernels' / 'torch-ext'}"
    command = ("chat", "--model", str(pair.folder), "-n", "8000")
    session = TerminalSession(*command, PYTHONPATH=path, HF_HUB_OFFLINE="1", TERM="xterm", COLUMNS="200")
    at = session.until("> ")
    session.type("Go on for ever\n")
    at = session.until("Go on for ever\r\n", at)
    while len(session.shown) < at + 20:
        assert session.read(60)
    session.type("\x03")
    at = session.until("> ", session.until("stopped", at))
    # CPython's readline does not notice a signal between showing the prompt and waiting for keys, hence the pressing.
    at = session.until("> ", session.until("Ctrl-D or /exit leaves", at, pressing="\x03"))
    session.type("/system\n")
    at = session.until("> ", session.until("system message: the chat template's own", at))
    session.type("\x04")
    assert session.wait() == 0
    assert "Traceback" not in session.shown
