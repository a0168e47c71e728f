"""quantized_linear.py: packing loses nothing, scales and zeros are where they belong, the kernel is exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from handloom_kernels import quantized_linear as kernels
from handloom_kernels import reference, weight_bits
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import (
    ACTIVATIONS,
    NORM_KINDS,
    Norm,
    QuantizedWeight,
    dequantize_weight,
    pack_codes,
    unpack_codes,
)
from handloom_kernels.reference.quantized_linear import BLOCK_K
from kernel_testing import DEVICE, DTYPES, HALF, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw

BLOCKS = {"BLOCK_N": 32, "SLICES": 2, "num_warps": 2, "num_stages": 2}
NUM_CODES = {"int4": 16, "int8": 256, "fp8": 256}
FORMS: list[dict[str, Any]] = [
    {"kind": "int8"},
    {"kind": "int8", "group_size": 32},
    {"kind": "int8", "group_size": 128},
    {"kind": "int4"},
    {"kind": "int4", "group_size": 128},
    {"kind": "int4", "group_size": 64, "symmetric": False},
    {"kind": "int4", "group_size": 32},
    {"kind": "int4", "group_size": 32, "symmetric": False},
    {"kind": "int4", "symmetric": False},
    {"kind": "fp8"},
    {"kind": "fp8", "scale_rows": 1000},
    {"kind": "fp8", "group_size": 128, "scale_rows": 128},
]


def quantized(rows: int, depth: int, dtype: torch.dtype = torch.float32, **form: Any) -> QuantizedWeight:
    return reference.quantize_weight(draw(rows, depth, dtype=dtype), **form)


def name(form: dict[str, Any]) -> str:
    return " ".join(f"{key[0]}={value}" for key, value in form.items())


@pytest.mark.parametrize("shape", [(16, 64), (1, 1), (37, 100), (48, 130)])
@pytest.mark.parametrize("kind", NUM_CODES)
def test_packing_and_unpacking_are_inverses(kind: str, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, NUM_CODES[kind], shape, dtype=torch.uint8)
    data = pack_codes(codes, kind)
    assert torch.equal(unpack_codes(data, kind, shape), codes)
    assert torch.equal(pack_codes(unpack_codes(data, kind, shape), kind), data)


@pytest.mark.parametrize("kind", NUM_CODES)
def test_a_code_lies_where_the_layout_says(kind: str) -> None:
    largest, depth = NUM_CODES[kind] - 1, BLOCK_K[kind]
    for row, column in ((0, 0), (3, 5), (9, 1), (13, 30), (24, 70)):
        codes = torch.zeros(32, 128, dtype=torch.uint8)
        codes[row, column] = largest
        lane = 4 * (row % 8) + column // 2 % 4
        if kind == "int4":
            part, bit = column % depth // 16, 16 * (column % 2) + 8 * (column // 8 % 2) + 4 * (row // 8 % 2)
        else:
            part, bit = 2 * (column % depth // 16) + column // 8 % 2, 16 * (column % 2) + 8 * (row // 8 % 2)
        expected = torch.zeros(2, 128 // depth, 128, dtype=torch.int64)
        expected[row // 16, column // depth, 4 * lane + part] = largest << bit
        assert torch.equal(pack_codes(codes, kind), expected.to(torch.int32))


@pytest.mark.parametrize("kind", NUM_CODES)
def test_every_code_is_read_back_by_the_formulas_of_the_layout(kind: str) -> None:
    """Word and bits of each row and column as the text of the reference gives them, without any of its code."""
    rows, depth = 37, 200
    codes = torch.randint(0, NUM_CODES[kind], (rows, depth), dtype=torch.uint8)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(depth), indexing="ij")
    lane, columns = 4 * (row % 8) + column // 2 % 4, 64 if kind == "int4" else 32
    within = column % columns
    if kind == "int4":
        part, bits = within // 16, 16 * (column % 2) + 8 * (column // 8 % 2) + 4 * (row // 8 % 2)
    else:
        part, bits = 2 * (within // 16) + column // 8 % 2, 16 * (column % 2) + 8 * (row // 8 % 2)
    words = pack_codes(codes, kind)[row // 16, column // columns, 4 * lane + part].long()
    assert torch.equal((words >> bits) & (NUM_CODES[kind] - 1), codes.long())


def test_the_error_of_four_bits_is_that_of_a_uniform_quantiser() -> None:
    """Its error is spread evenly over a step: step / sqrt(12). The largest of 128 normal numbers is 2.79 in the root
    mean square, which makes the step 2.79 / 7 and the error 0.115 of the weight's own."""
    weight = torch.randn(512, 1024)
    q = reference.quantize_weight(weight, "int4", 128)
    error = (dequantize_weight(q, torch.float32) - weight).square().mean().sqrt().item()
    assert math.isclose(error, q.scales.square().mean().div(12).sqrt().item(), rel_tol=0.01)
    assert math.isclose(error, 0.115, rel_tol=0.02)
    for form, expected in (
        ({"kind": "int8"}, quantized(512, 1024, kind="int8").scales.square().mean().div(12).sqrt().item()),
        ({"kind": "fp8"}, 0.0264),  # 3 bits after the first: even over 1/8 of a power of two
    ):
        error = (dequantize_weight(reference.quantize_weight(weight, **form), torch.float32) - weight).std().item()
        assert math.isclose(error, expected, rel_tol=0.02)


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_no_weight_is_further_than_half_a_step(form: dict[str, Any]) -> None:
    weight = torch.randn(150, 300) + 0.5
    q = reference.quantize_weight(weight, **form)
    error = (dequantize_weight(q, torch.float64) - weight).abs()
    columns = torch.arange(300) // (q.group_size or 300)
    step = q.scales[columns][:, torch.arange(150) // q.scale_rows].T.double()
    allowed = torch.maximum(weight.abs() / 16, step / 1024) if q.kind == "fp8" else step / 2
    # the smallest and the largest of an asymmetric group may lie half a step outside, since zero is a whole code
    assert (error <= allowed * (1 if q.zeros is None else 2) + 1e-6).all()
    assert reference.quantize_weight(torch.zeros(3, 70), **form).data.is_contiguous()
    assert not dequantize_weight(reference.quantize_weight(torch.zeros(3, 70), **form), torch.float32).any()


def test_what_cannot_be_quantised_is_named() -> None:
    weight = torch.randn(4, 64)
    for form, message in (
        ({"kind": "int3"}, "kind is 'int3'"),
        ({"kind": "int4", "group_size": 48}, "group_size is 48; there are 0, 32, 64, 128"),
        ({"kind": "int8", "symmetric": False}, "only int4"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.quantize_weight(weight, **form)
    with pytest.raises(ValueError, match="not finite"):
        reference.quantize_weight(weight / 0, "int8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=name)
def test_quantized_linear(form: dict[str, Any], dtype: torch.dtype) -> None:
    for rows, depth, num_rows in ((70, 200, 3), (16, 128, 1)):
        x, q = draw(num_rows, depth, dtype=dtype), quantized(rows, depth, dtype, **form)
        bias, residual = draw(rows), draw(num_rows, rows, dtype=dtype)
        ours = kernels.quantized_linear(x, q, bias.to(dtype), residual, blocks=BLOCKS)
        assert_as_exact_as(reference.quantized_linear, x, q, bias.to(dtype), residual, ours=ours)


@pytest.mark.parametrize("rows, depth, num_rows", [(1, 1, 1), (17, 63, 16), (100, 100, 17), (33, 1000, 2)])
def test_odd_sizes(rows: int, depth: int, num_rows: int) -> None:
    for kind, group in (("int8", 0), ("int4", 32), ("fp8", 128)):
        x, q = draw(num_rows, depth, dtype=HALF), quantized(rows, depth, HALF, kind=kind, group_size=group)
        assert_as_exact_as(reference.quantized_linear, x, q, ours=kernels.quantized_linear(x, q, blocks=BLOCKS))


@pytest.mark.parametrize("kind, group", [("int4", 32), ("int8", 0)])
def test_the_default_blocks(kind: str, group: int) -> None:
    x, q = draw(2, 600, dtype=HALF), quantized(40, 600, HALF, kind=kind, group_size=group)
    assert_as_exact_as(reference.quantized_linear, x, q, ours=kernels.quantized_linear(x, q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NUM_CODES)
def test_every_code_is_decoded_exactly(kind: str, dtype: torch.dtype) -> None:
    """Each column of the identity as x reads one column of the weight; the fp8 codes of NaN are left out."""
    codes = torch.arange(NUM_CODES[kind], dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F] if kind == "fp8" else codes
    q = QuantizedWeight(kind, pack_codes(codes[:, None], kind), torch.ones(1, len(codes)), None, 0, (len(codes), 1))
    q = q._replace(data=q.data.to(DEVICE), scales=q.scales.to(DEVICE))
    ours = kernels.quantized_linear(torch.ones(1, 1, dtype=dtype, device=DEVICE), q, blocks=BLOCKS)
    assert torch.equal(ours[0], dequantize_weight(q, dtype)[:, 0])


@pytest.mark.parametrize("dtype, name", [(torch.float16, tl.float16), (torch.bfloat16, tl.bfloat16)], ids=str)
def test_the_bits_of_which_floats_are_made(dtype: torch.dtype, name: tl.dtype) -> None:
    """The arithmetic of `decode` in plain torch, since the interpreter has no bfloat16."""

    def floats(bits: Tensor) -> Tensor:
        return bits.to(torch.int16).view(dtype)

    one_apart, code = weight_bits.one_apart(name), torch.arange(256, dtype=torch.int32)
    assert torch.equal(floats(one_apart | code[:16]) - floats(one_apart | code[8]), (code[:16] - 8).to(dtype))
    signed = floats(one_apart | code & 0x7F) - floats(one_apart | code & 0x80)
    assert torch.equal(signed, code.to(torch.int8).to(dtype))
    moved = floats((code & 0x80) << 8 | (code & 0x7F) << weight_bits.fp8_shift(name)) * weight_bits.fp8_scale(name)
    numbers = code & 0x7F != 0x7F
    assert torch.equal(moved[numbers], code.to(torch.uint8).view(torch.float8_e4m3fn).to(dtype)[numbers])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[7], FORMS[11]], ids=name)
def test_a_row_does_not_depend_on_its_company(form: dict[str, Any]) -> None:
    x, q = draw(5, 300, dtype=HALF), quantized(40, 300, HALF, **form)
    assert_rows_do_not_depend_on_company(lambda rows: kernels.quantized_linear(x[rows], q, blocks=BLOCKS), 5)


def test_rows_may_lie_apart() -> None:
    x, residual, q = draw(3, 200)[:, 20:120], draw(3, 99)[:, 8:48], quantized(40, 100, kind="int8")
    ours = kernels.quantized_linear(x, q, None, residual, blocks=BLOCKS)
    assert torch.equal(ours, kernels.quantized_linear(x.contiguous(), q, None, residual.contiguous(), blocks=BLOCKS))


@pytest.mark.parametrize(
    "gated, activation", [(True, "silu"), (True, "swiglu_oss"), *((False, a) for a in ACTIVATIONS)]
)
def test_quantized_norm_mlp(gated: bool, activation: str) -> None:
    hidden, norm = draw(3, 100, dtype=HALF), Norm("rms", 1 + draw(100, dtype=HALF, scale=0.3), None, 1e-5)
    q, bias = (
        quantized(96 if gated else 40, 100, HALF, kind="int4", group_size=32),
        draw(96 if gated else 40, dtype=HALF),
    )
    ours = kernels.quantized_norm_mlp(hidden, norm, q, bias, activation, gated, blocks=BLOCKS)
    assert_as_exact_as(reference.quantized_norm_mlp, hidden, norm, q, bias, activation, gated, ours=ours)


def some_norm(kind: str, width: int, dtype: torch.dtype = torch.float32) -> Norm:
    bias = draw(width, dtype=dtype) if kind == "layer" else None
    return Norm(kind, 1 + draw(width, dtype=dtype, scale=0.3), bias, 1e-5)


@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[5], FORMS[7], FORMS[11]], ids=name)
def test_every_norm_before_every_form(form: dict[str, Any], kind: str) -> None:
    for dtype in DTYPES:
        for depth in (100, 256):
            args = draw(3, depth, dtype=dtype), some_norm(kind, depth, dtype), quantized(32, depth, dtype, **form)
            ours = kernels.quantized_norm_mlp(*args, None, "silu", True, blocks=BLOCKS)
            assert_as_exact_as(reference.quantized_norm_mlp, *args, None, "silu", True, ours=ours)


@pytest.mark.parametrize("num_rows, depth", [(1, 1), (17, 63), (2, 1000)])
def test_odd_sizes_and_the_default_blocks_of_an_mlp(num_rows: int, depth: int) -> None:
    for kind, group in (("int8", 0), ("int4", 32)):
        q = quantized(64, depth, HALF, kind=kind, group_size=group)
        args = draw(num_rows, depth, dtype=HALF), some_norm("rms", depth, HALF), q, None, "gelu", True
        assert_as_exact_as(reference.quantized_norm_mlp, *args, ours=kernels.quantized_norm_mlp(*args))


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_a_row_of_an_mlp_does_not_depend_on_its_company_not_even_on_nan(kind: str) -> None:
    hidden, norm, q = draw(18, 100), some_norm(kind, 100), quantized(32, 100, kind="int4", group_size=32)
    some = torch.tensor([0, 1, 15, 17], device=DEVICE)

    def run(rows: slice) -> Tensor:
        return kernels.quantized_norm_mlp(hidden[some][rows], norm, q, None, "silu", True, blocks=BLOCKS)

    assert_rows_do_not_depend_on_company(run, len(some))
    right = run(slice(None))
    hidden[[2, 16]] = torch.nan
    among_all = kernels.quantized_norm_mlp(hidden, norm, q, None, "silu", True, blocks=BLOCKS)
    assert torch.equal(among_all[some], right)
    assert among_all[[2, 16]].isnan().all()


def test_no_rows_are_fine() -> None:
    assert kernels.quantized_linear(draw(0, 64), quantized(16, 64, kind="int8")).shape == (0, 16)
    args = some_norm("rms", 64), quantized(64, 64, kind="int8"), None, "silu", True
    assert kernels.quantized_norm_mlp(draw(0, 64), *args).shape == (0, 32)


def test_what_does_not_fit_is_named() -> None:
    x, q = draw(2, 64), quantized(16, 64, kind="int4", group_size=32, symmetric=False)
    norm = Norm("rms", draw(64), None, 1e-5)
    assert q.zeros is not None
    wrong: list[tuple[QuantizedWeight, str]] = [
        (q._replace(kind="int2"), "q.kind is 'int2'"),
        (q._replace(group_size=16), "q.group_size is 16"),
        (q._replace(scale_rows=0), "q.scale_rows is 0"),
        (q._replace(shape=(0, 64)), r"q.shape is \(0, 64\)"),
        (q._replace(data=q.data[:, :, :64]), r"q.data has shape \[1, 1, 64\]; expected \[1, 1, 128\]"),
        (q._replace(data=q.data.float()), "q.data has dtype torch.float32"),
        (q._replace(scales=q.scales[:1]), r"q.scales has shape \[1, 16\]; expected \[2, 16\]"),
        (q._replace(zeros=q.zeros[:1]), "q.zeros has shape"),
        (quantized(16, 64, kind="int8")._replace(zeros=q.zeros), "codes of kind int8 have none"),
    ]
    for given, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.quantized_linear(x, given)
    for args, message in (
        ((draw(2, 63), q), r"x has shape \[2, 63\]; expected \[any, 64\]"),
        ((x, q, draw(15)), "bias has shape"),
        ((x, q, None, draw(2, 17)), "residual has shape"),
        ((x, q, None, draw(2, 16, dtype=torch.float16)), "residual has dtype"),
    ):
        with pytest.raises(KernelError, match=message):
            kernels.quantized_linear(*args)
    with pytest.raises(KernelError, match="q must be a QuantizedWeight, not Tensor"):
        kernels.quantized_linear(x, draw(16, 64))
    mlp = quantized(32, 64, kind="int8")
    for bad, message in (
        (norm._replace(weight=draw(63)), r"norm.weight has shape \[63\]; expected \[64\]"),
        (norm._replace(kind="batch"), "norm.kind is 'batch'"),
        (norm._replace(bias=draw(64)), "a norm of kind rms has none"),
    ):
        with pytest.raises(KernelError, match=message):
            kernels.quantized_norm_mlp(x, bad, mlp, None, "silu", True)
    with pytest.raises(KernelError, match=r"hidden has shape \[2, 63\]"):
        kernels.quantized_norm_mlp(draw(2, 63), norm, mlp, None, "silu", True)
    with pytest.raises(KernelError, match="activation is 'tanh'; as a gate"):
        kernels.quantized_norm_mlp(x, norm, q, None, "tanh", True)
    with pytest.raises(KernelError, match="q has 16 rows; gate and up must each be a multiple of 16"):
        kernels.quantized_norm_mlp(x, norm, q, None, "silu", True)
    with pytest.raises(KernelError, match="BLOCK_N is 24"):
        kernels.quantized_linear(x, q, blocks={**BLOCKS, "BLOCK_N": 24})
