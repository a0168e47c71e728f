"""LMs over one small random model with pools of any size: what the tests of the engine stand on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handloom.cache.batch import Work, build_batch
from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Event, FinishedEvent, TokenEvent
from handloom.engine import Engine
from handloom.lm import LM
from handloom.ops import choose_backend
from tiny_models import TINY, save

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32},
    "gpt2": {"n_layer": 2},
    "gemma3_text": {"num_hidden_layers": 4},
}
LOGITS_TOLERANCE = 1e-5  # of the largest logit, in float32


@cache
def loaded(family: str, seed: int = 0) -> LM:
    """A tiny model of a family with its tokenizer; do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return LM.from_pretrained(save(TINY[family](seed, **SMALL[family]), Path(folder)), kv_cache_tokens=16)


def lm_with(num_pages: int = 200, page_size: int = 4, family: str = "llama", **settings: Any) -> LM:
    """The tiny model with a pool of its own."""
    lm = loaded(family)
    pool = PagePool(lm.spec, num_pages, page_size, dtype=lm.dtype, device=lm.device)
    poison(pool)
    return LM(lm.transformer, lm.tokenizer, pool, name=family, **settings)


def poison(pool: PagePool) -> None:
    """Fill every page with NaN: whoever reads what was not written finds out."""
    for storage in pool.storages.values():
        storage.fill_(torch.nan)


def fresh_logits(lm: LM, ids: Iterable[int]) -> Tensor:
    """Logits after the last of `ids`, computed in one forward pass over a pool of their own."""
    ids = list(ids)
    pool = lm_with(1, len(ids), lm.name).pool
    batch = build_batch([Work(Sequence(pool, ids), len(ids), "last")], pool)
    return lm.transformer.forward(batch, pool.layers)[0]


def close(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours - expected).abs().max() <= LOGITS_TOLERANCE * expected.abs().max())


def all_free(lm: LM) -> bool:
    return lm.pool.num_free == lm.pool.num_pages


class Results:
    """What the events of an engine said, by request id."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.ends: dict[int, FinishedEvent] = {}

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            assert event.request_id not in self.ends, "an event after the last one"
            if isinstance(event, TokenEvent):
                self.tokens.setdefault(event.request_id, []).append(event.token_id)
            if isinstance(event, FinishedEvent):
                self.ends[event.request_id] = event
            if not hasattr(event, "logprobs"):
                self.texts[event.request_id] = self.texts.get(event.request_id, "") + event.text


def run(engine: Engine, results: Results | None = None, max_steps: int = 10_000) -> Results:
    """Step until nothing is left; fails where the engine makes no progress."""
    results = results or Results()
    for _ in range(max_steps):
        if not engine.has_work:
            return results
        results.take(engine.step())
    raise AssertionError(f"the engine still has work after {max_steps} steps")


def lm_in_float64(num_pages: int = 200, page_size: int = 4, family: str = "llama") -> LM:
    """The tiny model and its pool in float64, where the order in which tokens run moves no logit by more than 1e-12:
    two ways to compute the same tokens agree unless one of them is wrong. The logits themselves come out in float32."""
    lm = loaded(family)
    weights = {name: weight.double() for name, weight in lm.transformer.weights.items()}
    pool = PagePool(lm.spec, num_pages, page_size, dtype=torch.float64, device=lm.device)
    poison(pool)
    backend = choose_backend(lm.device, "torch")
    return LM(type(lm.transformer)(lm.spec, weights, backend), lm.tokenizer, pool, name=family)
