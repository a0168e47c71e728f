"""What the attention kernels must not read, nor read as a number: page ids and slots past a context; unknown float8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom_kernels import norm_qkv, rope, tuning
from handloom_kernels.checks import KernelError
from handloom_kernels.decode_attention import decode_attention
from handloom_kernels.prefill_attention import prefill_attention
from handloom_kernels.reference import Norm
from handloom_kernels.shared_prefix_attention import shared_prefix_attention
from kernel_testing import DEVICE, ON_GPU, draw
from paged import Paged

NOWHERE = 1 << 40
NEW, LENGTHS = (2, 3, 1), (50, 90, 16)
BLOCKS = {"BLOCK_N": 16, "SPLIT": 32, "FOLD_SPLITS": 4, "FOLD_ROWS": 4, "PROGRAMS": 2}


def decode(*args: Any, **options: Any) -> Tensor:
    return decode_attention(*args, 0.3, max_query_len=max(NEW), blocks=BLOCKS, **options)


def prefill(*args: Any, **options: Any) -> Tensor:
    return prefill_attention(*args, 0.3, blocks={"BLOCK_M": 32, "BLOCK_N": 16}, **options)


def behind_a_page(q: Tensor, k_pages: Tensor, v_pages: Tensor, *batch: Tensor) -> Tensor:
    """Behind a prefix of one page, the one that the last sequence fills."""
    prefix = batch[0][2, : max(1, 16 // k_pages.shape[1])].contiguous()
    blocks = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLIT": 32, "FOLD_SPLITS": 4}
    args = (q, k_pages, v_pages, prefix, len(prefix) * k_pages.shape[1], *batch, 0.3)
    return shared_prefix_attention(*args, max_query_len=max(NEW), blocks=blocks, own_blocks=BLOCKS)


def batch(page_size: int) -> list[Tensor]:
    """Every slot that no sequence owns is NaN."""
    paged = Paged.make(lengths=LENGTHS, new=NEW, num_heads=4, num_kv_heads=2, head_dim=16, page_size=page_size)
    return [x.to(DEVICE) for x in paged.arguments()]


@pytest.mark.parametrize("attend", [decode, prefill, behind_a_page])
@pytest.mark.parametrize("page_size", [4, 16])
def test_page_ids_past_a_context_are_not_looked_up(attend: Callable[..., Tensor], page_size: int) -> None:
    q, k_pages, v_pages, table, *rest = batch(page_size)
    expected = attend(q, k_pages, v_pages, table, *rest)
    assert torch.isfinite(expected).all()
    lost = table.clone()
    for row, length in zip(lost, LENGTHS, strict=True):
        row[-(-length // page_size) :] = NOWHERE
    assert (lost == NOWHERE).any()
    assert torch.equal(attend(q, k_pages, v_pages, lost, *rest), expected)


@pytest.mark.parametrize("attend", [decode, prefill])
@pytest.mark.parametrize("latent", [False, True])
def test_scales_of_unused_slots_may_be_anything(attend: Callable[..., Tensor], latent: bool) -> None:
    q, k_pages, _, *rest = batch(16)
    codes = [torch.randint(-127, 128, k_pages.shape).to(DEVICE, torch.int8) for _ in "kv"]
    scales = [draw(*k_pages.shape[:3]).abs() for _ in "kv"]
    if latent:
        codes[1] = codes[0]
    unused = k_pages[..., 0].isnan()
    expected = attend(q, *codes, *rest, k_scales=scales[0], v_scales=scales[1])
    assert torch.isfinite(expected).all()
    for anything in (torch.nan, torch.inf):
        for each in scales:
            each[unused] = anything
        assert torch.equal(attend(q, *codes, *rest, k_scales=scales[0], v_scales=scales[1]), expected)


def write_alone(k_pages: Tensor, v_pages: Tensor, scales: dict[str, Tensor]) -> None:
    slots = torch.arange(4, device=DEVICE)
    rope.qk_norm_rope_write(draw(4, 128), 4, None, None, None, k_pages, v_pages, slots, **scales)


def write_after_norm(k_pages: Tensor, v_pages: Tensor, scales: dict[str, Tensor]) -> None:
    slots, norm = torch.arange(4, device=DEVICE), Norm("rms", draw(32), None, 1e-5)
    norm_qkv.norm_qkv(draw(4, 32), norm, draw(128, 32), None, None, None, None, k_pages, v_pages, slots, **scales)


def read_few(k_pages: Tensor, v_pages: Tensor, scales: dict[str, Tensor]) -> None:
    q, _, _, *rest = batch(16)
    decode(q, k_pages, v_pages, *rest, **scales)


def read_many(k_pages: Tensor, v_pages: Tensor, scales: dict[str, Tensor]) -> None:
    q, _, _, *rest = batch(16)
    prefill(q, k_pages, v_pages, *rest, **scales)


@pytest.mark.parametrize("launch", [write_alone, write_after_norm, read_few, read_many])
@pytest.mark.parametrize(
    ("dtype", "capability", "message"),
    [
        (torch.float8_e4m3fn, (8, 0), "k_pages has dtype .*e4m3fn, which a GPU of compute capability 8.0 .* Use int8"),
        (torch.float8_e4m3fn, (8, 6), "k_pages has dtype .*e4m3fn, which a GPU of compute capability 8.6 .* Use int8"),
        (torch.float8_e4m3fnuz, (9, 0), "k_pages has dtype .*e4m3fnuz, which only AMD's GPUs know"),
    ],
)
def test_float8_that_a_gpu_lacks_is_refused_by_name(
    launch: Callable[..., None],
    dtype: torch.dtype,
    capability: tuple[int, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    k_pages, v_pages = torch.zeros(2, 20, 16, 2, 16, device=DEVICE).to(dtype)
    scales = {name: torch.ones(20, 16, 2, device=DEVICE) for name in ("k_scales", "v_scales")}
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    with pytest.raises(KernelError, match=message):
        launch(k_pages, v_pages, scales)
    launch(k_pages.to(torch.int8), v_pages.to(torch.int8), scales)
    if dtype == torch.float8_e4m3fn and not ON_GPU:
        monkeypatch.setattr(tuning, "capability", lambda device: (8, 9))
        launch(k_pages, v_pages, scales)
