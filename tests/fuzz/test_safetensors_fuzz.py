"""Mutated safetensors bytes: only CheckpointError may come out, and what the real library reads, we read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom.checkpoint.safetensors import READABLE, SafetensorsFile
from handloom.errors import CheckpointError

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
assert {name: dtype.itemsize for name, dtype in READABLE.items()} == SIZES

STRICTER = ("is given twice", "must have exactly dtype, shape and data_offsets", "does not begin with", "< 2^63")
"""What we refuse on purpose though the real library may accept it: ambiguous or ill-formed headers, and shapes that no
tensor of torch has."""

numbers = st.integers(0, 40) | st.integers(-3, 2**70) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1])
junk = st.recursive(
    st.none() | st.booleans() | numbers | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def honest(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header and its bytes as they should be."""
    header: dict[str, Any] = {}
    data = b""
    for name in draw(st.lists(st.text(max_size=6), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        count = SIZES[dtype]
        for dimension in shape:
            count *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + count]}
        data += draw(st.binary(min_size=count, max_size=count))
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    return header, data


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """An honest file, or one whose header, length or bytes were tampered with."""
    header, data = draw(honest())
    names = sorted(header)
    if names and draw(st.booleans()):
        name = draw(st.sampled_from(names))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]))
        value = draw(
            junk | st.lists(numbers, min_size=1, max_size=3) | st.sampled_from(["F4", "F8_E4M3", "U64", "C64"])
        )
        if field is None or not isinstance(header[name], dict):
            header[name] = value
        else:
            header[name][field] = value
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    text += b" " * draw(st.integers(0, 8))
    content = bytearray(len(text).to_bytes(8, "little") + text + data)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        position = draw(st.integers(0, len(content) - 1))
        content[position] = draw(st.integers(0, 255) | st.sampled_from(b'{}[]:,"0123456789- '))
    kept = draw(st.sampled_from([len(content)] * 4) | st.integers(0, len(content)))
    return bytes(content[:kept]) + draw(st.just(b"") | st.binary(max_size=4))


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Every readable tensor, as stored and (for the floating ones) converted: both ways of reading are taken."""
    file = SafetensorsFile(path)
    try:
        tensors = {}
        for name, info in file.tensors.items():
            if info.storage in READABLE:
                dtype = READABLE[info.storage]
                tensors[name] = torch.empty(info.shape, dtype=dtype)
                file.read_into(name, tensors[name])
                if dtype.is_floating_point:
                    converted = torch.empty(info.shape, dtype=torch.float64)
                    file.read_into(name, converted)
                    assert torch.equal(converted.nan_to_num(), tensors[name].double().nan_to_num())
        return tensors
    finally:
        file.close()


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def real_library(content: bytes) -> list[tuple[str, dict[str, Any]]] | None:
    """What the format's own library makes of the bytes; None if it refuses them."""
    try:
        return safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None


@settings(max_examples=400, deadline=None)
@given(content=files())
def test_row7_only_checkpoint_errors_and_the_same_tensors_as_the_real_library(
    content: bytes, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    expected = real_library(content)
    try:
        ours = read_all(path)
    except CheckpointError as error:
        assert expected is None or any(reason in str(error) for reason in STRICTER), error
        return
    assert expected is not None, "the real library refuses what we read"
    readable = {name: view for name, view in expected if view["dtype"] in READABLE}
    assert ours.keys() == readable.keys()
    for name, tensor in ours.items():
        view = readable[name]
        assert list(tensor.shape) == view["shape"]
        stored = bytes(view["data"])
        assert as_bytes(tensor) == (bytes(map(bool, stored)) if tensor.dtype is torch.bool else stored)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=64) | st.binary(max_size=64).map(lambda data: b"\x10" + bytes(7) + data))
def test_row7_random_bytes_give_only_checkpoint_errors(content: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    try:
        read_all(path)
    except CheckpointError:
        return
    assert real_library(content) is not None
