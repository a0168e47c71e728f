"""Drafts by a smaller model: no more than it has room for, made together, and whatever befalls it harms no request."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from drafting import draft_freely, other_lm, same
from engines import all_free, lm_with, run
from handloom.engine import Engine
from handloom.errors import InvalidParam, RequestFailed, UnsupportedOption
from handloom.lm import LM
from handloom.model.hooks import At
from tiny_models import random_ids, save, tiny_llama

GREEDY: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None}
PROMPTS = [random_ids(i, length) * 2 for i, length in enumerate((5, 12, 2, 21, 8))]


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)


def test_where_the_assistants_cache_is_full_nothing_is_drafted() -> None:
    lm, assistant = lm_with(), other_lm(0.0, num_pages=4)
    plain = lm.generate(PROMPTS[3], **GREEDY)
    ours = lm.generate(PROMPTS[3], **GREEDY, assistant_model=assistant)
    same(ours, plain)
    assert ours.drafts.drafted == 0 and all_free(assistant)


def test_an_assistant_with_a_short_context_stops_drafting_there() -> None:
    lm, assistant = lm_with(), other_lm(0.0)
    assistant.max_context = len(PROMPTS[0]) + 20
    plain = lm.generate(PROMPTS[0], **GREEDY)
    ours = lm.generate(PROMPTS[0], **GREEDY, assistant_model=assistant, num_assistant_tokens=3)
    same(ours, plain)
    assert 0 < ours.drafts.drafted <= 20


def test_a_long_prompt_comes_to_the_assistant_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handloom.decoding.draft_model.MAX_PASS_TOKENS", 10)
    lm = lm_with()
    plain = lm.generate(PROMPTS[3], **GREEDY)
    ours = lm.generate(PROMPTS[3], **GREEDY, assistant_model=other_lm(0.0))
    same(ours, plain)
    assert ours.drafts.accepted > 10


def test_a_pass_of_the_assistant_has_a_limit_however_many_requests_it_drafts_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("handloom.decoding.draft_model.MAX_PASS_TOKENS", 15)
    assistant, passes = other_lm(1e-4), []
    forward = assistant.transformer.forward
    monkeypatch.setattr(
        assistant.transformer,
        "forward",
        lambda batch, *rest: passes.append(len(batch.input_ids)) or forward(batch, *rest),
    )
    lm = lm_with()
    expected = [output.token_ids for output in lm.generate(PROMPTS, **GREEDY)]
    outputs = lm.generate(PROMPTS, assistant_model=assistant, **GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert max(passes) <= 15 and min(output.drafts.accepted for output in outputs) > 0
    assert all_free(assistant)


def test_a_patch_of_the_assistant_that_raises_ends_the_request_it_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(values: torch.Tensor, at: At) -> None:
        assert int(at.positions[-1]) < 14

    assistant, lm = other_lm(0.0), lm_with()
    expected = lm.generate(PROMPTS[2], **GREEDY).token_ids
    engine = Engine(lm)
    short = engine.add_request(PROMPTS[0][:2], assistant_model=assistant, max_new_tokens=6, eos_token_id=None)
    long = engine.add_request(PROMPTS[1], assistant_model=assistant, **GREEDY)
    plain = engine.add_request(PROMPTS[2], **GREEDY)
    with assistant.patch("hook_embed", fails):
        results = run(engine)
    assert results.ends[short].error is None and results.tokens[plain] == expected
    assert isinstance(results.ends[long].error, RequestFailed)
    assert all_free(lm) and all_free(assistant)


def test_without_memory_for_drafts_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assistant, lm = other_lm(1e-4), lm_with()
    monkeypatch.setattr(assistant.transformer, "forward", no_memory)
    output = lm.generate(PROMPTS[0], assistant_model=assistant, **GREEDY)
    assert output.token_ids == lm.generate(PROMPTS[0], **GREEDY).token_ids and output.drafts.drafted == 0
    assert all_free(assistant)


def test_an_engine_keeps_no_assistant_of_requests_that_are_over() -> None:
    assistant, engine = other_lm(0.0), Engine(lm_with())
    engine.add_request(PROMPTS[0], assistant_model=assistant, **GREEDY)
    run(engine)
    assert engine.stats().num_drafted
    gone = weakref.ref(assistant)
    del assistant
    gc.collect()
    assert gone() is None


def test_the_drafts_of_a_batch_are_made_together() -> None:
    lm, assistant = lm_with(800), other_lm(0.0)
    passes = []
    runner = assistant.runner()
    forward = runner.run
    runner.run = lambda works: passes.append(len(works)) or forward(works)  # type: ignore[method-assign]
    assistant.runner = lambda: runner  # type: ignore[method-assign]
    lm.generate(PROMPTS, **GREEDY, assistant_model=assistant, assistant_confidence_threshold=0.0)
    assert passes.count(len(PROMPTS)) > len(passes) / 2


def test_an_assistant_needs_the_same_tokenizer_and_a_cache_of_its_own(tmp_path: Path) -> None:
    lm, assistant = lm_with(), other_lm(0.0)
    with pytest.raises(InvalidParam, match="the model itself"):
        lm.generate(PROMPTS[0], assistant_model=lm)
    smaller = LM.from_pretrained(save(tiny_llama(vocab_size=300), tmp_path, tokenizer=False), kv_cache_tokens=64)
    with pytest.raises(InvalidParam, match="a vocabulary of 300 tokens, the model one of 331"):
        lm.generate(PROMPTS[0], assistant_model=smaller)

    class Other:
        fingerprint = b"another"

    assistant.tokenizer = Other()  # type: ignore[assignment]
    with pytest.raises(InvalidParam, match="another tokenizer"):
        lm.generate(PROMPTS[0], assistant_model=assistant)
    embeddings = lm.transformer.embedding[PROMPTS[0]]
    with pytest.raises(UnsupportedOption, match="embeddings"):
        lm.generate(embeddings, assistant_model=other_lm(0.0))
