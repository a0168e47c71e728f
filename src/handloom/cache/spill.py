"""K and V of a sequence in host memory, while others have its pages.

On a CPU, host memory is the memory the pages are in: they are copied there, too, and counted.
This module does not know which sequences are moved, or when they come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from handloom.cache.pages import PagePool


class HostPages:
    """A copy of pages, in order. Forks of a sequence share one; the last to let go takes it off the pool's count."""

    def __init__(self, pool: PagePool, pages: Sequence[int]) -> None:
        self.pool, self.nbytes, self._holders = pool, len(pages) * pool.page_bytes, 1
        index = torch.tensor(pages, dtype=torch.int64, device=pool.device)
        self._values = [storage[:, :, index].cpu() for storage in pool.storages.values()]
        pool.spilled_bytes += self.nbytes

    def write(self, pages: Sequence[int]) -> None:
        """Copy the first len(pages) of them into these pages of the pool."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.pool.device)
        for storage, values in zip(self.pool.storages.values(), self._values, strict=True):
            storage[:, :, index] = values[:, :, : len(pages)].to(self.pool.device)

    def share(self) -> HostPages:
        self._holders += 1
        return self

    def drop(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.pool.spilled_bytes -= self.nbytes
