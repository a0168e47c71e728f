"""The KV cache: one pool of pages, handed out by reference count.

Layers whose K and V have the same shape share one storage
`[num_layers, 2, num_pages, page_size, num_kv_heads, head_dim]`; a page id names the same page in every
storage. Pages are handed out lowest id first, so that a sequence alone in the pool lies contiguous.

A page that its last holder releases keeps its content if the prefix index knows it. It counts as free, and is used
again only when no other page is free, the one released longest ago first. Sequences release their last page first, and
who holds a page holds all pages before it; so a page is never used again before those that follow it.

Pages may be taken and given back from any thread: whatever touches the counts holds the pool's lock, which is never
held while a model runs.

This module does not know sequences, tokens, or why a page is shared.
"""

from __future__ import annotations

import functools
import heapq
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from handloom.cache.prefix import PrefixIndex
from handloom.errors import OutOfPages
from handloom.model.spec import ModelSpec

P = ParamSpec("P")
R = TypeVar("R")


class Lockable(Protocol):
    """What has a reentrant lock."""

    @property
    def lock(self) -> AbstractContextManager[object]: ...


Locking = TypeVar("Locking", bound=Lockable)


def locked(method: Callable[Concatenate[Locking, P], R]) -> Callable[Concatenate[Locking, P], R]:
    """A method that runs while its object's lock is held."""

    @functools.wraps(method)
    def run(self: Locking, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return run


class PagePool:
    """Owns the K and V storage and the reference counts of its pages."""

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.device = device
        self.lock = threading.RLock()
        self.spilled_bytes = 0  # of K and V that were moved to host memory; see HostPages
        shapes = [(layer.mixer.num_kv_heads, layer.mixer.head_dim) for layer in spec.layers]
        counts = {shape: shapes.count(shape) for shape in shapes}
        self.storages: dict[tuple[int, int], Tensor] = {
            shape: torch.empty((count, 2, num_pages, page_size, *shape), dtype=dtype, device=device)
            for shape, count in counts.items()
        }
        seen = dict.fromkeys(counts, 0)
        layers: list[tuple[Tensor, Tensor]] = []
        for shape in shapes:
            k_pages, v_pages = self.storages[shape][seen[shape]]
            layers.append((k_pages, v_pages))
            seen[shape] += 1
        self.layers = tuple(layers)
        self._references: list[int] = []  # of the pages handed out so far, which are the lowest ones
        self._free: list[int] = []  # a heap of those that came back
        self.prefixes = PrefixIndex(page_size)
        # those that the index knows and nobody holds, the first to go first
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, in all layers."""
        return sum(storage[:, :, 0].nbytes for storage in self.storages.values())

    @property
    def num_free(self) -> int:
        """Pages that can be handed out, cached ones included."""
        return self.num_empty + len(self._cached)

    @property
    def num_empty(self) -> int:
        """Pages that can be handed out without giving up a cached one."""
        return len(self._free) + self.num_pages - len(self._references)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and the prefix index knows."""
        return len(self._cached)

    def references(self, page: int) -> int:
        """How many page tables hold this page."""
        return self._references[page] if page < len(self._references) else 0

    def is_own(self, page: int) -> bool:
        """Whether a page in use has one holder, and nobody else can find it. Its holder needs no lock to ask."""
        return self._references[page] == 1 and page not in self.prefixes

    @locked
    def allocate(self) -> int:
        """A page with one reference; gives up a cached page if no other is left. Raises OutOfPages."""
        if not self._free and len(self._references) < self.num_pages:
            self._references.append(1)
            return len(self._references) - 1
        if self._free:
            page = heapq.heappop(self._free)
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self.prefixes.discard(page)
        else:
            raise OutOfPages(
                f"all {self.num_pages} pages of {self.page_size} tokens are in use; "
                "free sequences, or load the model with a larger kv_cache_tokens"
            )
        self._references[page] = 1
        return page

    @locked
    def share(self, page: int) -> None:
        """Add a reference to a page in use, or to a cached one."""
        if self.references(page) == 0 and page not in self._cached:
            raise ValueError(f"page {page} is free and cannot be shared")
        self._cached.pop(page, None)
        self._references[page] += 1

    @locked
    def release(self, page: int) -> None:
        """Drop a reference; the last one frees the page, which stays cached if the prefix index knows it."""
        if self.references(page) == 0:
            raise ValueError(f"page {page} is already free")
        self._references[page] -= 1
        if self._references[page] == 0:
            if page in self.prefixes:
                self._cached[page] = None
            else:
                heapq.heappush(self._free, page)

    @locked
    def forget_cached(self) -> None:
        """Forget every page that a new sequence could find: for measurements, or after weights were edited.

        Living sequences keep their pages, and may offer them again.
        """
        self.prefixes.clear()
        for page in self._cached:
            heapq.heappush(self._free, page)
        self._cached.clear()

    @locked
    def copy(self, source: int, num_tokens: int) -> int:
        """A new page holding the first num_tokens tokens of `source`, in every layer. Raises OutOfPages."""
        target = self.allocate()
        try:
            for storage in self.storages.values():
                storage[:, :, target, :num_tokens] = storage[:, :, source, :num_tokens]
        except BaseException:
            self.release(target)
            raise
        return target
