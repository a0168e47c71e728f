"""The bar of `generate`: on a terminal, for lists; elsewhere only where it is asked for; never on standard output."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from contextlib import redirect_stderr
from typing import Any

import pytest

from engines import lm_with
from handloom.errors import InvalidParam
from handloom.lm import LM
from tiny_models import random_ids

PROMPTS = [random_ids(i, 5) for i in range(3)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": []}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Given to the `generate` of this file as standard error."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def generate(terminal: Terminal, prompts: Any, lm: LM | None = None, **options: Any) -> Any:
    with redirect_stderr(terminal):
        return (lm or lm_with()).generate(prompts, **OPTIONS, **options)


def test_a_list_on_a_terminal_shows_how_many_are_done_and_how_fast_and_clears_it(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = generate(terminal, PROMPTS)
    shown = terminal.getvalue()
    assert "0/3" in shown and "3/3" in shown and "tok/s" in shown
    assert shown.rstrip().endswith("\x1b[2K"), "the line is erased"
    assert capsys.readouterr().out == ""
    assert [output.token_ids for output in outputs] == [
        output.token_ids for output in lm_with().generate(PROMPTS, progress=False, **OPTIONS)
    ]


@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS[:1], []], ids=["single", "list of one", "none"])
def test_what_is_no_list_of_several_shows_nothing(terminal: Terminal, prompts: Any) -> None:
    generate(terminal, prompts)
    assert terminal.getvalue() == ""


def test_nothing_is_shown_where_it_is_not_wanted(terminal: Terminal) -> None:
    generate(terminal, PROMPTS, progress=False)
    assert terminal.getvalue() == ""


def test_away_from_a_terminal_there_is_nothing_unless_asked_for_and_then_one_plain_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lm_with().generate(PROMPTS, **OPTIONS)
    assert capsys.readouterr() == ("", "")
    lm_with().generate(PROMPTS, progress=True, **OPTIONS)
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err and "tok/s" in err
    assert err.count("\n") == 1 and "\x1b" not in err


def test_a_call_that_raises_leaves_no_bar_behind(terminal: Terminal) -> None:
    lm = lm_with()
    threads = set(threading.enumerate())
    lm.transformer.forward = lambda *_: 1 // 0  # type: ignore[method-assign]
    try:
        with pytest.raises(ZeroDivisionError):
            generate(terminal, PROMPTS, lm)
    finally:
        del lm.transformer.forward
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive()
    assert terminal.getvalue().rstrip().endswith("\x1b[2K")


@pytest.mark.parametrize("progress", ["yes", 1])
def test_a_choice_that_is_none_is_refused(progress: Any) -> None:
    with pytest.raises(InvalidParam, match="progress is"):
        lm_with().generate(PROMPTS, progress=progress, **OPTIONS)


def test_the_library_is_imported_without_what_draws_bars() -> None:
    code = "import sys; sys.modules['rich'] = None; import handloom.lm"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
