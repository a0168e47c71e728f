"""A decoder sees inside the model what its own tokens make there, and nobody else's rows change by a bit."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Results, all_free, lm_with, run
from handloom.cache.batch import Work
from handloom.decoding.sample import SampleDecoder
from handloom.engine import Engine
from handloom.errors import HandloomError, InvalidParam, RequestFailed
from handloom.lm import LM
from handloom.model.hooks import Activations, At, Function, Hook
from tiny_models import random_ids

PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 3))]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [], "output_logits": True}
FINAL = "ln_final.hook_normalized"


class Watching(SampleDecoder):
    """Plain decoding with a hook on every work."""

    hook: Hook

    def plan(self) -> Seq[Work]:
        return [work._replace(hook=self.hook) for work in super().plan()]


def watching(engine: Engine, prompt: list[int], function: Function, *points: str, changes: bool = False) -> Watching:
    prepared = engine.prepare(prompt, {**OPTIONS})
    decoder = Watching(prepared.sequence, prepared.params, engine.model.tokenizer)
    decoder.hook = Hook(frozenset(points), function, changes, None)
    return decoder


@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 5}], ids=str)
def test_a_decoders_hook_sees_its_own_tokens_all_of_them_and_others_keep_their_bits(limits: dict[str, int]) -> None:
    lm = lm_with()
    plain = lm.generate(PROMPTS, **OPTIONS)
    engine, acts = Engine(lm, **limits), Activations()
    decoder = watching(engine, PROMPTS[1], acts.add, FINAL, "blocks.0.hook_resid_pre")
    requests = [
        engine.add_request(PROMPTS[0], **OPTIONS),
        engine.add(decoder),
        engine.add_request(PROMPTS[2], **OPTIONS),
    ]
    results, logits = Results(), {request: [] for request in requests}
    while engine.has_work:
        events = engine.step()
        results.take(events)
        for event in events:
            if hasattr(event, "token_id"):
                logits[event.request_id].append(event.logits)
    for request, output in zip(requests, plain, strict=True):
        assert results.tokens[request] == output.token_ids
        assert all(torch.equal(a, b) for a, b in zip(logits[request], output.logits, strict=True))
    assert len(acts) == 1, "one sequence was seen"
    computed = len(PROMPTS[1]) + 5
    assert acts.of(0).positions(FINAL).tolist() == list(range(computed)), "though its first tokens were cached"
    with lm.capture([FINAL, "blocks.0.hook_resid_pre"]) as expected:
        _ = lm.sequence([*PROMPTS[1], *plain[1].token_ids[:5]]).logits
    for point in (FINAL, "blocks.0.hook_resid_pre"):
        assert torch.allclose(acts.of(0)[point], expected[point], atol=1e-5)
    assert all_free(lm)


def shared_pages(lm: LM) -> tuple[float, list[int]]:
    """(share of tokens found in the cache, tokens) of a request without hooks beside one with."""
    engine = Engine(lm)
    engine.add(watching(engine, random_ids(5, 20), lambda values, at: None, FINAL))
    plain = engine.add_request(random_ids(6, 20), **OPTIONS)
    tokens = run(engine).tokens[plain]
    return engine.stats().hit_rate, tokens


def test_beside_a_hooked_request_others_still_share_pages() -> None:
    lm = lm_with()
    first, tokens = shared_pages(lm)
    again, same = shared_pages(lm)
    assert (first, again) == (0.0, 16 / 40)
    assert tokens == same


def raises(values: Tensor, at: At) -> None:
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize(
    ("function", "point", "expected", "words"),
    [
        (raises, FINAL, RequestFailed, f"the hook of {FINAL} raised ZeroDivisionError"),
        (lambda values, at: None, "blocks.7.hook_resid_pre", InvalidParam, "no hook point 'blocks.7.hook_resid_pre'"),
        (lambda values, at: None, "blocks.*", InvalidParam, "no hook point"),
    ],
)
def test_a_decoders_hook_that_fails_ends_its_request_alone(
    function: Function, point: str, expected: type[HandloomError], words: str
) -> None:
    lm = lm_with()
    plain = lm.generate(PROMPTS, **OPTIONS)
    engine = Engine(lm)
    failing = engine.add(watching(engine, PROMPTS[1], function, point))
    others = [engine.add_request(PROMPTS[i], **OPTIONS) for i in (0, 2)]
    results = run(engine)
    assert type(results.ends[failing].error) is expected
    assert words in str(results.ends[failing].error)
    assert [results.tokens[request] for request in others] == [plain[0].token_ids, plain[2].token_ids]
    assert all_free(lm)


def test_a_decoder_may_patch_its_own_rows_and_nobody_finds_its_pages() -> None:
    lm = lm_with()
    plain = lm.generate(PROMPTS, **OPTIONS)
    engine = Engine(lm)

    def steer(values: Tensor, at: At) -> Tensor:
        return values + 1.0

    decoder = watching(engine, PROMPTS[1], steer, "blocks.0.hook_resid_post", changes=True)
    request = engine.add(decoder)
    other = engine.add_request(PROMPTS[0], **OPTIONS)
    results = run(engine)
    with lm.patch("blocks.0.hook_resid_post", steer):
        expected = lm.generate(PROMPTS[1], **OPTIONS).token_ids
    assert results.tokens[request] == expected != plain[1].token_ids
    assert results.tokens[other] == plain[0].token_ids
    assert lm.generate(PROMPTS[1], **OPTIONS).token_ids == plain[1].token_ids
