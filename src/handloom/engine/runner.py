"""Runs one planned step on the model.

Today every step is an eager forward pass; captured graphs will live here.
This module does not know requests or how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from handloom.cache.batch import Work, build_batch
from handloom.cache.pages import PagePool
from handloom.model.transformer import Transformer


class Runner:
    """A model and the pages it writes to."""

    def __init__(self, transformer: Transformer, pool: PagePool) -> None:
        self.transformer, self.pool = transformer, pool

    def forward(self, works: Iterable[Work]) -> Tensor:
        """Logits [R, vocab_size] float32 of the works' rows, in order. Raises OutOfPages."""
        return self.transformer.forward(build_batch(works, self.pool), self.pool.layers)
