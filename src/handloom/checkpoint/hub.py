"""Fetching a checkpoint from the Hub, through `huggingface_hub`: its cache, its tokens, its progress bars.

What this adds to the client: only the files a checkpoint needs, by an allow-list (never code, never pickles); the
weights' SHA-256 compared with the Hub's after a download (the client itself compares sizes only); bounded retries
where the client has none; and typed errors.

A cut download is resumed by the client within the same call. A cached copy is used when the Hub does not answer, but
never against a definite answer (401, 403, 404).

This module does not know what is in the files, or which model is the default.
"""

from __future__ import annotations

import glob
import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from handloom.checkpoint.folder import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    PICKLED,
    TOKENIZER_FILES,
    WEIGHTS,
    read_index,
    unsafe,
)
from handloom.checkpoint.json_object import quote
from handloom.errors import (
    AuthenticationRequired,
    CheckpointError,
    DownloadCorrupted,
    GatedModel,
    HandloomError,
    HubError,
    HubUnreachable,
    ModelNotFound,
)

TRIES = 3
_WAIT_SECONDS = 0.5  # before the second try; doubles
_INFO_TIMEOUT_SECONDS = 10.0

# The base of the client's transport errors: httpx.HTTPError or httpx2.HTTPError, by the version of huggingface_hub.
_TransportError: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HubSource:
    """What to fetch, and with which of the client's settings."""

    repo: str
    file: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: Path | None = None

    def __str__(self) -> str:
        name = f"{self.repo}:{self.file}" if self.file else self.repo
        return f"{name} at revision {self.revision}" if self.revision else name


def fetch(source: HubSource) -> tuple[Path, str]:
    """Download what is missing; give the local folder (or .gguf file) and a few words on how it was got.

    Raises:
        ModelNotFound: no such repository, revision or file, or nothing in it that we can load.
        UnsafeCheckpoint: only pickled weights.
        AuthenticationRequired, GatedModel: the Hub answered 401, 403.
        HubUnreachable: no answer, or 5xx after `TRIES` tries, and the cache does not have it either.
        DownloadCorrupted: wrong size or SHA-256; the bad file is deleted.
        CheckpointError: a damaged index.
    """
    try:
        info = _ask(source)
    except HubUnreachable as error:
        try:
            path = from_cache(source)
        except HubUnreachable:
            raise error from error.__cause__
        return path, f"the Hub's {source}, from the local cache ({error})"
    small, weights = select(source, [file.rfilename for file in info.siblings or []])
    if INDEX in small:
        weights = _shards(source, _download(source, info, small) / INDEX, info)
    elif small:
        _download(source, info, small)
    folder = _download(source, info, weights)
    if source.file or weights[0].endswith(".gguf"):
        return folder / weights[0], f"the Hub's {source.repo}:{weights[0]}, commit {info.sha}"
    return folder, f"the Hub's {source}, commit {info.sha}"


def from_cache(source: HubSource) -> Path:
    """The local folder (or .gguf file) without asking the Hub; what is missing in it shows when it is opened.

    Raises:
        HubUnreachable: not in the cache.
        ModelNotFound: not a valid name of a repository.
    """
    try:
        folder = Path(
            snapshot_download(
                source.repo,
                revision=source.revision,
                cache_dir=source.cache_dir,
                local_files_only=True,
                allow_patterns=[],  # any snapshot will do: the client's own check of completeness knows other files
            )
        )
    except HFValidationError as error:
        raise _typed(error, source) from error
    except LocalEntryNotFoundError as error:
        raise HubUnreachable(f"{source} is not in the local cache, and the Hub was not asked") from error
    path = folder / source.file if source.file else folder
    if not path.exists():
        raise HubUnreachable(f"{source} is not in the local cache, though other files of its repository are")
    return path


def why_unreachable(source: HubSource, seconds: float) -> str | None:
    """None if the Hub answers for `source` within `seconds` (name lookup included), else why not."""
    if constants.HF_HUB_OFFLINE:
        return "offline mode (HF_HUB_OFFLINE)"
    result: list[str | None] = []

    def probe() -> None:
        try:
            _ask(source, tries=1, timeout=seconds)
        except HandloomError as error:
            result.append(str(error).removeprefix(f"{source}: "))
        else:
            result.append(None)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else f"no answer within {seconds:g} s"


def select(source: HubSource, files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the files of a repository, those to fetch: the small ones, then the weights.

    With a sharded checkpoint the weights are left empty: its index, one of the small files, lists them.

    Raises:
        ModelNotFound: the file asked for is not there, or none is a checkpoint, or several .gguf files could be it.
        UnsafeCheckpoint: only pickled weights.
    """
    names = sorted(files)
    gguf = [name for name in names if name.endswith(".gguf")]
    if source.file:
        if source.file not in gguf:
            raise ModelNotFound(f"{source.repo} has no {quote(source.file)}; its .gguf files: {_listed(gguf)}")
        return [], [source.file]
    small = [name for name in names if name in {CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES}]
    if WEIGHTS in names:
        return small, [WEIGHTS]
    if INDEX in names:
        return [*small, INDEX], []
    if len(gguf) == 1:
        return [], gguf
    if gguf:
        raise ModelNotFound(f"{source.repo} has {len(gguf)} .gguf files; name one as repo:file.gguf: {_listed(gguf)}")
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise unsafe(source.repo, pickled)
    raise ModelNotFound(f"{source.repo} has no {WEIGHTS}, no {INDEX} and no .gguf file; its files: {_listed(names)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _shards(source: HubSource, index: Path, info: ModelInfo) -> list[str]:
    """The shards an index names, all of which must be in the repository: checked before gigabytes are fetched."""
    shards = sorted(set(read_index(index).values()))
    missing = set(shards) - {file.rfilename for file in info.siblings or []}
    if missing:
        raise CheckpointError(f"{source}: {INDEX} names {quote(min(missing))}, which the repository does not have")
    return shards


def _ask(source: HubSource, tries: int = TRIES, timeout: float = _INFO_TIMEOUT_SECONDS) -> ModelInfo:
    """The commit that the revision stands for, and its files."""
    api = HfApi(token=source.token)

    def call() -> ModelInfo:
        return api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=timeout)

    info = _retrying(call, source, tries, retry_transport=False)
    if not info.sha:
        raise HubError(f"{source}: {constants.ENDPOINT} answered without a commit; is it a Hub?")
    return info


def _download(source: HubSource, info: ModelInfo, files: list[str]) -> Path:
    """Bring files into the cache, and compare those that were not there yet with the Hub's SHA-256."""
    fresh = [name for name in files if not _is_cached(source, info, name)]

    def call() -> str:
        return snapshot_download(
            source.repo,
            revision=source.revision,
            cache_dir=source.cache_dir,
            token=source.token,
            allow_patterns=[glob.escape(name) for name in files],
        )

    folder = Path(_retrying(call, source, TRIES, retry_transport=True))
    if folder.name != info.sha:
        raise HubError(f"{source}: its branch moved to another commit while we were fetching it; try again")
    absent = [name for name in files if not (folder / name).exists()]
    if absent:  # the client falls back to what it has when the Hub stops answering
        raise HubUnreachable(f"{source}: the Hub stopped answering before it gave {quote(absent[0])}; try again")
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs is not None}
    for name in fresh:
        if name in hashes:
            _verify(folder / name, hashes[name], source)
    return folder


def _is_cached(source: HubSource, info: ModelInfo, name: str) -> bool:
    return isinstance(try_to_load_from_cache(source.repo, name, cache_dir=source.cache_dir, revision=info.sha), str)


def _verify(path: Path, sha256: str, source: HubSource) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadCorrupted(
            f"{source}: {path.name} arrived with SHA-256 {digest} instead of {sha256}; deleted, try again"
        )


def _retrying(call: Callable[[], _T], source: HubSource, tries: int, *, retry_transport: bool) -> _T:
    """`call()`, again after 429, 5xx and (where asked for) a broken connection; at most `tries` times."""
    for attempt in range(1, tries + 1):
        try:
            return call()
        except (_TransportError, OSError, ValueError, EntryNotFoundError, RuntimeError) as error:
            passing = _status(error) in (429, *range(500, 600)) if _status(error) else retry_transport
            again = passing and isinstance(error, _TransportError) and attempt < tries
            if not again:
                raise _typed(error, source, attempt) from error
        time.sleep(_WAIT_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _typed(error: Exception, source: HubSource, attempt: int = 1) -> Exception:
    """What the client raised, as one of our errors; itself if it is not about the Hub (a full disk)."""
    status = _status(error)
    times = f" (tried {attempt} times)" if attempt > 1 else ""
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        return _typed(cause, source) if isinstance(cause, Exception) else HubUnreachable(f"{source}: {error}")
    if isinstance(error, GatedRepoError):
        return GatedModel(
            f"{source} is gated: accept its licence at {constants.ENDPOINT}/{source.repo}, and give a token "
            "(token=..., or HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"{source.repo} has no revision {quote(source.revision)}")
    if status == 401:
        return AuthenticationRequired(
            f"{source}: the Hub answered 401. It does not exist, or is private: then give a valid token for it "
            "(token=..., or HF_TOKEN)"
        )
    if status == 403:
        return GatedModel(f"{source}: the Hub answered 403: this token may not read it")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(f"{source.repo} is not a folder or file here, nor a model on {constants.ENDPOINT}")
    if isinstance(error, EntryNotFoundError) or status == 404:
        return ModelNotFound(f"{source}: a file that the Hub lists is not there (404): {error}")
    if status is not None:
        kind = HubUnreachable if status == 429 or status >= 500 else HubError
        return kind(f"{source}: the Hub answered {status}{times}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable(f"{source}: offline mode (HF_HUB_OFFLINE), and not in the local cache")
    if isinstance(error, _TransportError):
        return HubUnreachable(f"{source}: the connection to {constants.ENDPOINT} failed{times}: {error}")
    if isinstance(error, HFValidationError):
        return ModelNotFound(f"{quote(source.repo)} is not a folder or file here, and not a valid name on the Hub")
    if isinstance(error, ValueError | FileMetadataError):
        return HubError(f"{source}: {constants.ENDPOINT} answered what a Hub does not answer: {error}")
    if isinstance(error, RuntimeError) or type(error).__module__.startswith("hf_xet"):
        return HubUnreachable(
            f"{source}: hf_xet could not download it ({error}); HF_HUB_DISABLE_XET=1 does without hf_xet"
        )
    if "Consistency check failed" in str(error):
        first = str(error).partition("\n")[0]
        return DownloadCorrupted(f"{source}: {first} Try again; if it stays so, delete the model from the Hub's cache")
    return error
