"""The house rules that a program can check: who may import whom, what is never called, what is shipped."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import handloom

ROOT = Path(__file__).parents[2]
HANDLOOM, KERNELS = ROOT / "src" / "handloom", ROOT / "kernels" / "torch-ext" / "handloom_kernels"
MAX_LINES = 400

# From the top of the house to the bottom: a module imports its own floor and the floors below.
FLOORS = [
    "cli serve integrations __main__",
    "__init__ lm live collect conversation loading machine measure output progress prompts",
    "engine",
    "decoding",
    "sampling",
    "cache",
    "model",
    "ops",
    "checkpoint",
    "text",
    "errors kept one_process",
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}

CODE_IN_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
LOADERS = {"torch.load", "torch.hub.load", "numpy.load", "np.load", "torch.jit.load"}
FACTORIES = {
    f"torch.{name}"
    for name in "arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn "
    "randperm scalar_tensor tensor tril_indices triu_indices zeros".split()
}


def files(*roots: Path) -> list[Path]:
    return sorted(path for root in roots for path in root.rglob("*.py"))


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


OURS, KERNEL_FILES = files(HANDLOOM), files(KERNELS)
every_file = pytest.mark.parametrize("path", OURS + KERNEL_FILES, ids=where)


def imports(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in a module of `package`, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def room(dotted: str) -> str:
    """The subpackage or top-level module that handloom.a.b belongs to."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else "__init__"


def imports_of(path: Path, root: Path) -> list[str]:
    return sorted(set(imports(ast.parse(path.read_text()), [root.name, *path.relative_to(root).parts[:-1]])))


@pytest.mark.parametrize("path", OURS, ids=where)
def test_imports_go_downward_only(path: Path) -> None:
    own = path.relative_to(HANDLOOM).parts[0].removesuffix(".py")
    assert own in FLOOR_OF, f"{own} is on no floor: add it to FLOORS"
    for name in imports_of(path, HANDLOOM):
        if name.split(".")[0] == "handloom":
            assert FLOOR_OF[room(name)] >= FLOOR_OF[own], f"{own} must not import {name}, which lies above it"


def test_an_upward_import_would_be_seen() -> None:
    tree = ast.parse("def f():\n    from ..engine import x\n    from handloom import LM\n    import handloom.lm.a")
    names = sorted(imports(tree, ["handloom", "model"]))
    assert names == ["handloom.LM", "handloom.engine.x", "handloom.lm.a"]
    assert [room(name) for name in names] == ["__init__", "engine", "lm"]
    assert all(FLOOR_OF[room(name)] < FLOOR_OF["model"] for name in names)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=where)
def test_the_kernel_library_stands_alone(path: Path) -> None:
    """torch, triton and the standard library; its own modules relatively, so that it works under any name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            assert node.module.split(".")[0] != KERNELS.name
    for name in imports_of(path, KERNELS):
        assert name.split(".")[0] in {"torch", "triton", KERNELS.name, *sys.stdlib_module_names}, name


@pytest.mark.parametrize("path", KERNEL_FILES, ids=where)
def test_the_kernel_library_is_python_3_9(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))


@pytest.mark.parametrize("path", OURS, ids=where)
def test_only_the_seam_imports_kernels(path: Path) -> None:
    if path.relative_to(HANDLOOM).parts[0] != "ops":
        assert not [name for name in imports_of(path, HANDLOOM) if name.split(".")[0] == KERNELS.name]


@every_file
def test_nothing_can_run_code_that_came_as_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not CODE_IN_DATA & {part for name in imports(tree, []) for part in name.split(".")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in LOADERS | {"eval", "exec", "__import__"}
            if path not in (HANDLOOM / "__init__.py", KERNELS / "__init__.py"):  # their own, when first used
                assert called.split(".")[-1] != "import_module"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False"


@every_file
def test_every_tensor_that_is_made_names_its_device(path: Path) -> None:
    """Or `torch.set_default_device` would decide where it is."""
    tree = ast.parse(path.read_text())
    named = {name for name in imports(tree, []) if name.startswith("torch.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if (called if called.startswith("torch.") else f"torch.{called}") in FACTORIES & (named | {called}):
                assert any(keyword.arg == "device" for keyword in node.keywords), f"line {node.lineno}: {called}"


@every_file
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"


@every_file
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_every_public_name_can_be_had_and_no_other() -> None:
    assert set(handloom.__all__) <= set(dir(handloom))
    assert all(getattr(handloom, name).__name__ == name for name in handloom.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = handloom.nothing


def test_kernels_is_no_package() -> None:
    """kernels/__init__.py would shadow the `kernels` package that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


def test_both_packages_and_the_typing_marker_are_shipped() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = {ROOT / package for package in build["targets"]["wheel"]["packages"]}
    assert packages == {HANDLOOM, KERNELS}
    assert (HANDLOOM / "py.typed").exists()
    assert not build["targets"]["wheel"].keys() - {"packages"}, "something is left out of, or put into, the wheel"
    assert {"src", "kernels"} <= set(build["targets"]["sdist"]["include"])
    assert set(build["dev-mode-dirs"]) == {"src", "kernels/torch-ext"}
