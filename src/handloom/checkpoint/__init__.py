"""Checkpoints: from a name that a user types to tensors that can be read one at a time."""

from __future__ import annotations

from handloom.checkpoint.source import open_checkpoint
from handloom.checkpoint.types import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
