"""A checkpoint in a folder, laid out as the Hub lays it out: config.json beside .safetensors files.

Whatever the folder holds is taken for hostile: files are looked for by the few names we know, none may lie outside the
folder, every JSON file is bounded, and pickled weights are refused by name.

This module does not know where the folder came from, what the configuration means, and acts on nothing in it but
`dtype` (or `torch_dtype`).
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from handloom.checkpoint.json_object import quote, read_object
from handloom.checkpoint.quantization import QuantizedRows
from handloom.checkpoint.safetensors import READABLE, SafetensorsFile
from handloom.checkpoint.types import TensorInfo
from handloom.errors import CheckpointError, ConfigError, UnsafeCheckpoint
from handloom.text.tokenizer import Tokenizer

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
MAX_CONFIG_BYTES = 1_000_000
MAX_INDEX_BYTES = 64_000_000
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in READABLE.values() if dtype.is_floating_point}


class FolderCheckpoint:
    """An open folder; see `handloom.checkpoint.Checkpoint` for its attributes."""

    def __init__(
        self,
        name: str,
        path: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        files: dict[str, SafetensorsFile],
    ) -> None:
        """Take over open files; `files` gives, for every tensor's name, the file that holds it."""
        self.name = name
        self.path = path
        self.origin = f"the folder {path}"
        self.config = config
        self.generation_config = generation_config
        self._files = files
        self.tensors: Mapping[str, TensorInfo] = {key: file.tensors[key] for key, file in files.items()}
        self.dtype = _dtype(config, self.tensors, path)

    @classmethod
    def open(cls, path: Path, name: str) -> FolderCheckpoint:
        """Open the folder `path`: read its JSON files, and check the header of every weight file.

        Raises:
            CheckpointError: no weights, or weights or an index that are damaged, or lie outside the folder.
            UnsafeCheckpoint: only pickled weights.
            ConfigError: config.json or generation_config.json is missing, damaged or too big, or has a bad `dtype`.
        """
        config_file = find(path, CONFIG)
        if config_file is None:
            raise ConfigError(f"{path}: no {CONFIG}; a model folder has one beside its weights")
        config = read_object(config_file, MAX_CONFIG_BYTES, ConfigError)
        generation_file = find(path, GENERATION_CONFIG)
        generation = read_object(generation_file, MAX_CONFIG_BYTES, ConfigError) if generation_file else {}
        files = _open_weights(path)
        try:
            return cls(name, path, config, generation, files)
        except BaseException:
            _close(files)
            raise

    def read_into(self, name: str, out: torch.Tensor, *, transpose: bool = False) -> None:
        """Copy a weight into `out`; see `Checkpoint.read_into`."""
        if name not in self._files:
            raise CheckpointError(f"{self.path}: no tensor {quote(name)}")
        self._files[name].read_into(name, out, transpose=transpose)

    def read_rows(self, name: str, *, transpose: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A matrix a few rows at a time; see `Checkpoint.read_rows`."""
        if name not in self._files:
            raise CheckpointError(f"{self.path}: no tensor {quote(name)}")
        return self._files[name].read_rows(name, transpose=transpose)

    def read_quantized(self, name: str, out: QuantizedRows, *, transpose: bool = False) -> None:
        """Raises CheckpointError: no .safetensors file holds GGUF's formats."""
        raise CheckpointError(f"{self.path}: tensor {quote(name)} is not held as {out.format.name}")

    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer, or None where it has no tokenizer files; see `Checkpoint.tokenizer`."""
        if not any((self.path / file).exists() for file in (*TOKENIZER_FILES, "tokenizer.model")):
            return None
        return Tokenizer.from_folder(self.path)

    def close(self) -> None:
        """Close all files."""
        _close(self._files)


def find(root: Path, entry: str) -> Path | None:
    """The file `entry` of a model folder, or None if there is none.

    A link may lead out of the folder only inside the Hub's cache, from `<repository>/snapshots/<commit>` to that
    repository's `blobs`, or to the blobs that all repositories of the cache share.

    Raises:
        CheckpointError: `entry` is no plain relative path, leads out of the folder, or is not a regular file.
    """
    parts = PurePosixPath(entry).parts
    if not entry or entry.startswith("/") or ".." in parts or any(char in entry for char in "\\:\0"):
        raise CheckpointError(f"{root}: {quote(entry)} is not a path inside the folder")
    path = root / entry
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed += [parent / "blobs" for parent in folder.parents[1:3]]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{root}: {quote(entry)} is a link out of the folder, to {real}; copy the file instead")
    try:
        mode = real.stat().st_mode
    except OSError:
        return None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return path


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of a model.safetensors.index.json: tensor name to file name, the latter not yet looked for.

    Raises:
        CheckpointError: damaged, too big, or naming a file that is not safetensors.
    """
    weight_map = read_object(path, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that names at least one tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {quote(name)}: {quote(file)} is not the name of a .safetensors file")
    return weight_map


def unsafe(where: str, files: list[str]) -> UnsafeCheckpoint:
    """The error for a checkpoint whose only weights are pickled."""
    return UnsafeCheckpoint(
        f"{where}: no {WEIGHTS}, only {', '.join(sorted(files)[:5])}. Loading such a file can run code hidden in it, "
        "so handloom never does. Convert it where you trust it: transformers' "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors"
    )


def _open_weights(root: Path) -> dict[str, SafetensorsFile]:
    single = find(root, WEIGHTS)
    if single is not None:
        file = SafetensorsFile(single)
        return dict.fromkeys(file.tensors, file)
    index = find(root, INDEX)
    if index is not None:
        return _open_shards(root, index)
    pickled = [path.name for path in root.iterdir() if path.suffix in PICKLED]
    if pickled:
        raise unsafe(str(root), pickled)
    raise CheckpointError(f"{root}: no weights: neither {WEIGHTS} nor {INDEX}")


def _open_shards(root: Path, index: Path) -> dict[str, SafetensorsFile]:
    """Open the shards an index names, and check that tensors and index agree.

    A tensor that a shard holds but the index leaves out is kept, as transformers does: the model decides about it.
    """
    weight_map = read_index(index)
    shards: dict[str, SafetensorsFile] = {}
    files: dict[str, SafetensorsFile] = {}
    try:
        for shard in sorted(set(weight_map.values())):
            path = find(root, shard)
            if path is None:
                raise CheckpointError(f"{index}: the shard {quote(shard)} is missing; was the download complete?")
            file = shards[shard] = SafetensorsFile(path)
            for name in file.tensors:
                if name in files:
                    raise CheckpointError(f"{index}: tensor {quote(name)} is in {files[name].path.name} and in {shard}")
                files[name] = file
        for name, shard in weight_map.items():
            if name not in shards[shard].tensors:
                raise CheckpointError(f"{index}: tensor {quote(name)} is not in {shard}")
    except BaseException:
        for file in shards.values():
            file.close()
        raise
    return files


def _close(files: dict[str, SafetensorsFile]) -> None:
    for file in files.values():
        file.close()


def _dtype(config: dict[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> torch.dtype:
    """The config's dtype, else the floating dtype that most numbers are stored in."""
    asked = config.get("dtype", config.get("torch_dtype"))
    if asked is not None:
        if not isinstance(asked, str) or asked.removeprefix("torch.") not in _DTYPES:
            raise ConfigError(f"{path}/{CONFIG}: dtype {quote(asked)}; known are {', '.join(_DTYPES)}")
        return _DTYPES[asked.removeprefix("torch.")]
    counts: Counter[torch.dtype] = Counter()
    for info in tensors.values():
        dtype = READABLE.get(info.storage)
        if dtype is not None and dtype.is_floating_point:
            counts[dtype] += info.nbytes // dtype.itemsize
    if not counts:
        raise CheckpointError(f"{path}: no tensor is stored as {', '.join(_DTYPES)}, and {CONFIG} gives no dtype")
    return counts.most_common(1)[0][0]
