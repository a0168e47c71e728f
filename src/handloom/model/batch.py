"""The one input of a forward pass.

This module does not know how a batch is planned or who owns the pages.
"""

from __future__ import annotations

from dataclasses import dataclass

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
