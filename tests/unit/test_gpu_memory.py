"""How large a KV cache is made, and what happens where there is less memory than it looked like."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import handloom as hl
from engines import loaded
from handloom import loading
from handloom.cache.pages import PagePool
from handloom.errors import InvalidParam, OutOfMemory, UnsupportedOption
from handloom.loading import PAGE_SIZE, STEP_BYTES, make_graphs, make_pool
from handloom.model.spec import kv_values_per_token

GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Plays a GPU with so much memory, whose allocator finds room for no more than so many pages."""

    def play(free: int, total: int, most_pages: int = 1 << 40) -> list[int]:
        asked: list[int] = []
        loaded("llama")

        class Pool:
            def __init__(self, spec: Any, num_pages: int, page_size: int, **_: Any) -> None:
                asked.append(num_pages)
                if num_pages > most_pages:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                self.num_pages, self.page_size = num_pages, page_size

        monkeypatch.setattr(loading, "_memory", lambda device: (free, total))
        monkeypatch.setattr(loading, "PagePool", Pool)
        return asked

    return play


def pool(tokens: int | None = None, fraction: Any = None) -> PagePool:
    return make_pool(loaded("llama").spec, 256, tokens, fraction, dtype=torch.float32, device=torch.device("cuda"))


def test_it_takes_what_is_left_below_the_fraction(gpu: Callable[..., list[int]]) -> None:
    gpu(free=60 * GIB, total=80 * GIB)
    token_bytes = 4 * kv_values_per_token(loaded("llama").spec)
    for fraction in (0.5, 0.9, 1):
        left = int(fraction * 80 * GIB) - 20 * GIB - STEP_BYTES
        assert pool(fraction=fraction).num_pages == -(-(left // token_bytes) // PAGE_SIZE)


def test_a_pool_that_does_not_fit_is_made_smaller_and_it_is_said(
    gpu: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    planned = gpu(free=60 * GIB, total=80 * GIB) or pool(fraction=0.9).num_pages
    asked = gpu(free=60 * GIB, total=80 * GIB, most_pages=planned * 3 // 4)
    with caplog.at_level(logging.WARNING, "handloom"):
        made = pool(fraction=0.9).num_pages
    assert asked == [planned, planned * 7 // 8, planned * 7 // 8 * 7 // 8, made] and made <= planned * 3 // 4
    assert f"trying {made * PAGE_SIZE} tokens" in caplog.text


def test_what_was_asked_for_is_not_made_smaller(gpu: Callable[..., list[int]]) -> None:
    asked = gpu(free=60 * GIB, total=80 * GIB, most_pages=2)
    with pytest.raises(OutOfMemory, match=r"a KV cache for 64 tokens takes .* 60\.00 GiB are free on cuda"):
        pool(tokens=64)
    assert asked == [4]


def test_no_page_at_all(gpu: Callable[..., list[int]]) -> None:
    gpu(free=60 * GIB, total=80 * GIB, most_pages=0)
    with pytest.raises(OutOfMemory, match="a KV cache for 16 tokens"):
        pool(fraction=0.9)


@pytest.mark.parametrize(
    "tokens, fraction, error, message",
    [
        (None, 0.0, InvalidParam, "above 0, up to 1"),
        (None, 1.5, InvalidParam, "above 0, up to 1"),
        (None, True, InvalidParam, "above 0, up to 1"),
        (None, "half", InvalidParam, "above 0, up to 1"),
        (64, 0.9, InvalidParam, "give one"),
        (None, 0.2, OutOfMemory, f"{20 * GIB} bytes are in use .* and {STEP_BYTES} are for steps"),
    ],
)
def test_a_fraction_that_cannot_be(
    gpu: Callable[..., list[int]], tokens: int | None, fraction: Any, error: type[Exception], message: str
) -> None:
    gpu(free=60 * GIB, total=80 * GIB)
    with pytest.raises(error, match=message):
        pool(tokens, fraction)


def test_on_a_cpu_neither_means_anything(tmp_path: Any) -> None:
    lm = loaded("llama")
    with pytest.raises(InvalidParam, match="the model is on the CPU"):
        make_pool(lm.spec, 256, None, 0.9, dtype=torch.float32, device=lm.device)
    with pytest.raises(UnsupportedOption, match="the model is on cpu; graphs are captured on a GPU"):
        make_graphs(lm.transformer, lm.pool, True)
    assert make_graphs(lm.transformer, lm.pool, None) is make_graphs(lm.transformer, lm.pool, False) is None
    assert lm.graphs is None and hl.Engine(lm).pilot is None
