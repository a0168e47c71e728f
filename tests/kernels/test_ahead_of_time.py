"""Every kernel compiles for NVIDIA's and AMD's GPUs, without spilling, within their shared memory, as it was meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.stem for path in (TESTS / "compile_cases").glob("*.py"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_a_gpu(kernel: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, TESTS / "ahead_of_time.py", kernel], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["target"] for report in reports} >= {"sm_80", "sm_90", "sm_100", "gfx942"}
    for report in reports:
        where = f"{report['case']} on {report['target']}"
        assert report["kernels"], f"{where}: nothing was launched"
        assert not report["missing"], f"{where}: the assembly lacks {report['missing']}"
        for each in report["kernels"]:
            assert each["spills"] == 0, f"{where}: {each}"
            assert each["shared"] <= report["shared_limit"], f"{where}: {each}, limit {report['shared_limit']}"
