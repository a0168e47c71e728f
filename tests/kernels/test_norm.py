"""norm.py: exact, complete, and independent of the other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from handloom_kernels import norm as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import NORM_KINDS, Norm
from kernel_testing import DEVICE, DTYPES, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw

WIDTHS = [1, 7, 64, 100, 576, 1000]


def some_norm(kind: str, width: int, dtype: torch.dtype, bias: bool = False) -> Norm:
    return Norm(kind, 1 + draw(width, dtype=dtype, scale=0.3), draw(width, dtype=dtype) if bias else None, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_normalize(width: int, kind: str, dtype: torch.dtype) -> None:
    x, norm = draw(3, width, dtype=dtype, scale=3), some_norm(kind, width, dtype, bias=kind == "layer")
    assert_as_exact_as(reference.normalize, x, norm, ours=kernels.normalize(x, norm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("width", [7, 576])
def test_add_normalize(width: int, kind: str, dtype: torch.dtype) -> None:
    x, residual = draw(2, 3, width, dtype=dtype), draw(2, 3, width, dtype=dtype)
    norm = some_norm(kind, width, dtype)
    ours = kernels.add_normalize(x, residual, norm)
    assert_as_exact_as(reference.add_normalize, x, residual, norm, ours=ours)


@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("width", [65, 100, 128, 1000])
def test_a_row_wider_than_a_tile(width: int, kind: str) -> None:
    x, residual, norm = draw(2, width), draw(2, width), some_norm(kind, width, torch.float32, bias=kind == "layer")
    blocks = {"BLOCK": 64, "num_warps": 1}
    assert_as_exact_as(reference.normalize, x, norm, ours=kernels.normalize(x, norm, blocks=blocks))
    ours = kernels.add_normalize(x, residual, norm, blocks=blocks)
    assert_as_exact_as(reference.add_normalize, x, residual, norm, ours=ours)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x, norm = draw(2, 300) + 1000, some_norm("layer", 300, torch.float32)
    assert_as_exact_as(reference.normalize, x, norm, ours=kernels.normalize(x, norm))


def test_rows_may_lie_apart() -> None:
    x, norm = draw(5, 200)[:, 20:120], some_norm("rms", 100, torch.float32)
    assert torch.equal(kernels.normalize(x, norm), kernels.normalize(x.contiguous(), norm))


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_a_row_does_not_depend_on_its_company(kind: str) -> None:
    x, norm = draw(5, 300), some_norm(kind, 300, torch.float32)
    assert_rows_do_not_depend_on_company(lambda rows: kernels.normalize(x[rows], norm), 5)


@pytest.mark.parametrize("kind", ["rms", "rms_unit_offset"])
def test_a_weight_of_another_dtype_leaves_the_dtype_of_x(kind: str) -> None:
    x, norm = draw(3, 40, dtype=torch.float16), some_norm(kind, 40, torch.float32)
    assert_as_exact_as(reference.normalize, x, norm, ours=kernels.normalize(x, norm))


def test_the_reference_in_float64_is_that_of_the_formula() -> None:
    """It is what kernels are held to, so it must not fall back to float32 on the way."""
    x, weight = draw(3, 100).double(), draw(100).double()
    scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for kind, factor in (("rms", weight), ("rms_unit_offset", 1 + weight)):
        ours = reference.normalize(x, Norm(kind, weight, None, 1e-5))
        assert (ours - scaled * factor).abs().max() <= 1e-14


def test_no_rows_are_fine() -> None:
    assert kernels.normalize(draw(0, 8), some_norm("rms", 8, torch.float32)).shape == (0, 8)


def test_what_does_not_fit_is_named() -> None:
    good, norm = draw(2, 8), some_norm("rms", 8, torch.float32)
    wrong: list[tuple[Tensor, Norm, str]] = [
        (good, norm._replace(weight=draw(9)), r"norm.weight has shape \[9\]; expected \[8\]"),
        (good, norm._replace(kind="batch"), "norm.kind is 'batch'"),
        (good, norm._replace(bias=draw(8)), "a norm of kind rms has none"),
        (good.to(torch.float64), norm, "x has dtype torch.float64"),
        (draw(2, 16)[:, ::2], norm, "x has strides .* the last must be 1"),
        (torch.ones((), device=DEVICE), norm, "at least one dimension"),
    ]
    for x, given, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.normalize(x, given)
    with pytest.raises(KernelError, match="residual has shape"):
        kernels.add_normalize(good, draw(3, 8), norm)
