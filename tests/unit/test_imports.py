"""What importing brings in: time before a first token that everybody waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from handloom.ops.cpu.compiled import compiled_step, kept_in
from tiny_models import save, tiny_llama

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


GENERATE = """
import sys
import handloom as hl
lm = hl.LM.from_pretrained(sys.argv[1], quantize="int8")
lm.generate("one two", max_new_tokens=2)
print(*sys.modules)
"""


def test_a_second_process_generates_text_with_torch_and_tokenizers_alone(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "model")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(kept_in().parent)}
    compiled_step()
    command, imported = [sys.executable, "-c", GENERATE, str(folder)], []
    for _ in range(2):
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
        imported.append(set(HEAVY) & set(printed.split()) - {"llvmlite"})  # which links the step where we do not
    assert "transformers" in imported[0]
    assert imported[1] == {"torch", "numpy", "tokenizers"}
