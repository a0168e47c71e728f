"""The one input of a forward pass.

This module does not know how a batch is planned or who owns the pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Hidden states given by the caller in place of token embeddings: rows [E] int64 of the batch, values [E, H]."""

    rows: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """N tokens of S sequences, end to end without padding; logits are wanted for R of them.

    input_ids, positions [N] int64; cu_seqlens [S + 1] int64: where each sequence's tokens start;
    context_lens [S] int64: keys per sequence, this step's included; page_table [S, max_pages] int64,
    zero past a sequence's last page; slot_mapping [N] int64: the cache slot each token's K and V go to;
    logits_rows [R] int64: which of the N rows want logits; query_lens: how many tokens each sequence has in this step,
    known without asking the device; embeddings: rows that bring their own.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    logits_rows: Tensor
    query_lens: tuple[int, ...]
    embeddings: Embeddings | None = None


@dataclass(slots=True)
class HostBatch:
    """A ForwardBatch as the host makes it, in plain numbers.

    page_tables: of each sequence, those of its pages that have anything in this step; embedded_rows, embedded: the rows
    of `Embeddings`, and its values in parts.
    """

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cu_seqlens: list[int] = field(default_factory=lambda: [0])
    context_lens: list[int] = field(default_factory=list)
    page_tables: list[list[int]] = field(default_factory=list)
    slot_mapping: list[int] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    embedded_rows: list[int] = field(default_factory=list)
    embedded: list[Tensor] = field(default_factory=list)

    def on(self, device: torch.device) -> ForwardBatch:
        """The tensors, all of int64 in one transfer; each begins at a multiple of 16 bytes, as kernels like it."""
        table, width = self.page_table()
        lists = [self.input_ids, self.positions, self.cu_seqlens, self.context_lens, table, self.slot_mapping]
        lists += [self.logits_rows, self.embedded_rows]
        even = [x for own in lists for x in (*own, *[0] * (len(own) % 2))]
        sizes = [size for own in lists for size in (len(own), len(own) % 2)]
        parts = torch.tensor(even, dtype=torch.int64, device=device).split(sizes)[::2]
        input_ids, positions, cu_seqlens, context_lens, pages, slot_mapping, logits_rows, places = parts
        return ForwardBatch(
            input_ids=input_ids,
            positions=positions,
            cu_seqlens=cu_seqlens,
            context_lens=context_lens,
            page_table=pages.view(len(self.page_tables), width),
            slot_mapping=slot_mapping,
            logits_rows=logits_rows,
            query_lens=tuple(self.query_lens),
            embeddings=Embeddings(places, torch.cat(self.embedded)) if self.embedded else None,
        )

    def page_table(self) -> tuple[list[int], int]:
        """Page tables one after the other, zeros making each as wide as the widest; and that width."""
        width, flat = max(map(len, self.page_tables)), list[int]()
        for pages in self.page_tables:
            flat += pages
            flat += [0] * (width - len(pages))
        return flat, width
