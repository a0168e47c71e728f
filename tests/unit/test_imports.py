"""What importing brings in: time before a first token that everybody waits for."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "jinja2", "gguf", "numba", "llvmlite")


@pytest.mark.parametrize(
    ("statement", "brings"),
    [
        ("import handloom", set()),
        ("import handloom.cli", set()),
        ("import handloom.lm, handloom.ops.cpu", {"torch", "numpy"}),
    ],
)
def test_no_package_is_imported_before_it_is_used(statement: str, brings: set[str]) -> None:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert set(HEAVY) & set(printed.split()) == brings
