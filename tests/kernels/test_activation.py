"""activation.py: exact, complete, without overflow, and independent of the other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from handloom_kernels import activation as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import ACTIVATIONS, GATED_ACTIVATIONS
from kernel_testing import DEVICE, DTYPES, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw

# on the way to a sigmoid of 0 or 1, x^3 and exp(-x) may be infinite, and the interpreter says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
SMALL = {"BLOCK": 64, "num_warps": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 63, 100, 1000])
def test_activate(width: int, activation: str, dtype: torch.dtype) -> None:
    x = draw(2, width, dtype=dtype, scale=3)
    for blocks in (None, SMALL):
        ours = kernels.activate(x, activation, blocks=blocks)
        assert_as_exact_as(reference.activate, x, activation, ours=ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 63, 100, 1000])
def test_gated_activation(width: int, activation: str, dtype: torch.dtype) -> None:
    x = draw(3, 2 * width, dtype=dtype, scale=5)
    for blocks in (None, SMALL):
        ours = kernels.gated_activation(x, activation, blocks=blocks)
        assert_as_exact_as(reference.gated_activation, x, activation, ours=ours)


def test_relu2_is_that_of_transformers() -> None:
    x = draw(3, 100)
    theirs = ACT2FN["relu2"](x)
    assert torch.equal(reference.activate(x, "relu2"), theirs)
    assert torch.equal(kernels.activate(x, "relu2"), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_oss_is_that_of_transformers(dtype: torch.dtype) -> None:
    x = draw(4, 2, 50, dtype=dtype, scale=6)
    small = GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1, num_hidden_layers=1)
    interleaved = x.transpose(1, 2).reshape(4, 100)
    theirs = GptOssExperts(small)._apply_gate(interleaved.double())
    ours = kernels.gated_activation(x.reshape(4, 100), "swiglu_oss").double()
    assert (ours - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_do_not_overflow_on_the_way(activation: str) -> None:
    x = torch.tensor([-3e38, -1e30, -1000, -90, 90, 1000, 1e15], device=DEVICE)
    right = reference.activate(x.double(), activation)
    assert (kernels.activate(x, activation).double() - right).abs().le(1e-6 * right.abs() + 1e-30).all()


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_nan_stays_nan(activation: str) -> None:
    x = torch.ones(4, 6, device=DEVICE)
    x[0, 1] = x[1, 4] = torch.nan
    ours = kernels.gated_activation(x, activation)
    assert ours.isnan().nonzero().tolist() == [[0, 1], [1, 1]]


def test_rows_may_lie_apart() -> None:
    x = draw(5, 300)[:, 20:220]
    assert torch.equal(kernels.activate(x, "silu"), kernels.activate(x.contiguous(), "silu"))
    assert torch.equal(kernels.gated_activation(x, "gelu"), kernels.gated_activation(x.contiguous(), "gelu"))


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_a_row_does_not_depend_on_its_company(activation: str) -> None:
    x = draw(5, 200)
    assert_rows_do_not_depend_on_company(lambda rows: kernels.gated_activation(x[rows], activation), 5)


def test_nothing_is_fine() -> None:
    assert kernels.activate(draw(0, 8), "relu").shape == (0, 8)
    assert kernels.gated_activation(draw(2, 0), "relu").shape == (2, 0)


def test_what_does_not_fit_is_named() -> None:
    wrong: list[tuple[Tensor, str, str]] = [
        (draw(2, 8), "tanh", "activation is 'tanh'; there are silu, .* swiglu_oss"),
        (draw(2, 7), "silu", "x has 7 columns, which are not two halves"),
        (draw(2, 8).double(), "silu", "x has dtype torch.float64"),
        (draw(2, 16)[:, ::2], "silu", "x has strides .* the last must be 1"),
        (torch.ones((), device=DEVICE), "silu", "at least one dimension"),
    ]
    for x, activation, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.gated_activation(x, activation)
    with pytest.raises(KernelError, match="activation is 'swiglu_oss'"):
        kernels.activate(draw(2, 8), "swiglu_oss")
