"""The compiled step comes from the disk without its compiler, and only what was written there for this processor."""

from __future__ import annotations

import ast
import logging
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from handloom.kept import read, write
from handloom.ops import cpu
from handloom.ops.cpu import compiled, object_code
from handloom.ops.cpu.threads import Team
from handloom_kernels.reference import Norm
from tiny_models import save, tiny_llama

LINKED_HERE = sys.platform == "linux" and platform.machine() == "x86_64"
GENERATE = """
import sys
import handloom as hl
lm = hl.LM.from_pretrained(sys.argv[1])
lm.generate([1, 2, 3], max_new_tokens=2)
assert lm.backend.name == "cpu"
print(*(name for name in ("numba", "llvmlite") if name in sys.modules))
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The step, in a cache of its own."""
    compiled.compiled_step()
    original = compiled.kept_in()
    path = tmp_path / original.name
    path.write_bytes(original.read_bytes())
    monkeypatch.setattr(compiled, "kept_in", lambda: path)
    return path


@pytest.fixture
def code(kept: Path) -> bytes:
    """The object file itself."""
    data = read(kept, "")
    assert data is not None
    return data


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a register of x86-64")
def test_nothing_is_asked_for_ahead_through_rbp(code: bytes) -> None:
    """Which costs rows times weights up to half their speed: see docs/decisions/cpu-backend.md."""
    asked = re.findall(rb"(.)\x0f\x18([\x90-\x97])..\x00\x00", code, re.DOTALL)  # prefetcht1 [register + 32 bits]
    registers = {modrm[0] - 0x90 + 8 * (prefix == b"\x41") for prefix, modrm in asked}
    assert len(registers) > 1
    assert 5 not in registers


def test_a_process_that_need_not_compile_imports_no_compiler(tmp_path: Path) -> None:
    compiled.compiled_step()
    command = [sys.executable, "-c", GENERATE, str(save(tiny_llama(), tmp_path))]
    imported = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert imported == ([] if LINKED_HERE else ["llvmlite"])


def some_op() -> torch.Tensor:
    torch.manual_seed(0)
    norm, rows = Norm("rms", torch.randn(300), None, 1e-5), torch.randn(33, 300)
    return cpu.norm_mlp(rows, norm, torch.randn(1040, 300), None, "silu", True)


@pytest.mark.skipif(not LINKED_HERE, reason="only objects for Linux on x86-64 are linked here")
def test_linked_here_and_by_llvm_it_computes_the_same(code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert object_code.link(code, compiled.NAME) is not None
    expected = some_op()
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(object_code, "link", lambda data, name: None)
        by_llvm = object_code.load(code, compiled.NAME)

    def run(control: int, thread: int) -> None:
        calls.append(thread)
        by_llvm(control, thread)

    monkeypatch.setattr("handloom.ops.cpu.machine._teams.of", lambda _, threads: Team(run, threads))
    assert torch.equal(some_op(), expected)
    assert 0 in calls


@pytest.mark.parametrize("damage", ["nothing", "shorter", "longer", "one bit", "empty", "of another processor"])
def test_what_is_not_what_was_kept_is_compiled_anew(
    kept: Path, code: bytes, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= damage == "one bit"
    if damage == "of another processor":  # copied by hand, or a hash that somebody shortened
        kept = kept.with_name("cpu-0123.o")
        monkeypatch.setattr(compiled, "kept_in", lambda: kept)
    lengths = {"shorter": len(content) - 1, "empty": 0}
    kept.write_bytes(bytes(content[: lengths.get(damage)]) + b"\0" * (damage == "longer"))
    made: list[str] = []

    def compile_step(name: str) -> bytes:
        made.append(name)
        return code

    monkeypatch.setattr(compiled, "_compiler", lambda: SimpleNamespace(compile_step=compile_step))
    with caplog.at_level(logging.WARNING, "handloom"):
        assert callable(compiled._compiled_step.__wrapped__())
    assert made == ([] if damage == "nothing" else [compiled.NAME])
    assert ("is damaged; the CPU kernels are compiled anew" in caplog.text) == bool(made)
    assert read(kept, "") == code
    assert [path.name for path in kept.parent.glob("*.o")].count(kept.name) == 1


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, code: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "handloom"):
        write(tmp_path / "file" / "cpu-1.o", code, "the code")
    assert "could not be kept in" in caplog.text


def test_another_processor_is_given_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = compiled.kept_in.__wrapped__()
    assert own == compiled.kept_in.__wrapped__()
    with monkeypatch.context() as patch:
        patch.setenv("NUMBA_CPU_NAME", "haswell")
        assert compiled.kept_in.__wrapped__() != own
    processor = compiled._processor()
    assert processor == compiled._processor() and len(processor) > 20
    monkeypatch.setattr(compiled, "_processor", lambda: processor.replace(" avx512f", ""))
    if " avx512f" in processor:
        assert compiled.kept_in.__wrapped__() != own


def test_what_kernels_take_constants_from_is_in_the_name_of_the_file() -> None:
    """All that is imported on the way to the step."""
    found, todo = set[str](), {"handloom.ops.cpu.compiling"}
    while todo:
        found |= todo
        sources = [Path(compiled.__file__).with_name(f"{name.rpartition('.')[2]}.py") for name in todo]
        nodes = [node for source in sources for node in ast.walk(ast.parse(source.read_text()))]
        imported = [
            (node.module or "", alias.name)
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        names = {f"{module}.{name}" if module == "handloom.ops.cpu" else module for module, name in imported}
        todo = {name for name in names if name.startswith("handloom.ops.cpu.")} - found
        found |= {name for name in names if name.startswith("handloom.")}
    outside = {f"{name.removeprefix('handloom.').replace('.', '/')}.py" for name in found if ".ops.cpu." not in name}
    assert outside - {"errors.py"} == set(compiled.OUTSIDE)


@pytest.mark.skipif(not LINKED_HERE, reason="only objects for Linux on x86-64 are linked here")
def test_objects_that_ask_for_more_are_left_to_llvm(code: bytes) -> None:
    assert object_code.link(b"\xcf\xfa\xed\xfe" + code[4:], compiled.NAME) is None  # Mach-O
    assert object_code.link(code[:18] + struct.pack("<H", 183) + code[20:], compiled.NAME) is None  # AArch64
    assert object_code.link(code.replace(b"\0sched_yield\0", b"\0sched_yielt\0"), compiled.NAME) is None
    sections = list(object_code._sections(code))
    first = next(s for s in sections if s.type == object_code.RELA and sections[s.info].type == object_code.PROGBITS)
    (headers,) = struct.unpack_from("<Q", code, 40)
    flags = headers + sections.index(sections[first.info]) * 64 + 8
    writable = code[:flags] + struct.pack("<Q", sections[first.info].flags | 1) + code[flags + 8 :]
    assert object_code.link(writable, compiled.NAME) is None
    relative = code[: first.offset + 8] + struct.pack("<I", 2) + code[first.offset + 12 :]  # R_X86_64_PC32
    assert object_code.link(relative, compiled.NAME) is None


@pytest.mark.skipif(sys.platform == "win32", reason="nobody else writes to a user's folders there")
@pytest.mark.parametrize("whose", ["others may write", "another user's", "a link", "a pipe"])
def test_code_that_somebody_else_may_have_put_there_is_not_run(
    kept: Path, whose: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if whose == "others may write":
        kept.chmod(0o666)
    elif whose == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: kept.stat().st_uid + 1)
        monkeypatch.setattr("handloom.kept.ROOT", -1)
    elif whose == "a link":
        kept.symlink_to(kept.rename(kept.with_suffix(".elsewhere")))
    else:
        kept.unlink()
        os.mkfifo(kept)
    with caplog.at_level(logging.WARNING, "handloom"):
        assert read(kept, "the kernels are compiled") is None
    assert ("others may write to it" in caplog.text) == (whose in ("others may write", "another user's"))


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files")
def test_what_is_kept_is_ours_alone_to_write_and_follows_no_link(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "folder" / "cpu-1.o"
    before = os.umask(0)
    try:
        write(path, b"code", "it")
        assert path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
    path.unlink()
    path.symlink_to(target)
    write(path, b"code", "it")
    assert read(path, "it is made") == b"code" and not path.is_symlink() and not target.exists()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


REFUSING = """
import ctypes
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) and exit(77)  # PR_SET_MDWE: no memory becomes executable, as under systemd
from handloom.errors import UnsupportedOption
from handloom.ops.cpu import compiled
try:
    compiled.require()
except UnsupportedOption as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_MDWE is Linux's")
@pytest.mark.parametrize("made", [True, False], ids=["kept", "to be compiled"])
def test_a_system_that_lets_no_memory_be_executed_is_said(made: bool, tmp_path: Path) -> None:
    compiled.compiled_step()
    environment = os.environ if made else {**os.environ, "HANDLOOM_CACHE": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", REFUSING], env=environment, stdout=subprocess.PIPE, text=True)
    if ran.returncode == 77:
        pytest.skip("this Linux has no PR_SET_MDWE")
    assert ran.returncode == 0 and "does not let be run" in ran.stdout and "choose 'torch'" in ran.stdout


PROBES = {"haswell": (True, False), "skylake-avx512": (True, True), "nehalem": (False, False)}
PROBE = """
from handloom.errors import UnsupportedOption
from handloom.ops.cpu import compiled, tiles
try:
    compiled._compiler().require_processor()
    print(True, tiles.WIDE)
except UnsupportedOption as error:
    assert "FMA and F16C" in str(error)
    print(False, tiles.WIDE)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64")
@pytest.mark.parametrize("processor", PROBES)
def test_what_a_processor_can_is_asked_of_llvm(processor: str) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    ran = subprocess.run([sys.executable, "-c", PROBE], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert ran.stdout.split() == [str(can) for can in PROBES[processor]]
