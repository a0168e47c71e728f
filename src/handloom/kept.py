"""Files that handloom makes once on a machine and keeps: compiled kernels, tokenizers.

They lie in ~/.cache/handloom (XDG_CACHE_HOME) under names that say what they are for, and begin with a checksum of
their content and their name, so that a damaged or renamed one is made anew. Where that folder cannot be written,
nothing is kept, which is said in the log.

This module does not know what the files hold.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

CHECKSUM_BYTES = 32

logger = logging.getLogger("handloom")


def folder() -> Path:
    """Where kept files lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handloom"


def read(path: Path, what: str) -> bytes | None:
    """A kept file's content, unless there is none, or a damaged one; what: the log then says is made anew."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data = content[CHECKSUM_BYTES:]
    if content[:CHECKSUM_BYTES] != _checksum(path, data):
        logger.warning("%s is damaged; %s anew", path, what)
        return None
    return data


def write(path: Path, data: bytes, what: str) -> None:
    """Write a file whole or not at all, whoever else writes or reads it now; what: could not be kept, says the log."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(_checksum(path, data) + data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        logger.warning("%s could not be kept in %s: %s", what, path, error)


def _checksum(path: Path, data: bytes) -> bytes:
    """Of the content and of the name of its file, which says what it is for."""
    return hashlib.sha256(path.name.encode() + data).digest()
