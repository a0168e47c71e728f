"""Memory for weights: any shape and dtype, writable, and given back to the system with its tensor."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from handloom.checkpoint import memory
from handloom.errors import OutOfMemory
from handloom.ops import cores


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


def test_tensors_of_a_region_lie_side_by_side_and_never_on_each_other() -> None:
    region = memory.Region()
    shapes = [(3, 5), (700,), (0, 4), (1 << 18,), (33, 300), (1,), (1 << 20,), *[(1 << 19,)] * 40]
    dtypes = [torch.float32, torch.bfloat16, torch.int8]
    asked = [(shape, dtypes[i % 3]) for i, shape in enumerate(shapes)]
    with ThreadPoolExecutor(4) as pool:
        tensors = list(pool.map(lambda pair: region.empty(*pair), asked))
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, asked, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert bool((tensor == i).all())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    small = [tensor for tensor in tensors if memory.LINE_BYTES <= tensor.nbytes < memory.BLOCK_BYTES]
    assert all(tensor.data_ptr() % memory.LINE_BYTES == 0 for tensor in small)
    total = sum(tensor.nbytes for tensor in small)
    gaps = [b - a for a, b in itertools.pairwise(sorted(tensor.data_ptr() for tensor in small))]
    assert sum(gap <= memory.HUGE_PAGE_BYTES for gap in gaps) >= len(small) - 2 - total // memory.BLOCK_BYTES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of pages")
def test_a_region_goes_back_with_its_tensors() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    region, before = memory.Region(), resident()
    tensors = [region.empty((1 << 20,), torch.uint8).fill_(1) for _ in range(96)]
    assert resident() - before > 90 << 20
    del region
    part = tensors[50]
    del tensors
    assert bool((part == 1).all())
    assert resident() - before <= memory.BLOCK_BYTES + (4 << 20)
    del part
    assert resident() - before < 4 << 20


@pytest.mark.skipif(sys.platform == "win32", reason="torch's own memory there")
def test_what_the_system_refuses_is_said() -> None:
    with pytest.raises(OutOfMemory, match=r"4503599627370496 bytes.*smaller dtype or quantize"):
        memory.empty((1 << 50,), torch.float32)


FILES = {
    "memory.max": "3000\n",
    "memory.current": "2500\n",
    "memory.stat": "anon 700\nactive_file 300\ninactive_file 1500\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [({}, 5000), ({**FILES, "memory.max": "max\n"}, 5000), (FILES, 2300), ({**FILES, "memory.max": "9000\n"}, 5000),
     ({**FILES, "memory.max": "500\n"}, 0)],
    ids=["no cgroup", "no limit", "its limit", "the machine's", "more is used"],
)  # fmt: skip
def test_a_containers_limit_counts_and_its_file_cache_does_not(
    files: dict[str, str], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(cores, "cgroup", lambda name: files.get(name, ""))
    assert cores.usable_memory() == free
