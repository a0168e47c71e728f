"""From sequences to the input of one forward pass.

This module does not know why these sequences run, or what becomes of the logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.model.batch import HostBatch
from handloom.model.hooks import Hook


class Work(NamedTuple):
    """Run the next num_tokens tokens of a sequence: pending ones, then drafted ones. Logits of none, the last, or all.

    hook: called with what passes its points (names as in `LM.hook_points`, without `*`) in these tokens alone. Work
    with a hook takes no pages over that others have computed, since no hook would see those tokens.
    """

    sequence: Sequence
    num_tokens: int
    logits: Literal["none", "last", "all"]
    hook: Hook | None = None

    @property
    def num_rows(self) -> int:
        """Rows of logits this work yields."""
        return self.num_tokens if self.logits == "all" else int(self.logits == "last")

    @property
    def needs_every_token(self) -> bool:
        """Whether all that is pending has to run here, so that nothing may be taken over from others."""
        return self.logits == "all" or self.hook is not None


def build_batch(works: Iterable[Work], pool: PagePool) -> HostBatch:
    """Lay the works end to end. Grows the sequences' page tables. Raises OutOfPages."""
    batch, page_size = HostBatch(), pool.page_size
    for sequence, num_tokens, logits, _ in works:
        start, first = len(batch.input_ids), sequence.num_computed
        stop, end = start + num_tokens, first + num_tokens
        batch.slot_mapping += sequence.slots(num_tokens)
        batch.input_ids += sequence.token_ids[first:end]
        batch.input_ids += sequence.ahead[: stop - len(batch.input_ids)]
        if first < sequence.num_embeddings:
            assert sequence.embeddings is not None
            values = sequence.embeddings[first:end]
            batch.embedded.append(values)
            batch.embedded_rows += range(start, start + len(values))
            batch.input_ids[start : start + len(values)] = [0] * len(values)
        batch.positions += range(first, end)
        if logits != "none":
            batch.logits_rows += range(start if logits == "all" else stop - 1, stop)
        batch.cu_seqlens.append(stop)
        batch.query_lens.append(num_tokens)
        context = end - sequence.num_evicted
        batch.context_lens.append(context)
        batch.page_tables.append(sequence.page_table[: -(-context // page_size)])
    return batch
