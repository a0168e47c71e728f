"""Any two rules in the order in which transformers' generate applies them, where it matters which comes first."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from transformers import WatermarkingConfig

from handloom.sampling import rules
from handloom.sampling.rules import AFTER_THE_CALLERS, BEFORE_THE_CALLERS
from known_wrong import WRONG_ON_INFINITIES
from rule_chains import allow_even, assert_same_at_every_step

ALL = {rule.option: rule for rule in (*BEFORE_THE_CALLERS, *AFTER_THE_CALLERS)}
NOT_IN_GENERATE = {"dola_layers", "diversity_penalty", "structure"}
NAMES = [name for name in ALL if name not in NOT_IN_GENERATE | WRONG_ON_INFINITIES]
LENGTHS = [(6, 5), (1, 1)]  # of the prompt and the output; in the second the first token is the last one too
VOCAB_SIZE = 30

BANS = set(
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids min_length min_new_tokens suppress_tokens "
    "begin_suppress_tokens".split()
)
PENALTIES, FORCES = {"encoder_repetition_penalty", "repetition_penalty"}, {"forced_bos_token_id", "forced_eos_token_id"}
LEAVES_BANNED = {"sequence_bias", *PENALTIES, "exponential_decay_length_penalty", "temperature", "watermarking_config"}
EITHER_WAY: list[tuple[set[str], set[str]]] = [
    (BANS, BANS | LEAVES_BANNED),
    (PENALTIES, {"prefix_allowed_tokens_fn", "temperature", *FORCES}),
    ({"exponential_decay_length_penalty"}, {"prefix_allowed_tokens_fn", "temperature", *FORCES}),
    ({"top_k"}, {"temperature", "min_p"}),
    (FORCES, {"temperature", "top_k"}),
    ({"forced_bos_token_id"}, {"renormalize_logits"}),
    # nothing bans what is forced: it is refused, or another step, or bad words leave the end tokens out
    ({"forced_bos_token_id"}, {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids"}),
    # bans of end tokens leave one that is allowed; min_new_tokens comes with the min_length that it implies
    ({"prefix_allowed_tokens_fn"}, {"min_length", "min_new_tokens"}),
    ({"min_new_tokens"}, {"top_k", "renormalize_logits"}),
]


def options_of(pair: tuple[str, str], prompt: int, new: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "guidance_scale": 1.7,
        "sequence_bias": [[[0], 4.5], [[1], -3.25], [[2], 2.5], [[4], 6.0]],
        "encoder_repetition_penalty": 3.0,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "encoder_no_repeat_ngram_size": 1,
        "bad_words_ids": [[0], [2], [5]],
        "min_length": prompt + new,
        "min_new_tokens": new,
        "prefix_allowed_tokens_fn": allow_even,
        "forced_bos_token_id": 1,
        "forced_eos_token_id": [2, 3, 5],
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (0, 1.5),
        "suppress_tokens": [0, 2, 4, 5],
        "begin_suppress_tokens": [0, 1, 2],
        "temperature": 4.0,
        "top_h": 0.5,
        "top_k": 8,
        "top_p": 0.6,
        "min_p": 0.2,
        "typical_p": 0.5,
        "epsilon_cutoff": 0.06,
        "eta_cutoff": 0.3,
        "watermarking_config": WatermarkingConfig(greenlist_ratio=0.5, bias=3.0),
        "renormalize_logits": True,
    }
    options = {name: values[name] for name in pair}
    return (
        {"do_sample": True, "temperature": 4.0, "top_k": 0} | options if any(ALL[n].sampled for n in pair) else options
    )


def assert_same(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["random", "ties", "random", "holes"] + ["invalid"] * ("remove_invalid_values" in pair)
    for prompt, new in LENGTHS:
        monkeypatch.setattr("rule_chains.PROMPT_LENGTH", prompt)
        monkeypatch.setattr("rule_chains.NEW_TOKENS", new)
        assert_same_at_every_step([options_of(pair, prompt, new)] * len(kinds), VOCAB_SIZE, 5, kinds)


def swap(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    order = [*ALL]
    first, second = map(order.index, pair)
    order[first], order[second] = order[second], order[first]
    made, count = tuple(ALL[name] for name in order), len(BEFORE_THE_CALLERS)
    monkeypatch.setattr(rules, "BEFORE_THE_CALLERS", made[:count])
    monkeypatch.setattr(rules, "AFTER_THE_CALLERS", made[count:])


def matters(pair: tuple[str, str]) -> bool:
    first, second = pair
    return not any((first in a and second in b) or (first in b and second in a) for a, b in EITHER_WAY)


@pytest.mark.parametrize("first", NAMES)
def test_a_rule_and_each_that_comes_after_it_give_the_scores_of_transformers(first, monkeypatch):
    for pair in combinations(NAMES, 2):
        if pair[0] != first:
            continue
        assert_same(pair, monkeypatch)
        if matters(pair):
            with monkeypatch.context() as patch:
                swap(pair, patch)
                with pytest.raises(AssertionError):  # so the comparison sees which comes first
                    assert_same(pair, patch)
