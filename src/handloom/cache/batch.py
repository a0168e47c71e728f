"""From sequences to the tensors of one forward pass.

This module does not know why these sequences run, or what becomes of the logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.model.batch import Embeddings, ForwardBatch
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
        return {"none": 0, "last": 1, "all": self.num_tokens}[self.logits]

    @property
    def needs_every_token(self) -> bool:
        """Whether all that is pending has to run here, so that nothing may be taken over from others."""
        return self.logits == "all" or self.hook is not None


def build_batch(works: Iterable[Work], pool: PagePool) -> ForwardBatch:
    """Lay the works end to end. Grows the sequences' page tables. Raises OutOfPages."""
    ids: list[int] = []
    positions: list[int] = []
    starts = [0]
    query_lens: list[int] = []
    contexts: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    tables: list[list[int]] = []
    embedded_rows: list[int] = []
    embedded: list[torch.Tensor] = []
    for sequence, num_tokens, logits, _ in works:
        first, end = sequence.num_computed, sequence.num_computed + num_tokens
        slots += sequence.slots(num_tokens)
        ids += sequence.token_ids[first:end] + sequence.ahead[: max(0, end - len(sequence))]
        if sequence.embeddings is not None and first < sequence.num_embeddings:
            values = sequence.embeddings[first:end]
            embedded_rows += range(starts[-1], starts[-1] + len(values))
            embedded.append(values)
        positions += range(first, end)
        rows += {"none": [], "last": [starts[-1] + num_tokens - 1], "all": range(starts[-1], starts[-1] + num_tokens)}[
            logits
        ]
        starts.append(starts[-1] + num_tokens)
        query_lens.append(num_tokens)
        context = end - sequence.num_evicted
        contexts.append(context)
        tables.append(sequence.page_table[: -(-context // pool.page_size)])
    width = max(map(len, tables))
    for row in embedded_rows:
        ids[row] = 0
    table = [page for pages in tables for page in (*pages, *[0] * (width - len(pages)))]
    parts = _tensors([ids, positions, starts, contexts, table, slots, rows, embedded_rows], pool.device)
    input_ids, at, cu_seqlens, lengths, pages, slot_mapping, logits_rows, places = parts
    return ForwardBatch(
        input_ids=input_ids,
        positions=at,
        cu_seqlens=cu_seqlens,
        context_lens=lengths,
        page_table=pages.view(len(tables), width),
        slot_mapping=slot_mapping,
        logits_rows=logits_rows,
        query_lens=tuple(query_lens),
        embeddings=Embeddings(places, torch.cat(embedded)) if embedded else None,
    )


def _tensors(lists: list[list[int]], device: torch.device) -> list[torch.Tensor]:
    """Each list as int64 [n], all in one transfer; each begins at a multiple of 16 bytes, as kernels like it."""
    packed = torch.tensor([x for own in lists for x in (*own, *[0] * (len(own) % 2))], dtype=torch.int64, device=device)
    sizes = [size for own in lists for size in (len(own), len(own) % 2)]
    return list(packed.split(sizes)[::2])
