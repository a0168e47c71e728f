"""A strict, lazy reader of one .safetensors file.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length (little endian), a JSON
header that gives every tensor its dtype, shape and byte range, then the bytes. The header is checked whole when the
file is opened, with Python integers and before any tensor is allocated; tensors are read one at a time, when asked for.

Reading is by `preadv`: straight into the destination where dtype and layout agree, else through a staging
buffer of 1 MiB. Measured against a memory map with converted copies (540 MB, 2 threads) it is as fast, it keeps no
mapped page in memory, and a file that shrinks while it is read is an error instead of a SIGBUS.

This module does not know about folders, shards, configs, or what a tensor means.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from handloom.checkpoint import memory
from handloom.checkpoint.json_object import parse_object, quote
from handloom.checkpoint.types import TensorInfo
from handloom.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit that the format's own reader has."""

MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1
_STAGE_BYTES = 1 << 20
_DIRECT_BYTES = 256 << 20  # at most per system call: macOS refuses 2^31

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The storage formats that `read_into` reads, as torch dtypes."""


@dataclass(frozen=True, slots=True)
class _Entry:
    info: TensorInfo
    offset: int  # of the first byte, in the file


class SafetensorsFile:
    """One open .safetensors file.

    Attributes:
        path: the file.
        tensors: what it holds, by name.
        metadata: the header's `__metadata__`.
    """

    _fd = -1

    def __init__(self, path: Path) -> None:
        """Open a file and check its whole header.

        Raises:
            CheckpointError: not a regular file, or a header that is damaged or lies about the bytes behind it; names
                the file and the tensor.
        """
        self.path = path
        self._fd = _open(path)
        try:
            header, start, size = self._read_header()
            self.metadata = _metadata(header.pop("__metadata__", None), path)
            self._entries = _entries(header, start, size, path)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in self._entries.items()}

    def read_into(self, name: str, out: torch.Tensor, *, transpose: bool = False) -> None:
        """Copy a tensor into `out`, converting to its dtype and device. Safe to call from several threads.

        Args:
            name: a key of `tensors`.
            out: the tensor's shape (its two dimensions swapped with `transpose`), any dtype and device; may be a view.
            transpose: write the transposed matrix.

        Raises:
            CheckpointError: no such tensor, another shape, a storage that is not in `READABLE`, a floating tensor
                asked for as integers, or a file that has shrunk since it was opened.
        """
        entry, dtype, target = self._prepare(name, out, transpose)
        if dtype is not torch.bool and target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
            self._fill(target.reshape(-1).view(torch.uint8).numpy().data, entry.offset, name)
            return
        if target.is_contiguous():
            target = target.reshape(-1)
        for first, source in self._stages(entry, dtype, target.shape):
            target[first : first + len(source)].copy_(source)

    def read_rows(self, name: str, *, transpose: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A matrix a few rows at a time; see `Checkpoint.read_rows`. Raises as read_into does."""
        shape = self.tensors[name].shape if name in self.tensors else ()
        whole = torch.empty(shape[::-1] if transpose else shape, device="meta")
        entry, dtype, _ = self._prepare(name, whole, transpose)
        if transpose:
            whole = torch.empty_like(whole, dtype=dtype, device="cpu")
            self.read_into(name, whole, transpose=True)
            yield torch.arange(len(whole), device="cpu"), whole
            return
        for first, source in self._stages(entry, dtype, whole.shape):
            yield torch.arange(first, first + len(source), device="cpu"), source

    def _stages(self, entry: _Entry, dtype: torch.dtype, shape: torch.Size) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor seen in this shape, some rows at a time: the number of the first, and their values."""
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        step = max(1, _STAGE_BYTES // max(1, row_bytes))
        stage = memory.empty((min(step, shape[0]) * row_bytes,), torch.uint8)
        view = stage.numpy().data
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            nbytes = count * row_bytes
            self._fill(view[:nbytes], entry.offset + first * row_bytes, entry.info.name)
            source = stage[:nbytes] != 0 if dtype is torch.bool else stage[:nbytes].view(dtype)
            yield first, source.view(count, *shape[1:])

    def close(self) -> None:
        """Close the file. Reading afterwards is an error; closing twice is not."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def _prepare(self, name: str, out: torch.Tensor, transpose: bool) -> tuple[_Entry, torch.dtype, torch.Tensor]:
        """Check a read; give the entry, its dtype, and `out` seen in the file's own orientation."""
        if self._fd < 0:
            raise CheckpointError(f"{self.path}: closed; open the checkpoint again to read {quote(name)}")
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: no tensor {quote(name)}")
        entry = self._entries[name]
        info = entry.info
        dtype = READABLE.get(info.storage)
        where = f"{self.path}: tensor {quote(name)}"
        if dtype is None:
            raise CheckpointError(f"{where}: stored as {info.storage}; we read {', '.join(READABLE)}")
        if dtype.is_floating_point and not out.dtype.is_floating_point:
            raise CheckpointError(f"{where}: stored as {info.storage}, asked for as {out.dtype}")
        if transpose and len(info.shape) != 2:
            raise CheckpointError(f"{where}: only a matrix can be transposed, not the shape {list(info.shape)}")
        target = out.detach().t() if transpose and out.dim() == 2 else out.detach()
        if tuple(target.shape) != info.shape:
            asked = f"{list(out.shape)}{' transposed' if transpose else ''}"
            raise CheckpointError(f"{where}: has the shape {list(info.shape)}, asked for as {asked}")
        return entry, dtype, target

    def _fill(self, buffer: memoryview, offset: int, name: str) -> None:
        """Read `len(buffer)` bytes at `offset`, whole."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done : done + _DIRECT_BYTES]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: tensor {quote(name)}: the file ended early; was it changed?")
            done += count

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        """The header, where the tensors' bytes start, and how many there are."""
        size = os.fstat(self._fd).st_size
        if size < 8:
            raise CheckpointError(f"{self.path}: {size} bytes are too few for a safetensors file; is it truncated?")
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if 8 + length > size:
            raise CheckpointError(f"{self.path}: a header of {length} bytes in a file of {size}; is it truncated?")
        data = os.pread(self._fd, length, 8)
        if not data.startswith(b"{"):
            raise CheckpointError(f"{self.path}: the header does not begin with '{{'; is this a safetensors file?")
        header = parse_object(data, f"{self.path}: header", CheckpointError)
        return header, 8 + length, size - 8 - length


def _open(path: Path) -> int:
    """Open a regular file for reading; never waits on a pipe."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None


def _metadata(value: object, path: Path) -> dict[str, str]:
    """Empty where the file has null, which the format's own library writes nowhere and reads."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return value


def _entries(header: dict[str, Any], start: int, size: int, path: Path) -> dict[str, _Entry]:
    """Check every tensor by itself, then that together they cover the bytes exactly once."""
    entries = {name: _entry(name, value, start, size, path) for name, value in header.items()}
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.info.nbytes)):
        if entry.offset != position:
            problem = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {quote(entry.info.name)}: its byte range {problem}")
        position += entry.info.nbytes
    if position != start + size:
        raise CheckpointError(f"{path}: {start + size - position} bytes at the end belong to no tensor")
    return entries


def _entry(name: str, value: object, start: int, size: int, path: Path) -> _Entry:
    where = f"{path}: tensor {quote(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets")
    storage, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(storage, str) or storage not in _BITS:
        raise CheckpointError(f"{where}: unknown dtype {quote(storage)}; known are {', '.join(_BITS)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(d for d in shape if d) > _MAX_SIZE:
        raise CheckpointError(
            f"{where}: shape {quote(shape)} must be at most {MAX_DIMENSIONS} integers >= 0, their product < 2^63"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise CheckpointError(f"{where}: data_offsets {quote(offsets)} must be [begin, end] within the {size} bytes")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[storage]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: {storage} of shape {shape} takes {bits / 8:g} bytes, but its range holds {end - begin}"
        )
    return _Entry(TensorInfo(name, tuple(shape), storage, end - begin), start + begin)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
