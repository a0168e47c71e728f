"""Whatever modes and options meet in one engine, with too few pages, in chunks, while others come, go, pause and end:
every request has the tokens, text and numbers it has alone, and every page comes back."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from drafting import draft_freely
from engines import all_free, lm_in_float64
from features import CUT, EOS, FEATURES, KNOBS
from flights import flying
from handloom.decoding.decoder import Event, FinishedEvent, HealedEvent, SampleFinishedEvent, TokenEvent
from handloom.engine import Engine
from handloom.errors import HandloomError, OutOfPages
from late_stream import LateStream
from tiny_models import random_ids

ASSISTANT, ALONE = lm_in_float64(), lm_in_float64(400)
BEGINNINGS = [random_ids(i, 30) for i in range(3)]
GIVEN_OTHERWISE = {
    "streamer", "max_time", "token_healing", "contrastive", "DoLa", "guidance", "prompt_lookup_num_tokens",
    "speculation", "structure",
}  # fmt: skip
FREE = [FEATURES[name] for name in FEATURES if name not in GIVEN_OTHERWISE]
SAMPLES, BEAMS = {"num_return_sequences": 3}, {"num_beams": 3, "num_return_sequences": 2}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "samples": {**SAMPLES, "do_sample": True},
    "beams": BEAMS,
    "patient beams": {**BEAMS, "early_stopping": "never", "length_penalty": -1.0},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 3},
    "words": {"num_beams": 3, "force_words_ids": [[9, 10], [11]]},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": [0, 2]},
    "guidance": {"guidance_scale": 1.7},
    "guided samples": {"guidance_scale": 1.7, "negative_prompt_ids": random_ids(8, 9), **SAMPLES, "do_sample": True},
    "guided beams": {"guidance_scale": -0.5, "negative_prompt_ids": random_ids(8, 9), **BEAMS},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "suffix": {"speculation": "suffix", "num_assistant_tokens": 6},
    "a model": {"assistant_model": ASSISTANT, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0},
    "healing": {"token_healing": True},
    "grammar": {"regex": "[a-z]{5}|(ab|cd){3,9}"},
    "drafted grammar": {"speculation": "suffix", "regex": "[a-zA-Z0-9 ,.]*"},
}


def draw(chance: random.Random) -> tuple[list[int], dict[str, Any]]:
    """A prompt, and options that may contradict each other."""
    mode = chance.choice(list(MODES))
    options: dict[str, Any] = {"max_new_tokens": chance.choice((1, 2, 7, 12, 25)), **MODES[mode]}
    options["eos_token_id"] = chance.choice((EOS, [], chance.randrange(3, 331), chance.sample(range(3, 331), 60)))
    for feature in chance.sample(FREE, chance.choice((0, 0, 1, 1, 2, 4))):
        options = {**feature.options, **feature.ours, **options}
    knobs = KNOBS - {"top_k"} if "penalty_alpha" in options else KNOBS
    if knobs & options.keys() or chance.random() < 0.3:
        options["do_sample"] = True
    if options.get("do_sample"):
        options["seed"] = chance.randrange(2**64)
    prompt = chance.choice(BEGINNINGS)[: chance.randint(1, 30)] + random_ids(chance.randrange(99), chance.randint(0, 5))
    return (CUT if mode == "healing" and chance.random() < 0.5 else prompt), options


def said(events: Iterable[Event]) -> tuple[list[Any], list[torch.Tensor]]:
    """What events say, by output: what must be equal, and numbers that may differ in their last bits."""
    outputs: dict[int, list[Any]] = {}
    exact: list[Any] = []
    numbers: list[torch.Tensor] = []
    for event in sorted(events, key=lambda event: getattr(event, "sample", -1)):
        if isinstance(event, TokenEvent):
            own = outputs.setdefault(event.sample, [[], ""])
            own[0].append(event.token_id)
            own[1] += event.text
            seen = (event.seen.hidden_states or ()) + (event.seen.attentions or ())
            numbers += [value for value in (event.scores, event.logits, *seen) if value is not None]
            numbers += [torch.tensor(value) for value in (event.logprob,) if value is not None]
        elif isinstance(event, HealedEvent):
            exact.append((event.token_ids, event.text))
        elif isinstance(event, FinishedEvent | SampleFinishedEvent):
            exact.append((event.reason, event.text, event.stop_string, repr(event.error)))
            past = event.past_key_values or []
            numbers += [tensor for layer in past for tensor in layer]
            if isinstance(event, SampleFinishedEvent) and event.search is not None:
                exact.append(event.search.beam_indices)
                numbers += [torch.tensor(event.search.score), *(event.search.scores or ())]
    return [*exact, outputs], numbers


def live(seed: int) -> int:
    """One engine from its first request to its last; returns how many were compared."""
    chance = random.Random(seed)
    page_size, tokens = chance.choice((4, 1, 7, 16)), chance.choice((120, 240, 700))
    lm = lm_in_float64(-(-tokens // page_size), page_size)
    if chance.random() < 0.3:
        lm = flying(lm, LateStream(seed))
    spill_bytes = chance.choice((None, 0, 30 * lm.pool.page_bytes))
    engine = Engine(
        lm, max_step_tokens=chance.choice((512, 30, 7)), max_running=chance.choice((9, 3, 2)),
        prefix_cache=chance.random() < 0.8, spill_bytes=spill_bytes,
    )  # fmt: skip
    asked: dict[int, tuple[list[int], dict[str, Any]]] = {}
    events: dict[int, list[Event]] = {}
    open_: set[int] = set()
    left = chance.randint(4, 12)
    for _ in range(2000):
        luck = chance.random()
        if left and luck < 0.3:
            left -= 1
            prompt, options = draw(chance)
            try:
                request = engine.add_request(prompt, priority=chance.randint(-1, 1), **options)
            except HandloomError:  # they do go against each other
                continue
            asked[request], events[request] = (prompt, options), []
            open_.add(request)
        elif open_ and luck < 0.32:
            request = chance.choice(sorted(open_))
            assert engine.abort(request)
            open_.remove(request)
            del asked[request]
        elif open_ and luck < 0.36:
            engine.pause(chance.choice(sorted(open_)))
        elif open_ and (luck < 0.42 or not engine.has_work):
            for request in open_:
                engine.resume(request)
        elif not engine.has_work and not left:
            break
        for event in engine.step():
            events[event.request_id].append(event)
            if isinstance(event, FinishedEvent):
                open_.remove(event.request_id)
    assert not left and not open_ and not list(engine.scheduler)
    assert all_free(lm) and all_free(ASSISTANT) and lm.pool.spilled_bytes == 0
    compared = 0
    for request, (prompt, options) in asked.items():
        if isinstance(getattr(events[request][-1], "error", None), OutOfPages):
            continue
        alone = Engine(ALONE)
        alone.add_request(prompt, **options)
        (exact, numbers), (expected, close) = said(events[request]), said(alone.run())
        assert exact == expected, (seed, prompt, options)
        assert len(numbers) == len(close)
        for ours, theirs in zip(numbers, close, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        compared += 1
    assert all_free(ALONE)
    return compared


@pytest.mark.parametrize("first", range(3))
def test_all_modes_and_options_beside_each_other(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)
    assert sum(live(seed) for seed in range(8 * first, 8 * first + 8)) > 10


@pytest.mark.slow
def test_all_modes_and_options_beside_each_other_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)
    assert sum(live(seed) for seed in range(1000, 1400)) > 1000
