"""Quantised GGUF blocks to float32, bit for bit as `gguf.dequantize` does it, several times as fast; or to planes.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Storage
from numpy.typing import NDArray

from handloom.checkpoint.quantization import FORMATS, QuantizedRows
from handloom.errors import CheckpointError

CHUNK_ELEMENTS = 2**18
"""A good number of weights to pass at once: 1 MiB of float32, measured on SmolLM2 from 2^16 to 2^20."""

FLOATS = {Storage.F32: torch.float32, Storage.F16: torch.float16, Storage.BF16: torch.bfloat16}

_Bytes = NDArray[np.uint8]
_Fields = NDArray[np.void]


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


class _Parts(NamedTuple):
    """Blocks taken apart: codes [n, block], one a byte; integers of the groups, [n, groups]; halves as float16 [n, 1].

    minimum: a half, to be added, or integers of the groups, to be multiplied by super_minimum and subtracted.
    """

    codes: NDArray[Any]
    scale: NDArray[Any]
    minimum: NDArray[Any] | None = None
    super_scale: NDArray[np.float16] | None = None
    super_minimum: NDArray[np.float16] | None = None


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
    with np.errstate(all="ignore"):  # a scale that is NaN or infinite gives NaN, quietly, as in torch
        b = _UNPACKERS[storage](np.frombuffer(raw, _LAYOUTS[storage]))
        scale, minimum = _f32(b.scale), None if b.minimum is None else _f32(b.minimum)
        if b.super_scale is not None:
            scale = _f32(b.super_scale) * scale
        if b.super_minimum is not None and minimum is not None:
            minimum = -(_f32(b.super_minimum) * minimum)
        zero = ZEROS.get(storage)
        codes = b.codes if zero is None else b.codes.view(np.int8) - np.int8(zero)
        _scale(codes, scale, minimum, out.view(len(codes), -1))


def take_apart(storage: Storage, raw: bytearray | memoryview, out: QuantizedRows) -> None:
    """Write the blocks that `raw` holds into `out`, whose format is that of `storage`; nothing is lost.

    Raises CheckpointError where a scale or minimum is NaN or infinite.
    """
    b = _UNPACKERS[storage](np.frombuffer(raw, _LAYOUTS[storage]))
    halves = (b.scale, b.minimum, b.super_scale, b.super_minimum)
    if not all(np.isfinite(half).all() for half in halves if half is not None and half.dtype == np.float16):
        raise CheckpointError("a scale is NaN or infinite")
    codes = torch.from_numpy(b.codes).view(len(out), -1)
    if out.format.bits == 8:
        out.low.copy_(codes)
    else:
        pairs = codes & 15
        out.low.copy_(pairs[:, 0::2] | pairs[:, 1::2] << 4)
    if out.high is not None:
        width = out.format.bits - 4
        high = (codes >> 4).view(len(out), -1, 8 // width) << torch.arange(0, 8, width, dtype=torch.uint8, device="cpu")
        out.high.copy_(high.sum(-1, dtype=torch.uint8))
    for plane, values in zip((out.scale, out.minimum, out.super_scale, out.super_minimum), halves, strict=True):
        if plane is not None and values is not None:
            plane.copy_(torch.from_numpy(values).view(plane.shape))


def _q2_k(b: _Fields) -> _Parts:
    scales = _bytes(b, "scales")
    return _Parts(_planes(_bytes(b, "qs"), 32, 2), scales & 15, scales >> 4, _half(b, "d"), _half(b, "dmin"))


def _q3_k(b: _Fields) -> _Parts:
    packed = _bytes(b, "scales")
    scales = _planes(packed[:, :8], 8, 4) | _planes(packed[:, 8:], 4, 2) << np.uint8(4)
    high = _planes(_bytes(b, "hmask"), 32, 1) << np.uint8(2)
    codes = _planes(_bytes(b, "qs"), 32, 2) | high
    return _Parts(codes, scales.view(np.int8) - np.int8(32), super_scale=_half(b, "d"))


def _q5_k(b: _Fields) -> _Parts:
    high = _planes(_bytes(b, "qh"), 32, 1) << np.uint8(4)
    return _Parts(_planes(_bytes(b, "qs"), 32, 4) | high, *_k_scales(b), _half(b, "d"), _half(b, "dmin"))


def _q6_k(b: _Fields) -> _Parts:
    high = _planes(_bytes(b, "qh"), 32, 2) << np.uint8(4)
    codes = _planes(_bytes(b, "ql"), 64, 4) | high
    return _Parts(codes, _bytes(b, "scales").view(np.int8), super_scale=_half(b, "d"))


def _q5(b: _Fields) -> _Bytes:
    """[n, 32]: four bits from `qs`, the fifth from bit i of the 32-bit number `qh`."""
    high = np.unpackbits(_bytes(b, "qh"), axis=1, bitorder="little")
    return _planes(_bytes(b, "qs"), 16, 4) | high << np.uint8(4)


def _k_scales(b: _Fields) -> tuple[_Bytes, _Bytes]:
    """Scale and minimum of the eight groups of Q4_K and Q5_K, each [n, 8]: 6-bit integers in 12 bytes.

    Bytes 0-3 and 4-7 have the low six bits of scales 0-3 and minima 0-3; their top two bits, and the nibbles of
    bytes 8-11, make scales and minima 4-7.
    """
    low, mid, high = np.split(_bytes(b, "scales"), 3, axis=1)
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | (mid >> 2 & 48)], axis=1)
    return scales, minima


def _bytes(blocks: _Fields, field: str) -> _Bytes:
    """A field's bytes, contiguous: [n, width]."""
    return np.ascontiguousarray(blocks[field]).view(np.uint8).reshape(len(blocks), -1)


def _half(blocks: _Fields, field: str) -> NDArray[np.float16]:
    """A half-precision field: [n, 1]."""
    return np.ascontiguousarray(blocks[field], dtype=np.float16)[:, None]


def _f32(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32)


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


_UNPACKERS: dict[Storage, Callable[[_Fields], _Parts]] = {
    Storage.Q4_0: lambda b: _Parts(_planes(_bytes(b, "qs"), 16, 4), _half(b, "d")),
    Storage.Q4_1: lambda b: _Parts(_planes(_bytes(b, "qs"), 16, 4), _half(b, "d"), _half(b, "m")),
    Storage.Q5_0: lambda b: _Parts(_q5(b), _half(b, "d")),
    Storage.Q5_1: lambda b: _Parts(_q5(b), _half(b, "d"), _half(b, "m")),
    Storage.Q8_0: lambda b: _Parts(_bytes(b, "qs").view(np.int8), _half(b, "d")),
    Storage.Q2_K: _q2_k,
    Storage.Q3_K: _q3_k,
    Storage.Q4_K: lambda b: _Parts(_planes(_bytes(b, "qs"), 32, 4), *_k_scales(b), _half(b, "d"), _half(b, "dmin")),
    Storage.Q5_K: _q5_k,
    Storage.Q6_K: _q6_k,
}
ZEROS = {Storage[name]: format.zero for name, format in FORMATS.items() if format.zero} | {Storage.Q3_K: 4}
"""The code of weight 0, where that is not 0."""
SUPPORTED = frozenset(FLOATS) | frozenset(_UNPACKERS)
"""The ggml types that can be read."""
