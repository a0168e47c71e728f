"""Many requests at once: the scheduler, the runner, and the engine that steps them."""

from __future__ import annotations

from handloom.engine.engine import Engine

__all__ = ["Engine"]
