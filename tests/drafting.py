"""Drafts that a test knows, and steps that cost nothing, so that drafts are as long as they may be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engines import lm_in_float64, lm_with
from handloom.cache.pages import PagePool
from handloom.decoding.draft_length import StepTimes
from handloom.decoding.drafters import Draft
from handloom.decoding.speculative import SpeculativeDecoder, Speculator
from handloom.engine import Engine
from handloom.lm import LM


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


def other_lm(noise: float, **pool: int) -> LM:
    """The tiny model on a pool of its own, its weights moved a little."""
    lm = lm_with(**{"num_pages": 400, **pool})
    if not noise:
        return lm
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: weight + noise * torch.randn(weight.shape, generator=generator)
        for name, weight in lm_in_float64().transformer.weights.items()
    }
    pool_ = PagePool(lm.spec, 400, 4, dtype=torch.float64, device=lm.device)
    return LM(type(lm.transformer)(lm.spec, weights, lm_in_float64().backend), lm.tokenizer, pool_, name="noisy")


def same(ours: Any, plain: Any) -> None:
    assert ours.token_ids == plain.token_ids
    assert (ours.text, ours.finish_reason, ours.stop_string) == (plain.text, plain.finish_reason, plain.stop_string)
    assert (ours.logprobs, ours.top_logprobs) == (plain.logprobs, plain.top_logprobs)
    for name in ("scores", "logits"):
        own, expected = getattr(ours, name), getattr(plain, name)
        assert (own is None) == (expected is None)
        assert own is None or all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
