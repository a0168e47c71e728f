"""Runs one planned step on the model, kernel by kernel.

This module does not know requests, how tokens are chosen, or captured steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized

from torch import Tensor

from handloom.cache.batch import Work, build_batch
from handloom.cache.pages import PagePool
from handloom.errors import HandloomError
from handloom.model.hooks import Hooks
from handloom.model.transformer import Transformer


class Runner:
    """A model, the pages it writes to, and the hooks that may be open on it."""

    def __init__(self, transformer: Transformer, pool: PagePool, hooks: Hooks) -> None:
        self.transformer, self.pool, self.hooks = transformer, pool, hooks

    def forward(self, works: Iterable[Work], owners: Sequence[Sized] | None = None) -> Tensor:
        """Logits [R, vocab_size] float32 of the works' rows, in order. A sequence that a patch saw is private then.

        owners: whose hooks each work runs under, by default its sequence's. Raises OutOfPages, and the first error of
        a patch.
        """
        logits, errors = self.run(works, owners)
        for error in errors.values():
            raise error
        return logits

    def run(
        self, works: Iterable[Work], owners: Sequence[Sized] | None = None
    ) -> tuple[Tensor, Mapping[int, HandloomError]]:
        """As `forward`, and what went wrong in whose hook: errors by index of the work, whose rows are void."""
        works = list(works)
        batch = build_batch(works, self.pool)
        own = [work.hook for work in works]
        if not self.hooks and not any(own):
            return self.transformer.forward(batch, self.pool.layers), {}
        tensors = batch.on(self.pool.device)
        hooks = self.hooks.step(owners or [work.sequence for work in works], tensors, own)
        if hooks is None:
            return self.transformer.forward(batch, self.pool.layers), {}
        for which in hooks.patched:
            works[which].sequence.private = True
        return self.transformer.forward(tensors, self.pool.layers, hooks), hooks.errors
