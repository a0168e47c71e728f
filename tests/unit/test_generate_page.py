"""docs/generate.md says what the code does: made from it, complete, and with a test behind every row."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from handloom.errors import UnsupportedOption
from handloom.sampling.surface import NO_EFFECT, NOTES, WHY_NOT
from option_checks import resolve

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> Any:
    return load(ROOT / "docs" / "make_generate.py")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """Option -> (status, note, proof), as the page has them."""
    text = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(found) == len({name for name, *_ in found})
    return {name: cells for name, *cells in found}


def test_the_page_is_the_one_the_code_makes(maker: Any) -> None:
    made = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    assert made == maker.page(), "run: python docs/make_generate.py"


def test_every_field_and_argument_of_the_installed_transformers_has_a_row(rows: dict[str, list[str]]) -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert fields | arguments <= rows.keys()


def test_every_row_tells_the_truth(rows: dict[str, list[str]]) -> None:
    for name, (status, note, _) in rows.items():
        if status == "not supported":
            with pytest.raises(UnsupportedOption, match=re.escape(WHY_NOT[name])):
                resolve({name: object()})
            assert note.startswith(WHY_NOT[name])
        elif status == "no effect here":
            assert resolve({name: object(), "seed": 1}) == resolve({"seed": 1})
        else:
            assert status == "works"
            resolve({name: None, "seed": 1})
    assert WHY_NOT.keys() | NO_EFFECT.keys() | NOTES.keys() <= rows.keys()
    assert not WHY_NOT.keys() & NO_EFFECT.keys()


def test_every_row_has_a_test(rows: dict[str, list[str]]) -> None:
    """Those of test_options.py are in its tables; every other file that is named names the option."""
    options = load(ROOT / "tests" / "parity" / "test_options.py")
    tables = {"works": options.WORKS, "no effect here": options.CHANGE_NO_TOKEN, "not supported": options.REFUSED}
    arguments = inspect.signature(GenerationMixin.generate).parameters
    for name, (status, _, proof) in rows.items():
        (file,) = (ROOT / "tests").rglob(proof)
        text = file.read_text(encoding="utf-8")
        if file.name == Path(__file__).name:
            assert status == "not supported"  # every such row is resolved above
        elif proof != "test_options.py":
            assert name in text
        elif name not in arguments and hasattr(GenerationConfig(), name):
            assert name in tables[status], name
