"""The safetensors reader against the format's own library, and against files that lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from handloom.checkpoint.safetensors import MAX_HEADER_BYTES, SafetensorsFile
from handloom.errors import CheckpointError


def encoded(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header (bytes are taken as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    return values > 0 if dtype is torch.bool else values.to(dtype)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.bool]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[SafetensorsFile, dict[str, torch.Tensor]]:
    """Tensors of every dtype and of odd shapes, written by the real library; one is larger than a staging buffer."""
    tensors = {f"{dtype}.{shape}": filled(shape, dtype) for dtype in FLOATS + INTEGERS for shape in [(3, 5), (7,)]}
    tensors["u8"] = torch.arange(255, dtype=torch.uint8)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["cube"] = filled((3, 4, 5), torch.float32)
    tensors["large"] = filled((513, 1031), torch.float32)
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return SafetensorsFile(path), load_file(path)


def test_metadata_may_be_null_as_in_the_real_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(encoded({"__metadata__": None}))
    assert load_file(path) == {} and SafetensorsFile(path).metadata == {}


def test_every_dtype_reads_as_the_real_library_reads_it(saved: Any) -> None:
    file, expected = saved
    assert file.tensors.keys() == expected.keys()
    assert file.metadata == {"format": "pt"}
    for name, tensor in expected.items():
        info = file.tensors[name]
        assert (info.name, info.shape, info.nbytes) == (name, tuple(tensor.shape), tensor.nbytes)
        out = torch.empty_like(tensor)
        file.read_into(name, out)
        assert torch.equal(out, tensor), name


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("name", [f"{dtype}.{shape}" for dtype in FLOATS for shape in [(3, 5), (7,)]] + ["large"])
def test_floating_tensors_convert_as_torch_converts(saved: Any, name: str, target: torch.dtype) -> None:
    file, expected = saved
    out = torch.empty(expected[name].shape, dtype=target)
    file.read_into(name, out)
    assert torch.equal(out, expected[name].to(target))


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["large", "torch.float16.(3, 5)", "torch.float32.(3, 5)", "empty"])
def test_transpose_and_views_of_a_bigger_tensor(saved: Any, name: str, target: torch.dtype) -> None:
    file, expected = saved
    rows, columns = expected[name].shape
    out = torch.empty(columns, rows, dtype=target)
    file.read_into(name, out, transpose=True)
    assert torch.equal(out, expected[name].t().to(target))

    whole = torch.zeros(rows + 2, columns + 3, dtype=target)
    file.read_into(name, whole[1:-1, 2:-1])  # strided: neither rows nor columns are contiguous with their neighbours
    assert torch.equal(whole[1:-1, 2:-1], expected[name].to(target))
    assert whole[0].count_nonzero() == whole[-1].count_nonzero() == whole[:, :2].count_nonzero() == 0
    assert whole[:, -1].count_nonzero() == 0

    stacked = torch.zeros(rows * 2, columns, dtype=target)
    file.read_into(name, stacked[rows:])  # contiguous: a part of a fused weight
    assert torch.equal(stacked[rows:], expected[name].to(target))
    assert stacked[:rows].count_nonzero() == 0


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", ["large", "torch.float16.(3, 5)", "torch.bfloat16.(3, 5)", "empty"])
def test_rows_a_few_at_a_time_are_those_of_the_whole(saved: Any, name: str, transpose: bool) -> None:
    file, expected = saved
    whole = expected[name].t() if transpose else expected[name]
    pieces = [(rows, values.clone()) for rows, values in file.read_rows(name, transpose=transpose)]
    assert torch.equal(torch.cat([rows for rows, _ in pieces] or [torch.arange(0)]), torch.arange(len(whole)))
    assert torch.equal(torch.cat([values for _, values in pieces] or [whole]), whole)
    assert len(pieces) == 3 or name != "large" or transpose


def test_rows_of_what_is_not_there_are_an_error(saved: Any) -> None:
    file, _ = saved
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        next(file.read_rows("absent"))
    with pytest.raises(CheckpointError, match="only a matrix can be transposed"):
        next(file.read_rows("cube", transpose=True))


def test_reads_into_a_parameter_that_requires_grad(saved: Any) -> None:
    file, expected = saved
    out = torch.nn.Parameter(torch.empty(3, 4, 5))
    file.read_into("cube", out)
    assert torch.equal(out, expected["cube"])


def test_many_threads_read_the_same_file(saved: Any) -> None:
    file, expected = saved
    names = [name for name in expected for _ in range(8)]

    def read(name: str) -> bool:
        out = torch.empty(expected[name].shape, dtype=expected[name].dtype)
        file.read_into(name, out)
        return torch.equal(out, expected[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, names))


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    data = b"\x07" + values.numpy().tobytes()
    header = {"byte": entry("U8", [1], [0, 1]), "floats": entry("F32", [2], [1, 9])}
    file = SafetensorsFile(write(tmp_path, encoded(header, data)))
    for dtype in (torch.float32, torch.float64):
        out = torch.empty(2, dtype=dtype)
        file.read_into("floats", out)
        assert torch.equal(out, values.to(dtype))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "header length cut": (b"\x02\0\0", "too few"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "header length 2^64-1": (b"\xff" * 8 + b"{}", "at most"),
    "header over 100 MB": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "at most"),
    "not JSON": (encoded(b"{nope}"), "JSON"),
    "not an object": (encoded([1]), "begin"),
    "leading space": (encoded(b" {}"), "begin"),
    "not UTF-8": (encoded(b'{"\xff": 1}'), "JSON"),
    "a name with half a surrogate pair": (encoded(b'{"\\ud800": 1}'), "surrogates not allowed"),
    "deep nesting": (encoded(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested"),
    "NaN": (encoded(b'{"a": NaN}'), "NaN"),
    "infinity": (encoded(b'{"a": 1e999}'), "too big"),
    "an integer of 5000 digits": (encoded(b'{"a": ' + b"9" * 5000 + b"}"), "JSON"),
    "too many values": (encoded(b'{"a": [' + b"0," * 4_000_001 + b"0]}"), "commas"),
    "metadata with a number": (encoded({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata no object": (encoded({"__metadata__": "a"}), "__metadata__"),
    "key twice": (encoded(b'{"twin": 1, "twin": 2}'), "'twin' is given twice"),
    "entry no object": (encoded({"w": 3}), "'w'"),
    "entry with more keys": (encoded({"w": entry() | {"code": "x"}}, bytes(8)), "'w'"),
    "entry with fewer keys": (encoded({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), "'w'"),
    "unknown dtype": (encoded({"w": entry("F31")}, bytes(8)), "'w': unknown dtype 'F31'"),
    "dtype no string": (encoded({"w": entry(["F32"])}, bytes(8)), "'w': unknown dtype"),
    "dtype lies": (encoded({"w": entry("F64")}, bytes(8)), "'w': F64 of shape"),
    "shape negative": (encoded({"w": entry(shape=[-2])}, bytes(8)), "'w': shape"),
    "shape a float": (encoded({"w": entry(shape=[2.0])}, bytes(8)), "'w': shape"),
    "shape a boolean": (encoded({"w": entry(shape=[True], offsets=[0, 4])}, bytes(4)), "'w': shape"),
    "shape no list": (encoded({"w": entry(shape=2)}, bytes(8)), "'w': shape"),
    "shape of 65 dimensions": (encoded({"w": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)), "'w': shape"),
    "shape overflows 64 bits to 8 bytes": (encoded({"w": entry(shape=[2**62 + 2])}, bytes(8)), "'w'"),
    "shape product overflows": (encoded({"w": entry(shape=[2**33, 2**33])}, bytes(8)), "'w': shape"),
    "empty with a dimension of 2^63": (encoded({"w": entry(shape=[0, 2**63], offsets=[0, 0])}), "'w': shape"),
    "offsets reversed": (encoded({"w": entry(offsets=[8, 0])}, bytes(8)), "'w': data_offsets"),
    "offsets negative": (encoded({"w": entry(offsets=[-8, 0])}, bytes(8)), "'w': data_offsets"),
    "offsets past the end": (encoded({"w": entry(offsets=[0, 2**63])}, bytes(8)), "'w': data_offsets"),
    "truncated shard": (encoded({"w": entry()}, bytes(7)), "'w': data_offsets"),
    "three offsets": (encoded({"w": entry(offsets=[0, 8, 8])}, bytes(8)), "'w': data_offsets"),
    "half a byte": (encoded({"w": entry("F4", [3], [0, 1])}, bytes(1)), "'w': F4"),
    "hole at the start": (encoded({"w": entry(offsets=[4, 12])}, bytes(12)), "'w': its byte range leaves a hole"),
    "hole between": (encoded({"v": entry(), "w": entry(offsets=[12, 20])}, bytes(20)), "'w': its byte range leaves"),
    "overlap": (encoded({"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)), "'w': its byte range overlaps"),
    "the same bytes twice": (encoded({"v": entry(), "w": entry()}, bytes(8)), "its byte range overlaps"),
    "bytes that belong to nothing": (encoded({"w": entry()}, bytes(9)), "1 bytes at the end"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_row7_hostile_safetensors_are_refused_by_file_and_tensor_before_allocation(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, said = HOSTILE[case]
    path = write(tmp_path, content)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was allocated")

    monkeypatch.setattr(torch, "empty", forbidden)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_row7_a_100_mb_header_that_the_file_has_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="at most 100000000"):
        SafetensorsFile(path)


def test_row7_names_that_cannot_be_printed_do_not_break_the_message(tmp_path: Path) -> None:
    path = write(tmp_path, encoded(b'{"' + b"x" * 5000 + b'\\u0000": 3}'))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert len(str(caught.value).encode()) < 1000


def test_row7_no_file_descriptor_leaks_from_refused_files(tmp_path: Path) -> None:
    path = write(tmp_path, HOSTILE["overlap"][0])
    before = os.open(path, os.O_RDONLY)
    os.close(before)
    for _ in range(5):
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    after = os.open(path, os.O_RDONLY)
    os.close(after)
    assert after == before


def test_row7_a_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path, encoded({"w": entry(shape=[1024], offsets=[0, 4096])}, bytes(4096)))
    file = SafetensorsFile(path)
    os.truncate(path, 200)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(CheckpointError, match="'w': the file ended early"):
            file.read_into("w", torch.empty(1024, dtype=dtype))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path)], ids=["folder", "pipe"])
def test_row7_only_regular_files_are_opened(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(path)


def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_formats_we_cannot_read_are_listed_but_refused_when_read(tmp_path: Path) -> None:
    tensor = torch.zeros(4).to(torch.float8_e4m3fn)
    path = tmp_path / "model.safetensors"
    save_file({"w": tensor}, path)
    file = SafetensorsFile(path)
    assert (file.tensors["w"].storage, file.tensors["w"].shape) == ("F8_E4M3", (4,))
    with pytest.raises(CheckpointError, match="'w': stored as F8_E4M3; we read F64, F32"):
        file.read_into("w", torch.empty(4))


def test_reads_that_do_not_fit_are_refused(saved: Any) -> None:
    file, _ = saved
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        file.read_into("absent", torch.empty(1))
    with pytest.raises(CheckpointError, match=r"'cube': has the shape \[3, 4, 5\], asked for as \[60\]"):
        file.read_into("cube", torch.empty(60))
    with pytest.raises(CheckpointError, match=r"asked for as \[513, 1031\] transposed"):
        file.read_into("large", torch.empty(513, 1031), transpose=True)
    with pytest.raises(CheckpointError, match="only a matrix can be transposed"):
        file.read_into("cube", torch.empty(5, 4, 3), transpose=True)
    with pytest.raises(CheckpointError, match=r"stored as F32, asked for as torch\.int32"):
        file.read_into("cube", torch.empty(3, 4, 5, dtype=torch.int32))


def test_reading_after_close_is_an_error_and_closing_twice_is_not(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path, encoded({"w": entry()}, bytes(8))))
    file.close()
    file.close()
    with pytest.raises(CheckpointError, match="closed"):
        file.read_into("w", torch.empty(2))


PEAK = """
import sys, torch
from handloom.checkpoint.safetensors import SafetensorsFile
from pathlib import Path
def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
torch.zeros(4, dtype=torch.bfloat16).float()
file = SafetensorsFile(Path(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
held = {name: torch.empty(info.shape) for name, info in file.tensors.items()}
for name, out in held.items():
    file.read_into(name, out)
print((status("VmHWM") - before) / sum(out.nbytes for out in held.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_that_of_the_weights_as_held(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"w{i}": torch.ones(4096, 2048, dtype=dtype) for i in range(3)}, path)
    result = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.2
