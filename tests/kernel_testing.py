"""What kernel tests share: where they run, and how exact a kernel must be.

On a GPU the kernels are compiled and bfloat16 is tested too; without one Triton's interpreter runs them, where
bfloat16 is wrong in the interpreter itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
HALF = torch.bfloat16 if ON_GPU else torch.float16


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal random numbers from torch's generator, on the device of the tests."""
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def in_float64(value: Any) -> Any:
    """The same arguments with every floating-point tensor, also inside tuples and lists, in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(in_float64, value))
    return type(value)(map(in_float64, value)) if isinstance(value, (tuple, list)) else value


def assert_as_exact_as(reference: Callable[..., Any], *args: Any, ours: Any, factor: float = 2.0) -> None:
    """`ours` is no further from `reference` computed in float64 than `factor` times what `reference` itself is in the
    dtype of the arguments, and a few units in the last place of the largest value."""
    exact, plain = reference(*map(in_float64, args)), reference(*args)
    if isinstance(ours, Tensor):
        exact, plain, ours = [exact], [plain], [ours]
    assert len(exact) == len(ours)
    for right, theirs, mine in zip(exact, plain, ours, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        if mine.numel() == 0:
            continue
        assert torch.isfinite(mine).all(), "an element was not written, or is not finite"
        allowed = factor * (theirs.double() - right).abs().max() + 4 * torch.finfo(mine.dtype).eps * right.abs().max()
        error = (mine.double() - right).abs().max()
        assert error <= allowed, f"{error:.3g} from float64, allowed {allowed:.3g}"


def assert_rows_do_not_depend_on_company(run: Callable[[slice], Tensor], count: int) -> None:
    """run(rows) computes a slice of the rows: each row alone, and each half, has the very bits it has among all."""
    everything = run(slice(0, count))
    parts = [slice(i, i + 1) for i in range(count)] + [slice(0, count // 2), slice(count // 2, count)]
    for part in parts:
        if part.start < part.stop:
            assert torch.equal(run(part), everything[part]), part
    assert torch.equal(run(slice(0, count)), everything), "another run gave other bits"
