"""Every block of Python in README.md and in docs/ runs, from top to bottom, and keeps what its assertions say."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import handloom as hl
from engines import lm_with
from handloom.cli import app
from tiny_models import save, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = ("README.md", "docs/structured.md", "docs/speculation.md", "docs/quantization.md", "docs/custom_decoder.md")


def blocks(page: str) -> list[str]:
    return [text for kind, text in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if kind == "python"]


def run(block: str, names: dict[str, Any], page: str) -> None:
    """Run it in this namespace; `async with` may stand outside of functions, as in a notebook."""
    result = eval(compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    if inspect.iscoroutine(result):
        asyncio.run(result)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages in docs/ say that there is: an `lm`, a smaller one, a text and a folder with a model."""
    monkeypatch.chdir(tmp_path)
    save(tiny_llama(), tmp_path / "model")
    text = "Once upon a time, once upon a time"
    return {"hl": hl, "lm": lm_with(400), "small": lm_with(400), "text": text}


def test_no_page_with_python_is_forgotten() -> None:
    assert {page for page in PAGES if blocks(page)} == set(PAGES)
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages if "```python" in page.read_text(encoding="utf-8")} == set(
        PAGES
    )


@pytest.mark.parametrize("page", PAGES[1:])
def test_the_examples_of_a_page_run(page: str, names: dict[str, Any]) -> None:
    for block in blocks(page):
        run(block, names, page)


def test_the_examples_of_the_readme_run_with_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HANDLOOM_MODEL", raising=False)
    names: dict[str, Any] = {}
    for block in blocks("README.md"):
        run(block, names, "README.md")
    assert len(capsys.readouterr().out) > 100


def test_the_commands_of_the_readme_run_with_the_shipped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANDLOOM_MODEL", raising=False)
    commands = re.findall(r'handloom (generate ".*)$', (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command, comments=True))
        assert result.exit_code == 0 and len(result.stdout) > 5, result.stderr
