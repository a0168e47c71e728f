"""What the engine needs of a loaded model.

This module does not know how one is loaded.
"""

from __future__ import annotations

from typing import Any, Protocol

from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.engine.graphs import DecodeGraphs
from handloom.model.hooks import Hooks
from handloom.model.transformer import Transformer
from handloom.sampling.grammar import Grammars
from handloom.text.tokenizer import Tokenizer


class Model(Protocol):
    """What the engine needs of a loaded model; `handloom.LM` is one."""

    transformer: Transformer
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    max_context: int
    pool: PagePool
    hooks: Hooks
    grammars: Grammars | None
    graphs: DecodeGraphs | None

    def encode(self, prompt: Any) -> Sequence: ...
