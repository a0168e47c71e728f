"""A caller may change a sequence of theirs between the steps of a request that goes on from it: whatever the mode, the
request goes on from what is there then, and nobody else hears of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from drafting import draft_freely
from engines import all_free, lm_in_float64, run
from handloom.decoding.decoder import TokenEvent
from handloom.engine import Engine
from handloom.live import LiveSequence
from tiny_models import random_ids

PROMPT = random_ids(4, 18)
OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": []}
REPEATS = {"suppress_tokens": [*range(70), *range(73, 331)]}  # endings that were there before, so that drafts are found
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rules": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "internals": {"output_hidden_states": True, "output_attentions": True},
    "suffix": {**REPEATS, "speculation": "suffix", "num_assistant_tokens": 3},
    "lookup": {**REPEATS, "prompt_lookup_num_tokens": 3},
    "a model": {**REPEATS, "assistant_model": lm_in_float64(), "num_assistant_tokens": 3},
    "DoLa": {"dola_layers": "high"},
}
CHANGES: dict[str, Callable[[LiveSequence], object]] = {
    "rewound": lambda sequence: sequence.rewind(9),
    "rewound far": lambda sequence: sequence.rewind(len(sequence) - 2),
    "rewritten": lambda sequence: (sequence.rewind(9), sequence.append(random_ids(1, 9))),
    "appended to": lambda sequence: sequence.append(random_ids(1, 3)),
    "appended to and computed": lambda sequence: (sequence.append(random_ids(1, 3)), sequence.logits),
}


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", MODES)
def test_a_request_goes_on_from_its_sequence_as_it_is_now(mode: str, change: str) -> None:
    lm = lm_in_float64()
    other_alone = lm.generate(random_ids(9, 5), **OPTIONS).token_ids
    sequence, engine = lm.sequence(PROMPT), Engine(lm)
    request = engine.add_request(sequence, **OPTIONS, **MODES[mode])
    other = engine.add_request(random_ids(9, 5), **OPTIONS)
    others: list[int] = []
    for _ in range(14):
        if len(sequence) >= len(PROMPT) + 14:
            break
        told = [event for event in engine.step() if isinstance(event, TokenEvent)]
        others += [event.token_id for event in told if event.request_id == other]
    CHANGES[change](sequence)
    start = list(sequence.token_ids)
    results = run(engine)
    tokens = results.tokens[request]
    assert results.ends[request].error is None and results.ends[request].reason == "length"
    assert sequence.token_ids == [*start, *tokens]
    assert others + results.tokens[other] == other_alone
    sequence.free()
    assert tokens == lm.generate(start, **OPTIONS | MODES[mode] | {"max_new_tokens": len(tokens)}).token_ids
    assert all_free(lm)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_seen_of_a_changed_sequence_is_what_its_last_token_was_chosen_from(change: str) -> None:
    lm = lm_in_float64()
    sequence, engine = lm.sequence(PROMPT), Engine(lm)
    engine.add_request(sequence, **OPTIONS, output_hidden_states=True)
    for _ in range(14):
        engine.step()
    CHANGES[change](sequence)
    with lm.sequence(list(sequence.token_ids)) as same, lm.capture("ln_final.hook_normalized") as acts:
        _ = same.logits
    (event,) = engine.step()
    assert isinstance(event, TokenEvent) and event.seen.hidden_states is not None
    found = event.seen.hidden_states[-1]
    assert len(found) == 1 and (found - acts["ln_final.hook_normalized"][-1:]).abs().max() < 1e-9
    engine.close()
