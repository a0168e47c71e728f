"""A sequence as an object: read its logits, append, rewind, fork, continue.

This module does not know requests or decoding modes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from handloom.cache.batch import Work, build_batch
from handloom.cache.sequence import Sequence
from handloom.engine.engine import MAX_STEP_TOKENS
from handloom.errors import ContextOverflow, InvalidPrompt
from handloom.prompts import check_token_ids

if TYPE_CHECKING:
    from handloom.lm import LM


class LiveSequence(Sequence):
    """A sequence of one model. `lm.generate(sequence)` continues it in place.

    Its pages go back to the pool when it is freed, closed as a context manager, or collected.
    """

    def __init__(self, lm: LM, source: Sequence) -> None:
        super().__init__(lm.pool, source.token_ids[source.num_embeddings :], source.embeddings)
        self.lm = lm
        self.num_computed, self.page_table = source.num_computed, source.page_table
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Next-token logits [vocab_size] float32 after the last token, the caller's to edit; computes what is pending.

        Raises InvalidPrompt for an empty sequence, OutOfPages.
        """
        if not len(self):
            raise InvalidPrompt("the sequence is empty, so it has no logits; append a token to it first")
        if self._logits is None or self.num_pending:
            if self.num_pending == 0:
                self.forget(len(self) - 1)
            while self.num_pending:
                num_tokens = min(self.num_pending, MAX_STEP_TOKENS)
                last = num_tokens == self.num_pending
                batch = build_batch([Work(self, num_tokens, "last" if last else "none")], self.pool)
                logits = self.lm.transformer.forward(batch, self.pool.layers)
                self.num_computed += num_tokens
            self._logits = logits[0]
        return self._logits.clone()

    @property
    def text(self) -> str:
        """The text of all its tokens, special ones spelled out. Raises InvalidPrompt without a tokenizer."""
        return self.lm.decode(self.token_ids[self.num_embeddings :])

    def append(self, token_ids: int | np.integer[Any] | Tensor | Seq[int]) -> None:
        """Add one token id (a tensor with one element, too) or several. Raises InvalidPrompt, ContextOverflow."""
        if isinstance(token_ids, Tensor) and token_ids.dim() == 0:
            token_ids = token_ids.unsqueeze(0)
        many = [token_ids] if isinstance(token_ids, int | np.integer) else token_ids
        ids = check_token_ids(many, self.lm.spec.vocab_size)
        if len(self) + len(ids) > self.lm.max_context:
            raise ContextOverflow(
                f"{len(self)} + {len(ids)} tokens exceed the context of {self.lm.max_context}; rewind, or start anew"
            )
        self.token_ids += ids
        self._logits = None

    def rewind(self, num_tokens: int) -> None:
        """Take the last num_tokens tokens back. Raises InvalidParam."""
        super().rewind(num_tokens)
        self._logits = None

    def fork(self) -> LiveSequence:
        """A second sequence with the same past; pages are shared until one of the two writes to them."""
        child = LiveSequence(self.lm, super().fork())
        child._logits = self._logits
        return child

    def __repr__(self) -> str:
        return f"LiveSequence({len(self)} tokens, {self.num_computed} computed, of {self.lm!r})"

    def __enter__(self) -> LiveSequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __del__(self) -> None:
        if hasattr(self, "page_table"):
            self.free()
