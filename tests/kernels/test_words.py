"""Rows as words of 16 bits (VNNI), where there are no matrix units; products of them: `test_cpu_quantized`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from handloom.ops import choose_backend
from handloom.ops.cpu import blocks, compiled, matrix_units

ROOT = Path(__file__).resolve().parents[2]
TESTS = "whole_numbers or row_alone or not_finite or no_sum or stacked or quantised_checkpoint"


def test_the_backend_says_whether_codes_are_multiplied_as_whole_numbers() -> None:
    said = str(choose_backend(torch.device("cpu")))
    assert ("in fewer bits" in said) == blocks.has_whole_numbers()
    assert ("VNNI" in said) == compiled.has_words()
    assert not (compiled.has_words() and matrix_units.usable())


@pytest.mark.skipif(not matrix_units.usable(), reason="no AMX: either all tests run words here, or there is no VNNI")
def test_the_tests_of_whole_numbers_pass_for_words_too(tmp_path: Path) -> None:
    """In a process that compiles for an older processor than this one."""
    tests = ["-p", "no:cacheprovider", "tests/unit/test_cpu_quantized.py", "-k", TESTS]
    processor = {"NUMBA_CPU_NAME": "icelake-server", "NUMBA_CPU_FEATURES": "+avx512vnni,+avx512vbmi"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        env={**os.environ, **processor, "HANDLOOM_CACHE": str(tmp_path)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "no AMX" not in ran.stdout and "neither AMX nor VNNI" not in ran.stdout
