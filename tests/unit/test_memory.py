"""Memory for weights: any shape and dtype, writable, and given back to the system with its tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from handloom.checkpoint import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.float16])
@pytest.mark.parametrize("shape", [(0, 5), (3,), (5, 7), (1 << 20,), (3001, 1003), (33, 300, 701)])
def test_it_is_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = memory.empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    other = memory.empty(shape, dtype)
    tensor.fill_(3)
    other.fill_(5)
    assert bool((tensor == 3).all())
    assert tensor.untyped_storage().nbytes() >= tensor.nbytes


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of pages")
def test_it_goes_back_when_nobody_uses_it_and_not_before() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size = 64 << 20
    before = resident()
    tensors = [memory.empty((size // 4,), torch.float32).fill_(1.0) for _ in range(3)]
    part = tensors[1][100:200]
    assert resident() - before > 2.9 * size
    del tensors
    assert resident() - before < 1.1 * size
    assert bool((part == 1).all())
    del part
    assert resident() - before < 0.1 * size
