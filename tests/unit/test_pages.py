"""PagePool: pages are handed out lowest first, counted, copied whole, and refused by name when there are none."""

from __future__ import annotations

import time
import tracemalloc

import pytest
import torch

from handloom.cache.sequence import Sequence
from handloom.cache.spill import HostPages
from handloom.errors import OutOfMemory, OutOfPages
from paged import SHAPES, pool_of


def test_pages_come_lowest_first_so_a_sequence_alone_lies_contiguous() -> None:
    pool = pool_of(5)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    for page in (2, 0, 3):
        pool.release(page)
    assert [pool.allocate() for _ in range(4)] == [0, 2, 3, 4]
    assert pool.num_free == 0


def test_an_empty_pool_names_its_size_and_the_way_out() -> None:
    pool = pool_of(2, page_size=16)
    for _ in range(2):
        pool.allocate()
    with pytest.raises(OutOfPages, match=r"all 2 pages of 16 tokens are in use.*kv_cache_tokens") as caught:
        pool.allocate()
    assert isinstance(caught.value, OutOfMemory | MemoryError)
    assert pool.num_free == 0


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pool = pool_of(3)
    page = pool.allocate()
    pool.share(page)
    assert pool.references(page) == 2
    pool.release(page)
    assert (pool.references(page), pool.num_free) == (1, 2)
    pool.release(page)
    assert (pool.references(page), pool.num_free) == (0, 3)


@pytest.mark.parametrize("page", [0, 2])
def test_a_free_page_can_be_neither_shared_nor_freed_again(page: int) -> None:
    pool = pool_of(3)
    pool.release(pool.allocate())
    for misuse in (pool.share, pool.release):
        with pytest.raises(ValueError, match=f"page {page} is"):
            misuse(page)
    assert pool.num_free == 3


def test_layers_of_each_shape_have_their_own_memory_under_the_same_page_ids() -> None:
    pool = pool_of(6)
    for number, (k_pages, v_pages) in enumerate(pool.layers):
        assert k_pages.shape == v_pages.shape == (6, 4, *SHAPES[number])
        assert k_pages.is_contiguous()
        k_pages.fill_(2 * number)
        v_pages.fill_(2 * number + 1)
    for number, (k_pages, v_pages) in enumerate(pool.layers):
        assert (k_pages == 2 * number).all()
        assert (v_pages == 2 * number + 1).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_a_copy_holds_the_first_tokens_of_every_layer_and_no_more(num_tokens: int) -> None:
    pool = pool_of(4)
    for pages in pool.layers:
        for side in pages:
            side.copy_(torch.arange(side.numel()).view_as(side))
    before = [[side.clone() for side in pages] for pages in pool.layers]
    source = pool.allocate()
    target = pool.copy(source, num_tokens)
    assert (pool.references(source), pool.references(target)) == (1, 1)
    for pages, old in zip(pool.layers, before, strict=True):
        for side, was in zip(pages, old, strict=True):
            was[target, :num_tokens] = was[source, :num_tokens]
            assert torch.equal(side, was)


def test_a_pool_of_a_hundred_million_pages_costs_nothing_until_they_are_used() -> None:
    """A config that claims a context of 2^27 must not make the page table itself fill the memory."""
    tracemalloc.start()
    started = time.perf_counter()
    pool = pool_of(100_000_000, page_size=1, shapes=((1, 1),))
    assert pool.allocate() == 0
    assert pool.num_free == 99_999_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert time.perf_counter() - started < 5


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_copy_that_fails_keeps_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(3)
    page = pool.allocate()
    storage = type("Storage", (), {"__getitem__": no_memory, "__setitem__": no_memory})()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(pool, "storages", {SHAPES[0]: storage})
        pool.copy(page, 1)
    assert pool.num_free == 2


def test_pages_that_cannot_come_back_are_free_again_and_come_back_later(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = Sequence(pool_of(4), [5])
    sequence.grow(1)
    sequence.num_computed = 1
    sequence.spill()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(HostPages, "write", no_memory)
        sequence.bring_back()
    assert (sequence.pool.num_free, sequence.page_table) == (4, []) and sequence.spilled is not None
    sequence.bring_back()
    assert (sequence.pool.num_free, len(sequence.page_table), sequence.spilled) == (3, 1, None)
