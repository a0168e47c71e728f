"""Block sizes come from the device's table where an entry fits, else from the launcher; tuning writes such a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from handloom_kernels import KERNELS, norm, quantized_linear, reference, tune, tuning
from handloom_kernels.checks import KernelError
from handloom_kernels.quantized_product import quantized_blocks
from handloom_kernels.tuning import Problem, config
from kernel_testing import DEVICE, draw

DEFAULT = {"BLOCK": 64, "num_warps": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of tables, on a device that calls itself an H100."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    for module in (tuning, tune):
        monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA H100 PCIe")
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


def test_the_first_entry_that_fits_is_taken(folder: Path) -> None:
    entries = [
        {"when": {"width": 8, "dtype": "float16"}, "config": {"BLOCK": 8}},
        {"when": {"width": 8}, "config": {"BLOCK": 16, "num_warps": 1}},
    ]
    (folder / "h100.json").write_text(json.dumps({"norm": entries}))

    def chosen(kernel: str = "norm", **shape: int | str) -> dict[str, int]:
        return config(kernel, DEVICE, DEFAULT, **shape)

    assert chosen(width=8, dtype="float16") == {"BLOCK": 8, "num_warps": 4, "enable_fp_fusion": True}
    assert chosen(width=8, dtype="bfloat16") == {"BLOCK": 16, "num_warps": 1, "enable_fp_fusion": True}
    assert chosen(width=9) == chosen("rope", width=8) == {**DEFAULT, "enable_fp_fusion": True}
    assert config("norm", DEVICE, DEFAULT, {"BLOCK": 2}, width=8)["BLOCK"] == 2


def test_a_device_that_nobody_has_tuned_takes_the_defaults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "h100.json").write_text(json.dumps({"norm": [{"when": {}, "config": {"BLOCK": 1}}]}))
    monkeypatch.setattr(tuning, "device_name", lambda device: "Some Other Card")
    assert config("norm", DEVICE, DEFAULT)["BLOCK"] == 64


def test_shipped_tables_name_kernels_that_exist() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        assert path.stem in {*tuning.DEVICES.values(), "default"}
        for kernel, entries in json.loads(path.read_text()).items():
            assert kernel in KERNELS
            assert all(set(entry) == {"when", "config"} for entry in entries)


def test_tuning_writes_the_fastest_that_agrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(3, 8)

    def run(blocks: Mapping[str, int] | None = None) -> torch.Tensor:
        return x + 1 if blocks == {"BLOCK": 1} else x

    times = {1: 0.001, 2: 0.5, 4: 0.2, 8: 0.9}
    monkeypatch.setattr(tune, "timer", lambda device: lambda run: times[run.keywords["blocks"]["BLOCK"]])
    problem = Problem({"width": 8}, [{"BLOCK": block} for block in times], run)
    monkeypatch.setattr(norm, "tuning_problems", lambda device: [problem])
    (folder / "h100.json").write_text(json.dumps({"rope": []}))
    written = tune.tune(["norm"], DEVICE, folder)
    assert json.loads(written.read_text()) == {"rope": [], "norm": [{"when": {"width": 8}, "config": {"BLOCK": 4}}]}
    assert config("norm", DEVICE, DEFAULT, width=8)["BLOCK"] == 4


def test_blocks_for_a_plain_product_are_not_taken_for_a_gated_one(folder: Path) -> None:
    """A gated program needs two tiles of the quantised weight: blocks tuned for one of the same shape may have one."""
    q = reference.quantize_weight(draw(64, 64), "int8")
    x, norm = draw(2, 64), reference.Norm("rms", draw(64), None, 1e-5)
    when = {"width": 64, "depth": 64, "kind": "int8", "group": 0, "dtype": "float32", "paired": False}
    entry = {"when": when, "config": {"BLOCK_N": 16, "SLICES": 2, "num_warps": 2, "num_stages": 2}}
    (folder / "h100.json").write_text(json.dumps({"quantized_linear": [entry]}))
    chosen = quantized_blocks("quantized_linear", x, q, None, normed=False, paired=False)
    assert (chosen["BLOCK_N"], chosen["num_stages"]) == (16, 2)
    assert quantized_linear.quantized_norm_mlp(x, norm, q, None, "silu", True).shape == (2, 32)


def test_a_problem_without_a_candidate_that_works_says_so() -> None:
    problem = Problem({"width": 8}, [], lambda blocks=None: draw(1))
    with pytest.raises(KernelError, match=r"none of the candidates for .* works here"):
        tune.best(problem, lambda run: 0.0)
