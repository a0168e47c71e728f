"""The header of a GGUF file: metadata and the table of tensors, read with every number checked.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version and two
counts; key-value pairs; name, dimensions, type and offset of each tensor; padding; the tensors' bytes.

The `gguf` package has a reader, and we use its enums and block sizes, but not that reader: it makes a NumPy
view for each string and checks little. Opening SmolLM2 (98k strings) took it 1.8 s and gemma3-270m (262k)
8.7 s; here it is 0.04 s and 0.1 s. Every count and length is a Python integer and is compared with the
bytes that are left before anything is read or allocated, so a lying header costs nothing.

This module does not know what any key or tensor means, nor how tensor bytes become numbers.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from handloom.checkpoint.json_object import quote
from handloom.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_METADATA_BYTES = 256 * 2**20
MAX_ENTRIES = 2**16
"""Most key-value pairs, and most tensors."""
MAX_ELEMENTS = 2**22
"""Most array elements in the whole metadata: a vocabulary of a million with scores, types and merges."""
MAX_KEY_BYTES = 2**16 - 1
"""Longest key, and longest tensor name."""
MAX_DIMS = 4
_BUFFER_BYTES = 2**20
MIN_ALIGNMENT, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 8, 32, 2**16

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor as the file has it.

    Attributes:
        name: the GGUF name, such as `blk.0.attn_q.weight`.
        shape: outermost dimension first (the file has them the other way round).
        storage: its ggml type.
        start: first byte, counted from the start of the file.
        nbytes: length in bytes.
    """

    name: str
    shape: tuple[int, ...]
    storage: gguf.GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says before its tensors' bytes.

    Attributes:
        metadata: numbers, booleans and strings as Python has them, arrays as lists.
        tensors: by GGUF name, in the file's order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, RawTensor]


def read_header(file: io.FileIO, size: int, path: Path) -> Header:
    """Read and check the header of a GGUF file, version 2 or 3, little-endian.

    Args:
        file: open at its first byte, unbuffered.
        size: its length in bytes.
        path: names it in messages.

    Raises:
        CheckpointError: the file is not GGUF, is cut short, or breaks a rule of the format or a limit of this
            module; the message names the file and the key or tensor.
    """
    buffered = io.BufferedReader(file, _BUFFER_BYTES)
    try:
        return _Cursor(path, buffered, size).header()
    finally:
        buffered.detach()


class _Cursor:
    """Reads the header from front to back; `at` says where it is, for messages."""

    def __init__(self, path: Path, file: io.BufferedReader[io.FileIO], size: int) -> None:
        self.path = path
        self.read = file.read
        self.size = size
        self.left = min(size, MAX_METADATA_BYTES)
        self.at = "the start"
        self.elements_left = MAX_ELEMENTS

    def header(self) -> Header:
        if self._take(4) != MAGIC:
            raise self._error("does not begin with 'GGUF'; is it a GGUF file?")
        version = self._u32()
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            known = " and ".join(map(str, VERSIONS))
            what = f"big-endian (version {swapped})" if swapped in VERSIONS else f"version {version}"
            raise self._error(f"GGUF {what} is not supported, only little-endian versions {known}")
        num_tensors, num_pairs = self._u64(), self._u64()
        for count, what in ((num_tensors, "tensors"), (num_pairs, "metadata keys")):
            if count > MAX_ENTRIES:
                raise self._error(f"claims {count} {what}; the limit is {MAX_ENTRIES}")
        metadata = self._metadata(num_pairs)
        return Header(metadata, self._tensors(num_tensors, self._alignment(metadata)))

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            self.at = f"metadata key number {index}"
            key = self._string(MAX_KEY_BYTES)
            self.at = f"metadata key {quote(key)}"
            if not key or key in metadata:
                raise self._error("is empty" if not key else "appears twice")
            kind = self._u32()
            metadata[key] = self._array() if kind == _ARRAY else self._scalar(kind)
        return metadata

    def _scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string(self.left)
        if kind not in _SCALARS:
            raise self._error(f"has the unknown value type {kind}")
        return self._numbers(kind, 1)[0]

    def _array(self) -> Any:
        kind, count = self._u32(), self._u64()
        if kind == _ARRAY:
            raise self._error("is an array of arrays; only one level is supported")
        if kind != _STRING and kind not in _SCALARS:
            raise self._error(f"is an array of the unknown type {kind}")
        width = 8 if kind == _STRING else _SCALARS[kind].itemsize
        if count * width > self.left:
            raise self._error(f"claims {count} elements, more than the {self.left} bytes left can hold")
        self.elements_left -= count
        if self.elements_left < 0:
            raise self._error(f"takes the metadata beyond {MAX_ELEMENTS} array elements in all")
        return self._strings(count) if kind == _STRING else self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        dtype = _SCALARS[kind]
        raw = self._take(count * dtype.itemsize)
        if dtype == np.bool_ and raw.translate(None, b"\0\1"):
            raise self._error("holds a boolean that is neither 0 nor 1")
        numbers: list[Any] = np.frombuffer(raw, dtype).tolist()
        return numbers

    def _strings(self, count: int) -> list[str]:
        read, left, length_of = self.read, self.left, _U64.unpack
        strings: list[str] = []
        try:
            for _ in range(count):
                (length,) = length_of(read(8))
                left -= 8 + length
                if left < 0:
                    raise self._error(f"string {len(strings)} has {length} bytes, more than are left")
                strings.append(str(read(length), "utf-8"))
        except UnicodeDecodeError as cause:
            raise self._error(f"string {len(strings)} is not UTF-8") from cause
        except struct.error as cause:
            raise self._error(f"ends at string {len(strings)} of {count}") from cause
        self.left = left
        return strings

    def _alignment(self, metadata: dict[str, Any]) -> int:
        self.at = "metadata key 'general.alignment'"
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._error(f"is {quote(value)}; it must be a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}")
        return value

    def _tensors(self, count: int, alignment: int) -> dict[str, RawTensor]:
        rows: dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, int, int]] = {}
        expected = 0
        for index in range(count):
            self.at = f"tensor number {index}"
            name = self._string(MAX_KEY_BYTES)
            self.at = f"tensor {quote(name)}"
            if not name or name in rows:
                raise self._error("has no name" if not name else "appears twice")
            shape, storage, nbytes = self._shape_and_type()
            offset = self._u64()
            if offset != expected:
                raise self._error(
                    f"begins at offset {offset}, not at {expected}: tensors must follow one another, aligned to "
                    f"{alignment} bytes, without overlap or hole"
                )
            expected = _align(offset + nbytes, alignment)
            rows[name] = shape, storage, offset, nbytes
        base = _align(min(self.size, MAX_METADATA_BYTES) - self.left, alignment)
        for name, (_, _, offset, nbytes) in rows.items():
            if base + offset + nbytes > self.size:
                self.at = f"tensor {quote(name)}"
                raise self._error(
                    f"ends at byte {base + offset + nbytes}, but the file has {self.size}; was the download cut?"
                )
        return {
            name: RawTensor(name, shape, storage, base + offset, nbytes)
            for name, (shape, storage, offset, nbytes) in rows.items()
        }

    def _shape_and_type(self) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType, int]:
        num_dims = self._u32()
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._error(f"has {num_dims} dimensions; 1 to {MAX_DIMS} are possible")
        shape = tuple(self._u64() for _ in range(num_dims))[::-1]
        type_id = self._u32()
        try:
            storage = gguf.GGMLQuantizationType(type_id)
        except ValueError:
            raise self._error(f"has the unknown ggml type {type_id}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[storage]
        if min(shape) < 1 or shape[-1] % block:
            raise self._error(f"has shape {shape}; {storage.name} needs rows of a positive multiple of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if nbytes > self.size:
            raise self._error(f"of shape {shape} in {storage.name} needs {nbytes} bytes; the file has {self.size}")
        return shape, storage, nbytes

    def _u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack(self._take(8))[0])

    def _string(self, limit: int) -> str:
        length = self._u64()
        if length > limit:
            raise self._error(f"has a string of {length} bytes; the limit is {limit}")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as cause:
            raise self._error("is not UTF-8") from cause

    def _take(self, count: int) -> bytes:
        if count > self.left:
            limit = "the file ends" if self.size <= MAX_METADATA_BYTES else f"{MAX_METADATA_BYTES} bytes is the limit"
            raise self._error(f"needs {count} bytes where only {self.left} are left ({limit})")
        data = self.read(count)
        if len(data) != count:
            raise self._error("ended early; is the file being written to?")
        self.left -= count
        return data

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.at}: {message}")


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
