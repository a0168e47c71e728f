"""The one input of a forward pass.

This module does not know how a batch is planned (engine/batch.py) or who owns the pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """N tokens of S sequences, end to end without padding; logits are wanted for R of them.

    input_ids [N] int64; positions [N] int64; cu_seqlens [S + 1] int64 (host): where each sequence's
    tokens start; context_lens [S] int64 (host): keys per sequence, this step's included; page_table
    [S, max_pages] int64 (host copy kept beside the device's by the backend that needs one);
    slot_mapping [N] int64: the cache slot each token's K and V go to; logits_rows [R] int64.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    logits_rows: Tensor
