"""Dequantisation, bit for bit against the gguf package."""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Storage
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import random_blocks
from handloom.checkpoint.gguf_dequant import SUPPORTED, dequantize

NAMES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K"


def same_as_gguf(storage: Storage, blocks: np.ndarray) -> bool:
    """Bits equal where the number is one; NaN where the oracle has NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = gguf.dequantize(blocks, storage).astype(np.float32).reshape(-1)
    out = torch.full((expected.size,), 7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dequantize(storage, bytearray(blocks.tobytes()), out)
    got, nan = out.numpy(), np.isnan(expected)
    return bool(np.isnan(got[nan]).all() and np.array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32)))


def test_the_supported_types_are_these() -> None:
    assert {storage.name for storage in SUPPORTED} == set(NAMES.split())


@pytest.mark.parametrize("name", NAMES.split())
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 70))
def test_random_bytes_become_the_floats_that_gguf_makes_of_them(name: str, seed: int, count: int) -> None:
    storage = Storage[name]
    blocks = np.random.default_rng(seed).integers(0, 256, (count, gguf.GGML_QUANT_SIZES[storage][1]), np.uint8)
    assert same_as_gguf(storage, blocks)


@pytest.mark.parametrize("name", NAMES.split()[3:])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 70))
def test_blocks_with_ordinary_scales_become_the_floats_that_gguf_makes_of_them(
    name: str, seed: int, count: int
) -> None:
    storage, blocks = Storage[name], random_blocks(name, count, seed)
    assert np.isfinite(gguf.dequantize(blocks, storage)).all()
    assert same_as_gguf(storage, blocks)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_come_back_as_gguf_brings_them_back(name: str) -> None:
    weights = np.random.default_rng(3).normal(size=(33, 96)).astype(np.float32)
    assert same_as_gguf(Storage[name], gguf.quantize(weights, Storage[name]))
