"""handloom_kernels is a library of its own: it can be loaded as a kernel of the Hub, and its parts are all listed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import handloom_kernels
from handloom_kernels import reference

PACKAGE = Path(handloom_kernels.__file__).parent
PROJECT = PACKAGE.parent.parent
SHARED = {
    "__init__",
    "attention_parts",
    "checks",
    "gumbel",
    "heads",
    "quantized_product",
    "threshold",
    "tiles",
    "tune",
    "weight_bits",
}


def test_every_kernel_is_listed_and_has_its_parts() -> None:
    """A kernel: its module, the reference beside it, tests, compile cases and benchmark cases."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - SHARED
    assert modules == set(handloom_kernels.KERNELS)
    tests = Path(__file__).resolve().parent.parent
    for folder in (tests / "compile_cases", tests.parent / "benchmarks" / "kernel_cases"):
        assert {path.stem for path in folder.glob("*.py")} == modules
    for name in modules:
        assert (getattr(handloom_kernels, name).__doc__ or "").count("\n") > 5, f"{name} explains itself"


def test_a_name_that_is_no_kernel_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = handloom_kernels.nothing
    assert "reference" in dir(handloom_kernels)
    assert all(hasattr(reference, name) for name in reference.__all__)


def test_the_reference_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import handloom_kernels; handloom_kernels.reference.normalize"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(PACKAGE.parent)})


def test_names_and_version_agree() -> None:
    metadata = json.loads((PACKAGE / "metadata.json").read_text())
    build = tomllib.loads((PROJECT / "build.toml").read_text())
    assert metadata["name"] == build["general"]["name"] == "handloom-kernels"
    assert metadata["version"] == build["general"]["version"]
    assert "torch-noarch" in build


def test_it_loads_as_a_kernel_of_the_hub() -> None:
    """Under a name of its own. Needs the package `kernels`, which the other tests do not."""
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("the package kernels is not installed (what was found is our own folder of that name)")
    module = kernels.get_local_kernel(PACKAGE)
    assert module is not handloom_kernels
    assert module.norm.normalize is not handloom_kernels.norm.normalize
    assert Path(module.__file__) == Path(handloom_kernels.__file__)
