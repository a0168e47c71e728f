"""Products with few rows take another way than F.linear on a CPU: every number of rows gives the float64 result."""

from __future__ import annotations

import pytest
import torch

from handloom.ops import torch_ops


@pytest.mark.parametrize("width", [32, 40, 64, 352])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 12, 16, 17])
@pytest.mark.parametrize("with_bias", [False, True])
def test_any_number_of_rows_gives_the_float64_product(rows: int, width: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    x, weight, residual, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, 72), (width, 72), (rows, width), (width,))
    )
    expected = residual + x @ weight.T + (bias if with_bias else 0)
    out = torch_ops.linear_residual(
        x.float(), weight.float(), bias.float() if with_bias else None, None, residual.float()
    )
    assert out.is_contiguous()
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_other_way_is_taken_where_it_is_meant_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four to sixteen float32 rows, if the weight's rows are a multiple of 32 and MKL does the products."""
    taken: list[int] = []
    monkeypatch.setattr(torch_ops.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch_ops, "bmm", lambda x, w: taken.append(x.shape[1]) or torch.bmm(x, w))
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 65):
            for rows in range(1, 20):
                ones = torch.ones(rows, 8, dtype=dtype), torch.ones(width, 8, dtype=dtype)
                torch_ops.linear_residual(*ones, None, None, torch.zeros(rows, width, dtype=dtype))
    assert taken == list(range(4, 17))
