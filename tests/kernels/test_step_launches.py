"""A captured decode step could run on a GPU: nothing in it touches host memory, a later step launches the very same,
and each layer of a step of few rows is five kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"1b": 16, "0.6b": 28}
FUSED = ("norm_qkv", "decode", "linear", "norm_mlp")


def reports(*steps: str) -> list[dict[str, Any]]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "benchmarks", "src", "kernels/torch-ext"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "step_launches.py"), *steps]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake tensors on a GPU need a torch that was built with CUDA"
)


def test_a_step_launches_what_was_meant() -> None:
    found = reports("1b,1,64", "1b,16,64", "0.6b,256,256")
    assert len(found) == 9
    for step in found:
        shape, rows = step["step"].split(", ")[0], int(step["step"].split(", ")[1].split()[0])
        counts: dict[str, int] = {}
        for launch, times in step["launches"].items():
            name = launch.partition("_kernel")[0]
            counts[name] = counts.get(name, 0) + times
        layers = LAYERS[shape]
        if rows <= 16:
            assert [counts[name] for name in FUSED] == [layers, layers, 2 * layers, layers]
            assert "mm" not in step["torch"]
        else:
            assert counts["decode"] == layers and step["torch"]["mm"] == 4 * layers + 1
        assert ("range" in counts) == ("'cut': True" in step["step"])
        assert sum(step["torch"].get(name, 0) for name in ("_local_scalar_dense", "nonzero", "lift_fresh")) == 0


@pytest.mark.slow
def test_its_kernels_compile_for_an_h100() -> None:
    for step in reports("1b,1,64,compile", "0.6b,256,256,compile"):
        assert len(step["compiled"]) == step["different"] > 5
        for kernel in step["compiled"]:
            assert kernel["spills"] == 0 and kernel["shared"] <= step["shared_limit"], kernel
