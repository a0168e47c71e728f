"""Drafts that a test knows, and steps that cost nothing, so that drafts are as long as they may be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from handloom.decoding.draft_length import StepTimes
from handloom.decoding.drafters import Draft
from handloom.decoding.speculative import SpeculativeDecoder, Speculator
from handloom.engine import Engine


def draft_freely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and drafts take no longer the more tokens there are."""
    monkeypatch.setattr(StepTimes, "seconds", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(Speculator, "_seconds", lambda self, assistant: 0.0)


class Oracle:
    """Drafts what comes, each token wrong with probability `wrong`."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int], wrong: float, seed: int = 0) -> None:
        self.start, self.output, self.wrong, self.random = len(prompt), output, wrong, random.Random(seed)

    def draft(self, token_ids: Sequence[int], most: int) -> Draft:
        done = len(token_ids) - self.start
        drafted = [
            3 + (token_id + 1) % 300 if self.random.random() < self.wrong else token_id
            for token_id in self.output[done : done + most]
        ]
        return Draft(drafted, 8)


def add_with_oracle(
    engine: Engine, prompt: Any, output: Sequence[int], *, wrong: float = 0.3, luck: int = 0, priority: int = 0,
    **options: Any,
) -> int:  # fmt: skip
    """Add a request whose drafts come from an oracle; its id."""
    decoder = engine.prepare(prompt, {"speculation": "suffix", "num_assistant_tokens": 9, **options})
    assert isinstance(decoder, SpeculativeDecoder)
    decoder.by_text = Oracle(decoder.ids, output, wrong, luck)
    return engine.add(decoder, priority=priority)
