"""kv_pages.py: every bit of the pages meant arrives, in every layer, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom_kernels import kv_pages as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from kernel_testing import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
SMALL = {"BLOCK": 16, "num_warps": 1}


def storage(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pages of random bytes, NaNs of every kind among them."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).to(DEVICE).view(dtype)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def check(pages: Tensor, *arguments: Tensor, **options: Any) -> None:
    expected, before = pages.clone(), pages.clone().view(torch.uint8)
    reference.copy_pages(expected, *arguments)
    kernels.copy_pages(pages, *arguments, **options)
    assert torch.equal(pages.view(torch.uint8), expected.view(torch.uint8))
    assert not torch.equal(pages.view(torch.uint8), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 6, 4, 3, 5), (2, 2, 6, 5, 2, 8), (3, 2, 6, 1, 1, 1), (1, 2, 6, 7, 3)], ids=str
)
def test_pages_of_any_dtype_and_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(storage(*shape, dtype=dtype), ids(0, 5), ids(3, 1), blocks=SMALL)
    check(storage(*shape, dtype=dtype), ids(4), ids(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_slots_of_a_page(dtype: torch.dtype) -> None:
    pages = storage(2, 2, 9, 6, 3, 4, dtype=dtype)
    check(pages, ids(0, 2, 4, 6), ids(1, 3, 5, 7), ids(0, 1, 5, 6), blocks=SMALL)


def test_a_page_may_be_copied_many_times() -> None:
    pages = storage(2, 2, 6, 4, 2, 8)
    check(pages, ids(3, 3, 3), ids(0, 5, 2))
    assert torch.equal(pages[:, :, 0].view(torch.uint8), pages[:, :, 2].view(torch.uint8))


def test_a_page_of_any_length_fits_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA allows 65535 programs along the second axis of a grid, and along the third."""
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(kernels, "_copy_pages_kernel", Kernel())
    kernels.copy_pages(storage(1, 2, 2, 1 << 17, 1, 16, dtype=torch.int8), ids(0, 0), ids(1, 1), blocks=SMALL)
    tiles = (1 << 17) * 2 // 16
    assert grids == [(2 * tiles, 2)]


def test_nothing_is_copied_where_the_source_is_minus_one() -> None:
    check(storage(2, 2, 6, 4, 2, 8), ids(-1, 3, -1), ids(0, 1, -1))


def test_ids_may_be_int32_and_storage_may_begin_anywhere() -> None:
    whole = storage(3, 2, 6, 3, 1, 5, dtype=torch.int8)
    before = whole[0].clone()
    check(whole[1:], ids(2, 0).int(), ids(4, 5).int(), ids(3, 2).int())
    assert torch.equal(whole[0], before)
    check(storage(3 + 2 * 6 * 3 * 8, dtype=torch.int8)[3:].view(1, 2, 6, 3, 8), ids(2, 0), ids(4, 5))


def test_no_copies_are_fine() -> None:
    pages = storage(1, 2, 3, 4, 5)
    before = pages.clone()
    kernels.copy_pages(pages, ids(), ids())
    assert torch.equal(pages.view(torch.uint8), before.view(torch.uint8))
    kernels.copy_pages(pages[:0], ids(0), ids(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": storage(3, 4, 5)}, r"pages has shape \[3, 4, 5\]; expected \[layers, 2, num_pages"),
        ({"pages": storage(1, 2, 3, 4, 5).transpose(1, 2)}, "pages has strides"),
        ({"pages": storage(1, 2, 3, 4, 5).to(torch.complex64)}, "pages has dtype torch.complex64"),
        ({"source": ids(0, 1).float()}, "source has dtype torch.float32"),
        ({"target": ids(0)}, r"target has shape \[1\]; expected \[2\]"),
        ({"num_tokens": ids(1, 1, 1)}, r"num_tokens has shape \[3\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    good = {"pages": storage(1, 2, 5, 4, 5), "source": ids(0, 1), "target": ids(2, 3)}
    with pytest.raises(KernelError, match=message):
        kernels.copy_pages(**{**good, **change})
