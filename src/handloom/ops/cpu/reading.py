"""Reading memory as the product of one row with a weight does, to learn how fast that can be.

This module does not know models, or what is made of the rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from handloom.ops.cpu import blocks
from handloom.ops.cpu.instructions import Frame
from handloom.ops.cpu.machine import Machine, in_order, table_of
from handloom.ops.panels import PANEL, Panels, format_of

DEPTH = 1024
PANEL_BYTES = DEPTH * PANEL * 4
"""Of a panel in float32: of whole ones all is read."""


def reader(data: Tensor) -> Callable[[], Tensor]:
    """A function that reads a contiguous tensor once, as far as it fills panels: the product of a row of ones."""
    whole = data.flatten()[: data.numel() // (DEPTH * PANEL) * DEPTH * PANEL].view(-1, DEPTH, PANEL)
    weight = Panels(whole, torch.Size((len(whole) * PANEL, DEPTH)), format_of(data.dtype))
    row, out = torch.ones(1, DEPTH, device="cpu"), torch.empty(1, len(whole) * PANEL, device="cpu")
    steps = blocks.linear(row, weight, None, out)
    table, entries = table_of(steps), in_order({Frame.TOKENS: 1})
    machine, scratch, kept = Machine(), blocks.scratch_bytes(steps), blocks.split_bytes(steps)

    def read(*_held: Tensor) -> Tensor:
        machine.run(table, scratch, kept, entries)
        return out

    return partial(read, row, whole)  # the table has no more than their addresses
