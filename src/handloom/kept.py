"""Files that handloom makes once on a machine and keeps: compiled kernels, tokenizers, shipped models.

They lie in one folder, under names that say what they are for, and begin with a checksum of
their content and their name, so that a damaged or renamed one is made anew. One that another user (but root) has
written, or may write to, is not read: the folder may be shared, as /tmp is, and what is kept is run. Where the folder
cannot be written, nothing is kept, which is said in the log.

This module does not know what the files hold.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path

CHECKSUM_BYTES = 32
ROOT = 0
READ_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Whoever put a link or a pipe there: neither followed nor waited for."""

logger = logging.getLogger("handloom")


def folder() -> Path:
    """$HANDLOOM_CACHE, else ~/.cache/handloom (XDG_CACHE_HOME); where there is no home, the root stands for it."""
    chosen, base = os.environ.get("HANDLOOM_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(chosen) if chosen else Path(base, "handloom")
    try:
        return path.expanduser()
    except RuntimeError:
        return Path(os.sep, *path.parts[1:])


def read(path: Path, what: str) -> bytes | None:
    """A kept file's content; None where there is none, or one that is not to be trusted: the log then says `what` is
    done anew."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | READ_FLAGS)) as file:
            ours = _ours(os.fstat(file.fileno()))
            content = file.read() if ours else b""
    except OSError:
        return None
    data = content[CHECKSUM_BYTES:]
    if content[:CHECKSUM_BYTES] != _checksum(path, data):
        reason = "damaged" if ours else "another user's, or others may write to it"
        logger.warning("%s is %s; %s anew", path, reason, what)
        return None
    return data


def write(path: Path, data: bytes, what: str) -> None:
    """Write a file whole or not at all, whoever else reads or writes it now; what: names it where the log says that it
    could not be kept."""
    part = path.with_suffix(f".{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
            file.write(_checksum(path, data) + data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        logger.warning("%s could not be kept in %s: %s; HANDLOOM_CACHE names another folder", what, path.parent, error)


def _ours(status: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written the file; everybody's folders are his own on Windows."""
    return os.name == "nt" or (status.st_uid in (ROOT, os.geteuid()) and not status.st_mode & 0o022)


def _checksum(path: Path, data: bytes) -> bytes:
    """Of the content and of the name of its file, which says what it is for."""
    return hashlib.sha256(path.name.encode() + data).digest()
