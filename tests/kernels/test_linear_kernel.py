"""linear.py: exact for every norm and activation, complete, and independent of the other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom_kernels import linear as kernels
from handloom_kernels import norm as norm_kernels
from handloom_kernels import reference, tiles
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import ACTIVATIONS, GATED_ACTIVATIONS, NORM_KINDS, Norm
from kernel_testing import DTYPES, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw

SMALL = {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 1}
SIZES = [(1, 1, 1), (3, 63, 17), (16, 100, 48), (17, 64, 16), (2, 1000, 5)]


def some_norm(kind: str, width: int, dtype: torch.dtype = torch.float32) -> Norm:
    bias = draw(width, dtype=dtype) if kind == "layer" else None
    return Norm(kind, 1 + draw(width, dtype=dtype, scale=0.3), bias, 1e-5)


def some_linear(rows: int, depth: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, bias, residual."""
    weight = draw(width, depth, dtype=dtype, scale=depth**-0.5)
    return draw(rows, depth, dtype=dtype), weight, draw(width, dtype=dtype), draw(rows, width, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, _ = some_linear(*size, dtype)
    assert_as_exact_as(F.linear, x, weight, ours=kernels.linear(x, weight))
    assert_as_exact_as(F.linear, x, weight, bias, ours=kernels.linear(x, weight, bias, blocks=SMALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, *NORM_KINDS])
def test_linear_residual(kind: str | None, dtype: torch.dtype) -> None:
    for size in SIZES:
        x, weight, bias, residual = some_linear(*size, dtype)
        args = (x, weight, None if size[0] == 3 else bias, kind and some_norm(kind, size[2], dtype), residual)
        kept = residual.clone()
        assert_as_exact_as(reference.linear_residual, *args, ours=kernels.linear_residual(*args))
        assert torch.equal(residual, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NORM_KINDS)
def test_normalize_add(kind: str, dtype: torch.dtype) -> None:
    for width, block in ((1, 16), (100, 128), (100, 32)):
        x, residual, norm = draw(3, width, dtype=dtype), draw(3, width, dtype=dtype), some_norm(kind, width, dtype)
        ours = norm_kernels.normalize_add(x, residual, norm, blocks={"BLOCK": block, "num_warps": 1})
        assert_as_exact_as(reference.normalize_add, x, residual, norm, ours=ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", NORM_KINDS)
def test_norm_mlp(kind: str, gated: bool, dtype: torch.dtype) -> None:
    for rows, depth, width in SIZES:
        x, weight, bias, _ = some_linear(rows, depth, width * (1 + gated), dtype)
        args = (x, some_norm(kind, depth, dtype), weight, None if rows == 3 else bias, "silu", gated)
        assert_as_exact_as(reference.norm_mlp, *args, ours=kernels.norm_mlp(*args))


@pytest.mark.parametrize(
    ("activation", "gated"), [(a, False) for a in ACTIVATIONS] + [(a, True) for a in GATED_ACTIVATIONS]
)
def test_activations(activation: str, gated: bool) -> None:
    x, weight, bias, _ = some_linear(2, 32, 40)
    args = (4 * x, some_norm("rms", 32), 4 * weight, bias, activation, gated)
    assert_as_exact_as(reference.norm_mlp, *args, ours=kernels.norm_mlp(*args, blocks=SMALL))


def test_a_norm_without_a_bias_and_one_of_another_dtype() -> None:
    x, weight, _, _ = some_linear(2, 40, 16, torch.float16)
    norm = some_norm("layer", 40, torch.float16)._replace(bias=None)
    args = (x, norm, weight, None, "relu", False)
    assert_as_exact_as(reference.norm_mlp, *args, ours=kernels.norm_mlp(*args, blocks=SMALL))
    wide = kernels.norm_mlp(x, Norm("rms", norm.weight.float(), None, 1e-5), weight, None, "relu", False)
    assert torch.equal(wide, kernels.norm_mlp(x, Norm("rms", norm.weight, None, 1e-5), weight, None, "relu", False))


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_statistics_in_strips_and_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken a few at a time, and each in parts, where they are many and wide."""
    monkeypatch.setattr(tiles, "MAX_CHUNK", 16)
    x, weight, bias, _ = some_linear(7, 50, 16)
    args = (x + 100 * (kind == "layer"), some_norm(kind, 50), weight, bias, "relu", False)
    for num_warps in (2, 4, 8):
        ours = kernels.norm_mlp(*args, blocks={**SMALL, "num_warps": num_warps})
        assert_as_exact_as(reference.norm_mlp, *args, ours=ours)


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_a_row_does_not_depend_on_its_company(kind: str) -> None:
    x, weight, bias, residual = some_linear(18, 40, 16)
    norm, after = some_norm(kind, 40), some_norm(kind, 16)
    some = torch.tensor([0, 1, 15, 17], device=x.device)

    def both(rows: slice) -> Tensor:
        parts = x[some][rows], residual[some][rows]
        mlp = kernels.norm_mlp(parts[0], norm, weight, bias, "silu", True, blocks=SMALL)
        return torch.cat([mlp, kernels.linear_residual(parts[0], weight, bias, after, parts[1], blocks=SMALL)], dim=1)

    assert_rows_do_not_depend_on_company(both, len(some))
    among_all = kernels.norm_mlp(x, norm, weight, bias, "silu", True, blocks=SMALL)
    assert torch.equal(among_all[some], both(slice(None))[:, :8])


def test_rows_may_lie_apart() -> None:
    x, weight, bias, residual = some_linear(3, 40, 16)
    apart, residual_apart = (torch.cat((each, each), dim=1)[:, : each.shape[1]] for each in (x, residual))
    norm = some_norm("rms", 40)
    assert torch.equal(
        kernels.linear_residual(apart, weight, bias, None, residual_apart),
        kernels.linear_residual(x, weight, bias, None, residual),
    )
    args = (norm, weight, None, "relu2", True)
    assert torch.equal(kernels.norm_mlp(apart, *args), kernels.norm_mlp(x, *args))


def test_no_rows_are_fine() -> None:
    _, weight, _, _ = some_linear(1, 8, 6)
    assert kernels.linear_residual(draw(0, 8), weight, None, some_norm("rms", 6), draw(0, 6)).shape == (0, 6)
    assert kernels.norm_mlp(draw(0, 8), some_norm("rms", 8), weight, None, "silu", True).shape == (0, 3)


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias, residual = some_linear(2, 8, 6)
    norm = some_norm("rms", 8)
    wrong_linears: list[tuple[tuple[Any, ...], str]] = [
        ((x.double(), weight, bias, None, residual), "x has dtype torch.float64"),
        ((x[0], weight, bias, None, residual), r"x has shape \[8\]; expected \[any, any\]"),
        ((x, weight.half(), bias, None, residual), "weight has dtype torch.float16"),
        ((x, weight[:, :7], bias, None, residual), r"weight has shape \[6, 7\]; expected \[any, 8\]"),
        ((x, draw(8, 6).T, bias, None, residual), "weight has strides .* call .contiguous"),
        ((x, weight, draw(5), None, residual), r"bias has shape \[5\]; expected \[6\]"),
        ((x, weight, bias, None, residual[:1]), r"residual has shape \[1, 6\]; expected \[2, 6\]"),
        ((x, weight, bias, some_norm("rms", 6), residual[:, :5]), r"residual has shape \[2, 5\]"),
        ((x, weight, bias, norm, residual), r"post_norm.weight has shape \[8\]; expected \[6\]"),
    ]
    for args, message in wrong_linears:
        with pytest.raises(KernelError, match=message):
            kernels.linear_residual(*args)
    wrong_mlps: list[tuple[tuple[Any, ...], str]] = [
        ((x.double(), norm, weight, None, "silu", True), "hidden has dtype torch.float64"),
        ((x, norm._replace(kind="batch"), weight, None, "silu", True), "norm.kind is 'batch'"),
        ((x, norm._replace(bias=norm.weight), weight, None, "silu", True), "a norm of kind rms has none"),
        ((x, some_norm("rms", 7), weight, None, "silu", True), r"norm.weight has shape \[7\]; expected \[8\]"),
        ((x, norm, weight[:5], None, "silu", True), "weight has 5 rows, which are not gate and up"),
        ((x, norm, weight, None, "swish", True), "activation is 'swish'; as a gate there are silu"),
        ((x, norm, weight, None, "swiglu_oss", False), "activation is 'swiglu_oss'; alone there are silu"),
    ]
    for args, message in wrong_mlps:
        with pytest.raises(KernelError, match=message):
            kernels.norm_mlp(*args)
