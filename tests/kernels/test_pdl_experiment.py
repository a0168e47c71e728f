"""benchmarks/pdl.py measures what it says: its forms hold the instructions, or none, and compute the product."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_testing import DEVICE

ROOT = Path(__file__).resolve().parents[2]
COMPILE = """
import json, sys, torch
import ahead_of_time, pdl

def call(form):
    x, weight = torch.empty(16, 2048, dtype=torch.bfloat16), torch.empty(2048, 2048, dtype=torch.bfloat16)
    pdl.chain(x, [weight], [torch.empty_like(x)] * 2, form)

target = ahead_of_time.TARGETS["sm_90"]
for form in pdl.FORMS:
    launch, = ahead_of_time.launches_of(ahead_of_time.Case(form, lambda: call(form)), target)
    print(json.dumps([form, launch.options.get("launch_pdl", False), ahead_of_time.compiled(launch, target)]))
"""


def test_the_forms_hold_the_instructions_that_they_are_named_for() -> None:
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "benchmarks", "src", "kernels/torch-ext"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {form: (pdl, report) for form, pdl, report in map(json.loads, done.stdout.splitlines())}
    assert {form: pdl for form, (pdl, _) in found.items()} == {"off": False, "launch": True, "prefetch": True}
    for form, (pdl, report) in found.items():
        code = report["assembly"]
        assert report["spills"] == 0
        assert (code.count("griddepcontrol.launch_dependents"), code.count("griddepcontrol.wait")) == (pdl, pdl)
        assert ("prefetch.global.L2" in code) == (form == "prefetch")
        before, _, after = code.partition("griddepcontrol.wait")
        assert not pdl or ("cp.async" not in before and "ld.global" not in before and "mma" in after)
        assert form != "prefetch" or "prefetch" in before


@pytest.mark.parametrize("rows", [1, 16])
def test_the_chain_is_the_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pdl

    x, weights = torch.randn(rows, 64, device=DEVICE), [torch.randn(64, 64, device=DEVICE) / 8 for _ in range(3)]
    out = pdl.chain(x, weights, [torch.empty_like(x) for _ in range(2)], "off")
    expected = x.double()
    for weight in weights:
        expected = expected @ weight.double().T
    assert (out - expected).abs().max() < 1e-5
