"""Quantised GGUF blocks to float32, bit for bit as `gguf.dequantize` does it, several times as fast.

A row of weights is cut into blocks of 32 or 256; a block holds small integers `q` and what turns them back
into weights: `d * q`, `d * q + m`, or in the K types, where groups of 16 or 32 have integer scales of their own,
`(d * scale) * q - (dmin * min)`. The layouts are those of ggml
(https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h); `_LAYOUTS` spells them out. The order
of the float32 operations is part of the meaning: it decides the last bit.

Speed comes from three habits. Integers are unpacked for a whole field at a time and moved in items as wide as the
field's group (NumPy's void types), never in inner loops of 16 bytes. Conversion and scaling happen in place, in
the caller's buffer. And callers pass pieces that fit the processor's cache: see `CHUNK_ELEMENTS`.

This module does not know files, names or shapes: only blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Storage
from numpy.typing import NDArray

CHUNK_ELEMENTS = 2**18
"""A good number of weights to pass at once: 1 MiB of float32, measured on SmolLM2 from 2^16 to 2^20."""

FLOATS = {Storage.F32: torch.float32, Storage.F16: torch.float16, Storage.BF16: torch.bfloat16}

_Bytes = NDArray[np.uint8]
_Fields = NDArray[np.void]
_Unpack = Callable[[_Fields, torch.Tensor], None]


def _layout(*fields: tuple[str, str]) -> np.dtype[np.void]:
    return np.dtype(list(fields))


_LAYOUTS = {
    Storage.Q4_0: _layout(("d", "<f2"), ("qs", "V16")),
    Storage.Q4_1: _layout(("d", "<f2"), ("m", "<f2"), ("qs", "V16")),
    Storage.Q5_0: _layout(("d", "<f2"), ("qh", "V4"), ("qs", "V16")),
    Storage.Q5_1: _layout(("d", "<f2"), ("m", "<f2"), ("qh", "V4"), ("qs", "V16")),
    Storage.Q8_0: _layout(("d", "<f2"), ("qs", "V32")),
    Storage.Q2_K: _layout(("scales", "V16"), ("qs", "V64"), ("d", "<f2"), ("dmin", "<f2")),
    Storage.Q3_K: _layout(("hmask", "V32"), ("qs", "V64"), ("scales", "V12"), ("d", "<f2")),
    Storage.Q4_K: _layout(("d", "<f2"), ("dmin", "<f2"), ("scales", "V12"), ("qs", "V128")),
    Storage.Q5_K: _layout(("d", "<f2"), ("dmin", "<f2"), ("scales", "V12"), ("qh", "V32"), ("qs", "V128")),
    Storage.Q6_K: _layout(("ql", "V128"), ("qh", "V64"), ("scales", "V16"), ("d", "<f2")),
}


def dequantize(storage: Storage, raw: bytearray | memoryview, out: torch.Tensor) -> None:
    """Write the weights that `raw` holds into `out`.

    Args:
        storage: one of `SUPPORTED`.
        raw: whole blocks, in memory that may be written to (torch insists; nothing is written).
        out: float32 on the CPU, contiguous, with exactly as many elements as `raw` holds.
    """
    if storage in FLOATS:
        out.view(-1).copy_(torch.frombuffer(raw, dtype=FLOATS[storage]))
        return
    blocks = np.frombuffer(raw, _LAYOUTS[storage])
    with np.errstate(all="ignore"):  # a scale that is NaN or infinite gives NaN, quietly, as in torch
        _UNPACKERS[storage](blocks, out.view(len(blocks), -1))


def _q4_0(b: _Fields, out: torch.Tensor) -> None:
    _scale(_planes(_bytes(b, "qs"), 16, 4).view(np.int8) - np.int8(8), _f32(b, "d"), None, out)


def _q4_1(b: _Fields, out: torch.Tensor) -> None:
    _scale(_planes(_bytes(b, "qs"), 16, 4), _f32(b, "d"), _f32(b, "m"), out)


def _q5_0(b: _Fields, out: torch.Tensor) -> None:
    _scale(_q5(b).view(np.int8) - np.int8(16), _f32(b, "d"), None, out)


def _q5_1(b: _Fields, out: torch.Tensor) -> None:
    _scale(_q5(b), _f32(b, "d"), _f32(b, "m"), out)


def _q8_0(b: _Fields, out: torch.Tensor) -> None:
    _scale(_bytes(b, "qs").view(np.int8), _f32(b, "d"), None, out)


def _q2_k(b: _Fields, out: torch.Tensor) -> None:
    scales = _bytes(b, "scales")
    _scale(
        _planes(_bytes(b, "qs"), 32, 2),
        _f32(b, "d") * (scales & 15).astype(np.float32),
        -(_f32(b, "dmin") * (scales >> 4).astype(np.float32)),
        out,
    )


def _q3_k(b: _Fields, out: torch.Tensor) -> None:
    packed = _bytes(b, "scales")
    scales = _planes(packed[:, :8], 8, 4) | _planes(packed[:, 8:], 4, 2) << np.uint8(4)
    high = _planes(_bytes(b, "hmask"), 32, 1) << np.uint8(2)
    q = (_planes(_bytes(b, "qs"), 32, 2) | high).view(np.int8) - np.int8(4)
    _scale(q, _f32(b, "d") * (scales.view(np.int8) - np.int8(32)).astype(np.float32), None, out)


def _q4_k(b: _Fields, out: torch.Tensor) -> None:
    _scale(_planes(_bytes(b, "qs"), 32, 4), *_k_scales(b), out)


def _q5_k(b: _Fields, out: torch.Tensor) -> None:
    high = _planes(_bytes(b, "qh"), 32, 1) << np.uint8(4)
    _scale(_planes(_bytes(b, "qs"), 32, 4) | high, *_k_scales(b), out)


def _q6_k(b: _Fields, out: torch.Tensor) -> None:
    high = _planes(_bytes(b, "qh"), 32, 2) << np.uint8(4)
    q = (_planes(_bytes(b, "ql"), 64, 4) | high).view(np.int8) - np.int8(32)
    _scale(q, _f32(b, "d") * _bytes(b, "scales").view(np.int8).astype(np.float32), None, out)


def _q5(b: _Fields) -> _Bytes:
    """[n, 32]: four bits from `qs`, the fifth from bit i of the 32-bit number `qh`."""
    high = np.unpackbits(_bytes(b, "qh"), axis=1, bitorder="little")
    return _planes(_bytes(b, "qs"), 16, 4) | high << np.uint8(4)


def _k_scales(b: _Fields) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and (negated) minimum of the eight groups of Q4_K and Q5_K, each [n, 8]: 6-bit integers in 12 bytes.

    Bytes 0-3 and 4-7 have the low six bits of scales 0-3 and minima 0-3; their top two bits, and the nibbles of
    bytes 8-11, make scales and minima 4-7.
    """
    low, mid, high = np.split(_bytes(b, "scales"), 3, axis=1)
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | (mid >> 2 & 48)], axis=1)
    return _f32(b, "d") * scales.astype(np.float32), -(_f32(b, "dmin") * minima.astype(np.float32))


def _bytes(blocks: _Fields, field: str) -> _Bytes:
    """A field's bytes, contiguous: [n, width]."""
    return np.ascontiguousarray(blocks[field]).view(np.uint8).reshape(len(blocks), -1)


def _f32(blocks: _Fields, field: str) -> NDArray[np.float32]:
    """A half-precision field as float32: [n, 1]."""
    return np.asarray(blocks[field].astype(np.float32)[:, None])


def _planes(packed: _Bytes, width: int, bits: int) -> _Bytes:
    """Small integers out of bytes: [n, k] to [n, k * 8 // bits].

    The bytes are taken in groups of `width`. A group's lowest `bits` come first, all `width` of them, then the next
    higher ones, and so on.
    """
    planes = 8 // bits
    item = f"V{width}"
    packed = np.ascontiguousarray(packed)
    out = np.empty((packed.size // width, planes), item)
    for plane in range(planes):
        values = packed >> np.uint8(plane * bits) & np.uint8(2**bits - 1)
        out[:, plane] = values.reshape(-1).view(item)
    return out.view(np.uint8).reshape(len(packed), -1)


def _scale(q: NDArray[Any], scale: NDArray[np.float32], minimum: NDArray[np.float32] | None, out: torch.Tensor) -> None:
    """`out = scale * q + minimum`: q [n, block], scale and minimum [n, groups], out [n, block], rounded twice."""
    groups = out.view(*scale.shape, -1)
    groups.copy_(torch.from_numpy(q).view(groups.shape))
    groups.mul_(_spread(scale, groups))
    if minimum is not None:
        groups.add_(_spread(minimum, groups))


def _spread(values: NDArray[np.float32], groups: torch.Tensor) -> torch.Tensor:
    """One value per group, to be broadcast; written out for groups of 16, which torch does not vectorise."""
    if groups.shape[-1] >= 32:
        return torch.from_numpy(values).unsqueeze(-1)
    return torch.from_numpy(np.repeat(values, groups.shape[-1], axis=1)).view(groups.shape)


_UNPACKERS: dict[Storage, _Unpack] = {
    Storage.Q4_0: _q4_0,
    Storage.Q4_1: _q4_1,
    Storage.Q5_0: _q5_0,
    Storage.Q5_1: _q5_1,
    Storage.Q8_0: _q8_0,
    Storage.Q2_K: _q2_k,
    Storage.Q3_K: _q3_k,
    Storage.Q4_K: _q4_k,
    Storage.Q5_K: _q5_k,
    Storage.Q6_K: _q6_k,
}
SUPPORTED = frozenset(FLOATS) | frozenset(_UNPACKERS)
"""The ggml types that can be read."""
