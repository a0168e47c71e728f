"""K and V of a sequence in host memory, while others have its pages.

On a CPU, host memory is the memory the pages are in: they are copied there, too, and counted.
This module does not know which sequences are moved, or when they come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from handloom.cache.pages import PagePool


class HostPages:
    """A copy of pages, in order. Forks of a sequence share one; the last to let go takes it off the pool's count."""

    def __init__(self, pool: PagePool, pages: Sequence[int]) -> None:
        self.pool, self.nbytes, self._holders = pool, len(pages) * pool.page_bytes, 1
        index = torch.tensor(pages, dtype=torch.int64, device=pool.device)
        self._values = [layer[:, index].cpu() for layer in self._layers()]
        pool.spilled_bytes += self.nbytes

    def write(self, pages: Sequence[int]) -> None:
        """Copy the first len(pages) of them into these pages of the pool."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.pool.device)
        for layer, values in zip(self._layers(), self._values, strict=True):
            layer[:, index] = values[:, : len(pages)].to(self.pool.device)

    def _layers(self) -> Iterator[Tensor]:
        """K and V of all pages [2, num_pages, page_size, num_kv_heads, head_dim], layer by layer."""
        return (layer for storage in self.pool.storages.values() for layer in storage)

    def share(self) -> HostPages:
        self._holders += 1
        return self

    def drop(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.pool.spilled_bytes -= self.nbytes
