"""A request that is over is gone, and all that it held: no engine keeps it, and no cycle of references until the next
collection, for it may hold tensors as large as its context."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from engines import lm_in_float64, lm_with
from flights import flying
from handloom.engine import Engine
from tiny_models import random_ids

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 1},
    "rules": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[7, 8]]},
    "samples": {"do_sample": True, "seed": 1, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "words": {"num_beams": 3, "force_words_ids": [[7]]},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 3},
    "DoLa": {"dola_layers": "high"},
    "guidance": {"guidance_scale": 1.5},
    "suffix": {"speculation": "suffix"},
    "a model": {"assistant_model": lm_in_float64()},
    "healing": {"token_healing": True},
    "grammar": {"regex": "[a-z]*"},
    "scores": {"output_scores": True, "output_hidden_states": True},
}


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("device", ["host", "ahead of the host"])
@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_is_over_is_gone(mode: str, device: str) -> None:
    engine = Engine(lm_with() if device == "host" else flying(lm_with()))
    decoder = engine.prepare(random_ids(3, 12), {"max_new_tokens": 6, "eos_token_id": [], **MODES[mode]})
    held = weakref.ref(decoder), weakref.ref(decoder.sequence)
    engine.add(decoder)
    del decoder
    events = list(engine.run())
    assert events[-1].reason in ("length", "eos")
    del events
    assert [each() for each in held] == [None, None]
