"""Quantised matrices: GGUF's blocks held without loss, float weights rounded to codes, and models made of both."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Storage
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import HALVES, random_blocks
from handloom.checkpoint.gguf_dequant import take_apart
from handloom.checkpoint.quantization import FORMATS, QuantizedMatrix, QuantizedRows
from handloom.checkpoint.quantize import Scheme, quantize_rows
from handloom.errors import CheckpointError, InvalidParam

SCHEMES = ["int8", "int8:32", "int8:64", "int8:128", "int4", "int4:64", "int4:128", "int4-sym", "int4-sym:64"]
SCALE_INTEGERS_TAKE_BYTES = {"Q4_K": 4, "Q5_K": 4}
"""Bytes by which 256 columns are larger in planes: sixteen 6-bit integers, a byte each."""


def in_planes(name: str, blocks: np.ndarray, rows: int) -> QuantizedRows:
    columns = len(blocks) // rows * gguf.GGML_QUANT_SIZES[Storage[name]][0]
    out = QuantizedRows.empty(FORMATS[name], rows, columns)
    for _, plane in out.planes():
        plane.view(torch.uint8).fill_(0xA5)
    take_apart(Storage[name], bytearray(blocks.tobytes()), out)
    return out


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), per_row=st.integers(1, 5))
def test_planes_give_the_floats_of_gguf_bit_for_bit(name: str, seed: int, rows: int, per_row: int) -> None:
    blocks = random_blocks(name, rows * per_row, seed)
    held = in_planes(name, blocks, rows)
    expected = gguf.dequantize(blocks, Storage[name]).astype(np.float32).reshape(rows, -1)
    matrix = QuantizedMatrix((held,))
    assert np.array_equal(matrix.matrix().numpy().view(np.uint32), expected.view(np.uint32))
    some = torch.tensor([rows - 1, 0, rows // 2])
    assert torch.equal(matrix[some], torch.from_numpy(expected)[some])


@pytest.mark.parametrize("name", FORMATS)
def test_planes_take_the_bytes_of_the_blocks(name: str) -> None:
    columns = 768
    size, nbytes = gguf.GGML_QUANT_SIZES[Storage[name]]
    expected = 3 * (columns // size * nbytes + columns // 256 * SCALE_INTEGERS_TAKE_BYTES.get(name, 0))
    assert QuantizedRows.empty(FORMATS[name], 3, columns).nbytes == FORMATS[name].nbytes(3, columns) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_that_is_no_number_is_an_error(name: str, bad: float) -> None:
    for position in HALVES[name]:
        blocks = random_blocks(name, 6)
        blocks[4, position : position + 2] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
        with pytest.raises(CheckpointError, match="a scale is NaN or infinite"):
            in_planes(name, blocks, 2)


# From floats -----------------------------------------------------------------------------------


def quantized(scheme: str, weights: torch.Tensor) -> QuantizedRows:
    out = QuantizedRows.empty(Scheme.parse(scheme).format, *weights.shape)
    for _, plane in out.planes():
        plane.view(torch.uint8).fill_(0xA5)
    quantize_rows(weights, out)
    return out


def restored(held: QuantizedRows) -> torch.Tensor:
    return QuantizedMatrix((held,)).matrix()


@pytest.mark.parametrize("name", SCHEMES)
def test_no_weight_that_is_not_clipped_is_off_by_more_than_half_a_step(name: str) -> None:
    weights = torch.randn(13, 384, generator=torch.Generator().manual_seed(0))
    held = quantized(name, weights)
    scale = held.scale.double().abs().repeat_interleave(held.columns // held.scale.shape[1], dim=1)
    codes = held.codes().to(torch.int16)
    inside = codes.abs() < 127 if held.format.bits == 8 else (codes > 0) & (codes < 15)
    error = (restored(held).double() - weights.double()).abs()
    assert inside.float().mean() > 0.8
    assert bool((error[inside] <= scale[inside] * 0.5001).all())


@pytest.mark.parametrize("scheme", ["int4", "int4-sym"])
def test_four_bits_err_less_than_with_the_scale_of_the_largest_weight(scheme: str) -> None:
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    plain = torch.from_numpy(gguf.dequantize(gguf.quantize(weights.numpy(), Storage.Q4_0), Storage.Q4_0))
    assert (restored(quantized(scheme, weights)) - weights).square().mean() < 0.95 * (plain - weights).square().mean()


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros_and_a_constant_row_keeps_its_value(name: str) -> None:
    weights = torch.zeros(3, 128)
    weights[1], weights[2, 5] = 0.25, -3.0
    got = restored(quantized(name, weights))
    assert torch.equal(got[0], weights[0])
    assert torch.allclose(got[1], weights[1], rtol=0.04)
    assert got[2].count_nonzero() == 1
    assert got[2, 5].item() == pytest.approx(-3.0, rel=0.05)


def test_rows_of_eight_bits_may_have_any_length() -> None:
    weights = torch.randn(5, 37, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(restored(quantized("int8", weights)), weights, atol=weights.abs().max().item() / 250)


@pytest.mark.parametrize("name", ["int8", "int8:32", "int4", "int4-sym"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_cannot_be_quantised(name: str, bad: float) -> None:
    weights = torch.ones(4, 64)
    weights[2, 40] = bad
    with pytest.raises(CheckpointError, match="NaN, infinite or too large"):
        quantized(name, weights)


def test_weights_beyond_the_range_of_a_half_cannot_be_quantised_in_groups() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        quantized("int4", torch.full((1, 64), 1e8))
    assert torch.allclose(restored(quantized("int8", torch.full((1, 64), 1e8))), torch.tensor(1e8))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_spelled_as_it_is_read(name: str) -> None:
    scheme = Scheme.parse(name)
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize(
    "text", ["", "int3", "int8:", "int8:16", "int4:0", "int4:256", "INT8", "int8-sym", "int8:32:32"]
)
def test_another_spelling_is_an_error_that_says_what_there_is(text: str) -> None:
    with pytest.raises(InvalidParam, match="expected 'int8'"):
        Scheme.parse(text)
