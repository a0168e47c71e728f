"""A device that runs out of memory while steps grow, or in flight: said in bytes by owner, survived, no token lost."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Results, all_free, lm_in_float64, run
from flights import flying, stream_of, tokens_of
from handloom.engine import Engine
from handloom.errors import OutOfMemory
from handloom.lm import LM
from handloom.model.transformer import Transformer
from late_stream import LateStream
from tiny_models import random_ids

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": []}
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (random_ids(i, 5), {**GREEDY, "max_new_tokens": 30 - 4 * i}) for i in range(4)
]


class ShortOfMemory(LateStream):
    """A queue with no memory for its captures and uploads of these numbers."""

    def __init__(self, captures: tuple[int, ...] = (), uploads: tuple[int, ...] = ()) -> None:
        super().__init__(3)
        self.bad = {"capture": captures, "upload": uploads}
        self.counts = dict.fromkeys(self.bad, 0)

    def _check(self, what: str) -> None:
        self.counts[what] += 1
        if self.counts[what] in self.bad[what]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def capture(self, step: Any) -> Any:
        self._check("capture")
        return super().capture(step)

    def upload(self, values: Tensor, into: Tensor) -> None:
        self._check("upload")
        super().upload(values, into)


def tokens(lm: LM) -> tuple[Results, Engine]:
    engine = Engine(lm)
    for prompt, options in REQUESTS:
        engine.add_request(prompt, **options)
    return run(engine), engine


@pytest.mark.parametrize("captures", [(2,), (3,), (2, 3), (1, 2, 3)])
def test_no_memory_for_a_wider_step_as_contexts_grow(
    captures: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Pages of 4 and tables of 2, 4, 8 and 16 pages: each has to be captured when the contexts have grown so far."""
    stream = ShortOfMemory(captures=captures)
    lm = flying(lm_in_float64(), stream, min_width=2)
    with caplog.at_level(logging.WARNING, "handloom"):
        ours, engine = tokens(lm)
    assert ours.tokens == tokens(lm_in_float64())[0].tokens and all_free(lm)
    assert stream.counts["capture"] >= max(captures), "it came to the captures that fail"
    weights = sum(weight.nbytes for weight in lm.transformer.weights.values())
    assert f"weights {weights}, KV cache {lm.pool.num_pages * lm.pool.page_bytes}" in caplog.text
    assert lm.graphs is not None and lm.graphs.max_rows < 4
    assert engine.stats().other_decode_steps


@pytest.mark.parametrize("uploads", [(1,), (4,), (6,), (9,), (5, 12)])
def test_no_memory_in_the_middle_of_a_flight(uploads: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    """Five uploads begin a flight, later ones say a step's pages while others are queued."""
    stream = ShortOfMemory(uploads=uploads)
    lm = flying(lm_in_float64(), stream)
    with caplog.at_level(logging.WARNING, "handloom"):
        ours, _ = tokens(lm)
    assert ours.tokens == tokens(lm_in_float64())[0].tokens and all_free(lm)
    assert stream.counts["upload"] > max(uploads)
    assert caplog.text.count("no memory for a step of 4 tokens") == sum(upload <= 5 for upload in uploads)
    assert caplog.text.count("no memory to queue a step") == sum(upload > 5 for upload in uploads)
    assert caplog.text.count(f"KV cache {lm.pool.num_pages * lm.pool.page_bytes}, decode steps") == len(uploads)


def test_no_memory_to_capture_makes_steps_smaller(caplog: pytest.LogCaptureFixture) -> None:
    requests = [(random_ids(i, 5), GREEDY | {"max_new_tokens": 12 - i}) for i in range(6)]
    lm = flying(lm_in_float64())
    stream_of(lm).fails = 1
    with caplog.at_level(logging.WARNING, "handloom"):
        engine = Engine(lm)
        for prompt, options in requests:
            engine.add_request(prompt, **options)
        ours = run(engine)
    assert ours.tokens == tokens_of(lm_in_float64(), requests).tokens
    assert lm.graphs is not None and lm.graphs.max_rows == 4, "6 rows take a step of 8, and the next smaller is 4"
    assert engine.stats().num_captured_steps > 0 and engine.stats().other_decode_steps
    weights = sum(weight.nbytes for weight in lm.transformer.weights.values())
    assert f"weights {weights}, KV cache {lm.pool.num_pages * lm.pool.page_bytes}" in caplog.text


def test_no_memory_for_an_eager_step_makes_steps_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [(random_ids(i, 9), GREEDY | {"max_new_tokens": 8}) for i in range(4)]
    expected = tokens_of(lm_in_float64(), requests)
    lm = flying(lm_in_float64())
    forward = Transformer.forward

    def with_little_memory(self: Transformer, batch: Any, *rest: Any) -> torch.Tensor:
        if len(batch.input_ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch, *rest)

    monkeypatch.setattr(Transformer, "forward", with_little_memory)
    ours = tokens_of(lm, requests)
    assert ours.tokens == expected.tokens and all_free(lm)


def test_no_memory_for_one_token_is_an_error_that_says_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    lm = lm_in_float64()
    engine = Engine(lm)
    engine.add_request(random_ids(1, 9), **GREEDY, max_new_tokens=8)
    monkeypatch.setattr(Transformer, "forward", without_memory)
    with pytest.raises(OutOfMemory, match=r"one token; .*weights \d+, KV cache \d+"):
        engine.step()
    monkeypatch.undo()
    assert len(run(engine).tokens[0]) == 8, "no request is lost"
