"""GGUF checkpoints: config, tokenizer and weights out of one file, in the Hub's terms.

Weights are dequantised, or taken apart into planes, while they are copied to where they belong, in pieces of about a
megabyte, so reading a model costs no memory beyond the model. Sharded GGUF files (`split.count` above 1) are refused
by name.

This module does not know what a weight means to a model, or where the file came from.
"""

from __future__ import annotations

import io
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import torch

from handloom.checkpoint.gguf_config import build_config, build_generation_config
from handloom.checkpoint.gguf_dequant import CHUNK_ELEMENTS, FLOATS, SUPPORTED, dequantize, take_apart
from handloom.checkpoint.gguf_names import Weight, find_weights
from handloom.checkpoint.gguf_reader import Header, RawTensor, read_header
from handloom.checkpoint.json_object import quote
from handloom.checkpoint.quantization import QuantizedRows
from handloom.checkpoint.types import TensorInfo
from handloom.errors import CheckpointError
from handloom.text.tokenizer import Tokenizer


class GGUFCheckpoint:
    """An open GGUF file; implements `handloom.checkpoint.Checkpoint`.

    `metadata` has the file's own, as read; its lists go once the tokenizer is made: they take as much memory as that.
    """

    def __init__(self, path: Path, name: str, file: io.FileIO, header: Header) -> None:
        """For `open`; takes over the open file."""
        self.path, self.name, self.origin = path, name, ""
        self._file = file
        self._tokenizer: Tokenizer | None = None
        self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
        _check_readable(header, path)
        self.config = build_config(header.metadata, header.tensors, self._rope_factors(header), str(path))
        self.generation_config = build_generation_config(header.metadata, self.config)
        architecture = header.metadata["general.architecture"]
        self._weights = find_weights(architecture, header.tensors, self.config, str(path))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {w.name: TensorInfo(w.name, w.shape, w.raw.storage.name, w.raw.nbytes) for w in self._weights.values()}
        )
        self.dtype = _main_dtype(header)

    @classmethod
    def open(cls, path: Path, name: str) -> GGUFCheckpoint:
        """Open a GGUF file; reads its header only.

        Raises:
            CheckpointError: no regular file, a damaged or sharded one, or tensors of a type that cannot be read.
            UnsupportedModel, ConfigError: its architecture or metadata is not one we understand.
        """
        file = _open(path)
        try:
            return cls(path, name, file, read_header(file, os.fstat(file.fileno()).st_size, path))
        except BaseException:
            file.close()
            raise

    def read_into(self, name: str, out: torch.Tensor, *, transpose: bool = False) -> None:
        """As `Checkpoint.read_into` says. Takes some 4 MiB of temporary memory, or four rows' if they are longer."""
        weight = self._weight(name)
        rows = self._rows_of(weight, out.detach(), transpose)
        in_place = rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.is_contiguous()
        order = _hub_rows(weight, len(rows)) if weight.rotary_heads else None
        scratch = (
            None
            if in_place and order is None
            else torch.empty(_step(*rows.shape), rows.shape[1], dtype=torch.float32, device="cpu")
        )
        for first, count, raw in self._chunks(weight.raw, *rows.shape):
            piece = rows[first : first + count] if scratch is None else scratch[:count]
            dequantize(weight.raw.storage, raw, piece)
            if weight.offset:
                piece.add_(weight.offset)
            if order is not None:
                rows[order[first : first + count].to(rows.device)] = piece.to(rows)
            elif scratch is not None:
                rows[first : first + count].copy_(piece)

    def read_rows(self, name: str, *, transpose: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `Checkpoint.read_rows` says, in float32. Takes some 4 MiB of temporary memory, or four rows'."""
        weight = self._weight(name)
        if weight.transposed != transpose:
            whole = torch.empty(weight.shape[::-1] if transpose else weight.shape, dtype=torch.float32, device="cpu")
            self.read_into(name, whole, transpose=transpose)
            yield torch.arange(len(whole), device="cpu"), whole
            return
        rows, columns = weight.raw.shape
        order = _hub_rows(weight, rows) if weight.rotary_heads else torch.arange(rows, device="cpu")
        scratch = torch.empty(_step(rows, columns), columns, dtype=torch.float32, device="cpu")
        for first, count, raw in self._chunks(weight.raw, rows, columns):
            piece = scratch[:count]
            dequantize(weight.raw.storage, raw, piece)
            if weight.offset:
                piece.add_(weight.offset)
            yield order[first : first + count], piece

    def read_quantized(self, name: str, out: QuantizedRows, *, transpose: bool = False) -> None:
        """As `Checkpoint.read_quantized` says. Takes a few MiB of temporary memory."""
        weight = self._weight(name)
        held, asked = (weight.raw.shape, weight.raw.storage.name), ((len(out), out.columns), out.format.name)
        if held != asked or weight.transposed != transpose:
            raise CheckpointError(
                f"{self.path}: {quote(name)} has rows of {held}{' transposed' if weight.transposed else ''}; asked to "
                f"read it into {asked}{' transposed' if transpose else ''}"
            )
        order = _hub_rows(weight, len(out)) if weight.rotary_heads else None
        scratch = QuantizedRows.empty(out.format, _step(len(out), out.columns), out.columns)
        for first, count, raw in self._chunks(weight.raw, len(out), out.columns):
            piece = out.narrow(first, count) if order is None else scratch.narrow(0, count)
            try:
                take_apart(weight.raw.storage, raw, piece)
            except CheckpointError as error:
                where = f"{self.path}: tensor {quote(weight.raw.name)}, rows {first} to {first + count - 1}"
                raise CheckpointError(f"{where}: {error}") from None
            if order is not None:
                out.put(order[first : first + count], piece)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the metadata describes; None where there is none (`no_vocab`).

        Raises:
            TokenizerError: of an unknown kind, or damaged.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        if self.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
            return None
        from handloom.text import gguf_tokenizer  # the package tokenizers

        self._tokenizer = Tokenizer(gguf_tokenizer.build(self.metadata, str(self.path)))
        self.metadata = {key: value for key, value in self.metadata.items() if not isinstance(value, list)}
        return self._tokenizer

    def close(self) -> None:
        """Close the file. Reading afterwards is an error; closing twice is not."""
        self._file.close()

    def _weight(self, name: str) -> Weight:
        weight = self._weights.get(name)
        if weight is None:
            raise CheckpointError(f"{self.path}: has no weight {quote(name)}")
        return weight

    def _chunks(self, raw: RawTensor, rows: int, columns: int) -> Iterator[tuple[int, int, memoryview]]:
        """The tensor's bytes in pieces of whole rows: first row, number of rows, bytes (overwritten by the next)."""
        row_bytes, step = raw.nbytes // rows, _step(rows, columns)
        buffer = memoryview(bytearray(step * row_bytes))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            piece = buffer[: count * row_bytes]
            self._read(piece, raw, first * row_bytes)
            yield first, count, piece

    def _rows_of(self, weight: Weight, out: torch.Tensor, transpose: bool) -> torch.Tensor:
        """`out` as a matrix whose rows are the file's (for llama's q and k: in another order)."""
        if transpose and len(weight.shape) != 2:
            raise CheckpointError(f"{self.path}: {quote(weight.name)} of shape {weight.shape} cannot be transposed")
        shape = weight.shape[::-1] if transpose else weight.shape
        if tuple(out.shape) != shape or not out.is_floating_point():
            raise CheckpointError(
                f"{self.path}: {quote(weight.name)} has shape {shape}{' transposed' if transpose else ''}; asked to "
                f"read it into {tuple(out.shape)} of {out.dtype}"
            )
        if len(shape) == 1:
            return out.unsqueeze(1)
        return out if weight.transposed == transpose else out.t()

    def _read(self, buffer: memoryview, raw: RawTensor, offset: int) -> None:
        """Fill `buffer` from the tensor's bytes. Positioned reads: threads do not disturb one another."""
        if self._file.closed:
            raise CheckpointError(f"{self.path}: read of tensor {quote(raw.name)} after the checkpoint was closed")
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done:]], raw.start + offset + done)
            if not count:
                raise CheckpointError(f"{self.path}: tensor {quote(raw.name)} is cut short; did the file change?")
            done += count

    def _rope_factors(self, header: Header) -> list[float] | None:
        raw = header.tensors.get("rope_freqs.weight")
        if raw is None:
            return None
        if raw.storage is not gguf.GGMLQuantizationType.F32 or len(raw.shape) != 1 or raw.shape[0] > CHUNK_ELEMENTS:
            raise CheckpointError(f"{self.path}: tensor {quote(raw.name)} must be a short vector in F32")
        factors, buffer = torch.empty(raw.shape, dtype=torch.float32, device="cpu"), memoryview(bytearray(raw.nbytes))
        self._read(buffer, raw, 0)
        dequantize(raw.storage, buffer, factors)
        return factors.tolist()


def _open(path: Path) -> io.FileIO:
    """Open a regular file for reading; never waits on a pipe."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None


def _check_readable(header: Header, path: Path) -> None:
    shards = header.metadata.get("split.count", 0)
    if type(shards) is not int or shards > 1:
        raise CheckpointError(
            f"{path}: is one of {quote(shards)} shards (split.count); merge them with `llama-gguf-split --merge`"
        )
    for raw in header.tensors.values():
        if raw.storage not in SUPPORTED:
            known = ", ".join(storage.name for storage in sorted(SUPPORTED))
            raise CheckpointError(
                f"{path}: tensor {quote(raw.name)} is stored as {raw.storage.name}; supported are {known}"
            )


def _main_dtype(header: Header) -> torch.dtype:
    """float32 if anything is quantised, else the type that most numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for raw in header.tensors.values():
        if raw.storage not in FLOATS:
            return torch.float32
        counts[FLOATS[raw.storage]] += raw.nbytes // FLOATS[raw.storage].itemsize
    return counts.most_common(1)[0][0] if counts else torch.float32


def _step(rows: int, columns: int) -> int:
    """How many rows are read at once."""
    return min(max(1, CHUNK_ELEMENTS // columns), rows)


def _hub_rows(weight: Weight, num_rows: int) -> torch.Tensor:
    """For each row of the file, its row on the Hub: pairs side by side go half a head apart. int64 [num_rows]."""
    rows = torch.arange(num_rows, device="cpu").view(weight.rotary_heads, 2, -1)
    return rows.transpose(1, 2).reshape(-1)
