"""Every rule alone, and all together step after step, against the processors that transformers' generate builds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import logits_process as hf

from handloom.errors import HandloomError
from handloom.sampling.params import resolve_params
from handloom.sampling.rules import AFTER_THE_CALLERS, BEFORE_THE_CALLERS, apply_rules
from known_wrong import WRONG_ON_INFINITIES
from rule_chains import (
    EOS,
    INF,
    PROMPT_LENGTH,
    allow_even,
    assert_same_at_every_step,
    mine,
    some_scores,
)

ALONE: dict[str, list[Any]] = {
    "guidance_scale": [0.5, 1.7, -2.0],
    "sequence_bias": [[[[0], 1.5]], [[[1, 0], -2.25], [[0], 0.5], [[2, 2, 0], 1.25], [[0, 0], -INF]]],
    "encoder_repetition_penalty": [0.7, 3.0],
    "repetition_penalty": [0.7, 3.0],
    "no_repeat_ngram_size": [1, 2, 3, 20],
    "encoder_no_repeat_ngram_size": [1, 2, 3, 20],
    "bad_words_ids": [[[0]], [[1, 0], [2], [2, 0], [4, 4, 1]], [[1], [0, 2]]],
    "min_length": [3, PROMPT_LENGTH + 2],
    "min_new_tokens": [1, 4],
    "prefix_allowed_tokens_fn": [allow_even],
    "forced_bos_token_id": [2],
    "forced_eos_token_id": [1, [1, 2]],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [(0, 1.5), (2, 0.5), (1, 30.0)],
    "suppress_tokens": [[0, 2], [4]],
    "begin_suppress_tokens": [[0, 2]],
    "watermarking_config": [
        WatermarkingConfig(),
        WatermarkingConfig(greenlist_ratio=0.5, bias=-1.5, hashing_key=7, context_width=4),
        SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836]),
        SynthIDTextWatermarkingConfig(ngram_len=2, keys=[5], context_history_size=2, skip_first_ngram_calls=True),
        SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, 2**40], sampling_table_size=9, debug_mode=True),
    ],
    "renormalize_logits": [True],
}
WARPERS = {"temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
NOT_IN_GENERATE = {  # and where they are compared
    "dola_layers": "test_contrastive_and_dola.py",
    "diversity_penalty": "test_group_beams.py",
    "structure": "test_structured_output.py",
}
KINDS = {
    "a model's": "random",
    "ties": "ties",
    "partly -inf": "holes",
    "all -inf": "nothing",
}


def test_every_rule_is_compared_alone() -> None:
    """Those of sampling in test_processors.py; a caller's own in test_sampler_processors.py."""
    rules = {rule.option for rule in (*BEFORE_THE_CALLERS, *AFTER_THE_CALLERS)}
    assert rules == ALONE.keys() | WARPERS | NOT_IN_GENERATE.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [5, 97])
@pytest.mark.parametrize("name", ALONE)
def test_a_rule_alone_gives_the_scores_of_transformers(name, vocab_size, kind):
    if name in WRONG_ON_INFINITIES and "-inf" in kind:
        pytest.skip("this release of transformers is known to be wrong here")
    options = [{name: value} for value in ALONE[name]]
    for seed in range(5):
        assert_same_at_every_step([*options, {}], vocab_size, seed, [KINDS[kind]] * (len(options) + 1))


@pytest.mark.parametrize("name", sorted(ALONE))
def test_a_rule_over_a_vocabulary_of_262144(name):
    assert_same_at_every_step([{name: value} for value in ALONE[name]], 262144, 3, ["random"] * len(ALONE[name]))


def test_selfhash_gives_the_scores_of_transformers():
    config = WatermarkingConfig(seeding_scheme="selfhash", context_width=3)
    assert_same_at_every_step([{"watermarking_config": config}, {}], 97, 2, ["random", "ties"])


ONE_TOKEN: list[dict[str, Any]] = [
    {"guidance_scale": 1.5},
    {"sequence_bias": [[[0], -1.0]]},
    {"repetition_penalty": 2.0},
    {"encoder_repetition_penalty": 2.0},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[0, 0]]},
    {"prefix_allowed_tokens_fn": lambda batch_id, ids: [0]},
    {"forced_bos_token_id": 0},
    {"forced_eos_token_id": 0},
    {"remove_invalid_values": True},
    {"suppress_tokens": [0]},
    {"begin_suppress_tokens": [0]},
    {"watermarking_config": WatermarkingConfig()},
    {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=2, keys=[5])},
    {"renormalize_logits": True},
]


@pytest.mark.parametrize("options", ONE_TOKEN, ids=lambda options: next(iter(options)))
def test_a_rule_over_a_vocabulary_of_one_token(options):
    assert_same_at_every_step([options], 1, 1, ["random"])


@pytest.mark.parametrize(
    "options", [{"min_length": 9}, {"min_new_tokens": 2}, {"exponential_decay_length_penalty": (1, 1.5)}], ids=str
)
def test_a_rule_about_the_end_over_a_vocabulary_of_one_token_that_is_it(options, monkeypatch):
    monkeypatch.setattr("rule_chains.EOS", [0])
    assert_same_at_every_step([options], 1, 1, ["random"])


def test_values_that_are_no_numbers_are_removed_after_the_rules_before():
    options = {"remove_invalid_values": True, "repetition_penalty": 1.5, "bad_words_ids": [[0]], "suppress_tokens": [4]}
    assert_same_at_every_step([options, {"remove_invalid_values": True}], 97, 1, ["invalid", "nothing"])


def favours_threes(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores + 0.25 * (torch.arange(scores.shape[1]) % 3 == 0)


CALLERS = [favours_threes, hf.RepetitionPenaltyLogitsProcessor(1.25), hf.TopKLogitsWarper(4)]


def sometimes(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), value)


@st.composite
def any_options(draw: st.DrawFn, vocab_size: int) -> dict[str, Any]:
    """What one row asks for, in the names of GenerationConfig."""
    ids = st.integers(0, min(vocab_size, 5) - 1)
    some = st.lists(ids, min_size=1, max_size=3)
    quarter = st.integers(-12, 12).map(lambda n: n / 4)  # whose sums are exact, in whichever order
    options = {
        "guidance_scale": sometimes(st.sampled_from((0.5, 1.5, 3.0))),
        "logits_processor": sometimes(st.lists(st.sampled_from(CALLERS), min_size=1, max_size=2, unique=True)),
        "sequence_bias": sometimes(st.lists(st.tuples(some, quarter).map(list), min_size=1, max_size=4)),
        "encoder_repetition_penalty": sometimes(st.floats(0.5, 2.0)),
        "repetition_penalty": sometimes(st.floats(0.5, 2.0)),
        "no_repeat_ngram_size": sometimes(st.integers(1, 4)),
        "encoder_no_repeat_ngram_size": sometimes(st.integers(1, 4)),
        "bad_words_ids": sometimes(st.lists(some, max_size=3).map(lambda words: [[0], *words])),
        "min_length": sometimes(st.integers(1, PROMPT_LENGTH + 4)),
        "min_new_tokens": sometimes(st.integers(1, 4)),
        "prefix_allowed_tokens_fn": sometimes(st.just(allow_even)),
        "forced_bos_token_id": sometimes(ids),
        "forced_eos_token_id": sometimes(st.one_of(ids, st.just([1, 2]))),
        "remove_invalid_values": sometimes(st.just(True)),
        "exponential_decay_length_penalty": sometimes(st.tuples(st.integers(0, 3), st.floats(0.5, 3.0))),
        "suppress_tokens": sometimes(st.just([vocab_size - 1])),
        "begin_suppress_tokens": sometimes(some),
        "watermarking_config": sometimes(st.sampled_from(ALONE["watermarking_config"])),
        "renormalize_logits": sometimes(st.just(True)),
    }
    sampled = {
        "temperature": sometimes(st.floats(0.1, 5.0)),
        "top_h": sometimes(st.floats(0.05, 1.0)),
        "top_k": st.one_of(st.just(0), st.integers(1, 70)),
        "top_p": sometimes(st.floats(0.01, 0.99)),
        "min_p": sometimes(st.floats(0.0, 1.0)),
        "typical_p": sometimes(st.floats(0.01, 0.99)),
        "epsilon_cutoff": sometimes(st.floats(1e-4, 0.9)),
        "eta_cutoff": sometimes(st.floats(1e-4, 0.9)),
    }
    chosen = {name: draw(strategy) for name, strategy in options.items()}
    if draw(st.booleans()):
        chosen |= {"do_sample": True, **{name: draw(strategy) for name, strategy in sampled.items()}}
    return {name: value for name, value in chosen.items() if value is not None and name not in WRONG_ON_INFINITIES}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data(), vocab_size=st.sampled_from([6, 64, 1000]), seed=st.integers(0, 2**31))
def test_rules_in_any_combination_give_the_scores_of_transformers_list(data, vocab_size, seed):
    rows = data.draw(st.lists(any_options(vocab_size), min_size=1, max_size=3))
    kinds = [data.draw(st.sampled_from(["random", "ties", "holes"])) for _ in rows]
    assert_same_at_every_step(rows, vocab_size, seed, kinds)


# What is refused ----------------------------------------------------------------------------------------

HUGE = [[5]] * (2**20 + 1)
REFUSED: list[tuple[str, Any]] = [
    ("sequence_bias", []), ("sequence_bias", {}), ("sequence_bias", {(5,): math.nan}), ("sequence_bias", {(5,): INF}),
    ("sequence_bias", {(): 1.0}), ("sequence_bias", {(99,): 1.0}), ("sequence_bias", [[[1]]]), ("sequence_bias", 3),
    ("sequence_bias", [[5, 1.0]]), ("sequence_bias", {(True,): 1.0}), ("sequence_bias", {(5,): "x"}),
    ("bad_words_ids", []), ("bad_words_ids", [[]]), ("bad_words_ids", [5]), ("bad_words_ids", [[97]]),
    ("bad_words_ids", [[-1]]), ("bad_words_ids", [[1], [3]]), ("bad_words_ids", HUGE), ("bad_words_ids", [[1.0]]),
    ("bad_words_ids", [list(range(97))] * 11000), ("bad_words_ids", "abc"),
    ("encoder_repetition_penalty", 0), ("encoder_repetition_penalty", -1.0), ("encoder_repetition_penalty", INF),
    ("no_repeat_ngram_size", -1), ("no_repeat_ngram_size", 1.5), ("encoder_no_repeat_ngram_size", 2**31),
    ("prefix_allowed_tokens_fn", [1]), ("forced_bos_token_id", 97), ("forced_bos_token_id", [5]),
    ("forced_eos_token_id", 97), ("forced_eos_token_id", "eos"), ("remove_invalid_values", 1),
    ("exponential_decay_length_penalty", 3), ("exponential_decay_length_penalty", (1,)),
    ("exponential_decay_length_penalty", (-1, 2.0)), ("exponential_decay_length_penalty", (1, 0.0)),
    ("exponential_decay_length_penalty", (1, math.nan)), ("suppress_tokens", [97]), ("suppress_tokens", [-1]),
    ("suppress_tokens", [5] * (2**20 + 1)), ("begin_suppress_tokens", "abc"), ("begin_suppress_tokens", [1.5]),
    ("top_h", 0.0), ("top_h", 1.1), ("typical_p", 0.0), ("typical_p", -1), ("typical_p", 1.5), ("typical_p", math.nan),
    ("epsilon_cutoff", 1.0), ("epsilon_cutoff", -0.1), ("eta_cutoff", 1.0), ("eta_cutoff", "a"),
    ("watermarking_config", 3), ("watermarking_config", {"bias": math.nan}), ("watermarking_config", {"ratio": 1}),
    ("watermarking_config", {"greenlist_ratio": 1.0}), ("watermarking_config", {"greenlist_ratio": 0}),
    ("watermarking_config", {"seeding_scheme": "right"}), ("watermarking_config", {"context_width": 0}),
    ("watermarking_config", {"hashing_key": 2**64}), ("watermarking_config", {"ngram_len": 5}),
    ("watermarking_config", {"ngram_len": 1, "keys": [1]}), ("watermarking_config", {"ngram_len": 5, "keys": []}),
    ("watermarking_config", {"ngram_len": 5, "keys": [1], "sampling_table_size": 2**25}),
    ("watermarking_config", {"ngram_len": 5, "keys": [1], "context_history_size": 2**30}),
    ("renormalize_logits", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: repr(value)[:40])
def test_a_value_that_no_rule_can_use_is_refused_by_name_and_in_short(name, value):
    with pytest.raises(HandloomError, match=name) as error:
        mine({name: value}, [5] * PROMPT_LENGTH, 97)
    assert len(str(error.value)) < 400


def test_forcing_what_is_suppressed_is_refused():
    for forced in ({"forced_eos_token_id": [5, 6]}, {"forced_bos_token_id": 6}):
        with pytest.raises(HandloomError, match=r"forced_.os_token_id.*suppress_tokens"):
            mine({**forced, "suppress_tokens": [5, 6]}, [5], 97)
    assert mine({"forced_eos_token_id": [5, 6], "suppress_tokens": [5]}, [5], 97).params.forced_eos_token_id == (5, 6)


def test_ids_of_a_models_file_outside_its_vocabulary_cannot_come_up_and_are_left_out():
    file = {"suppress_tokens": [5, 97, -1], "begin_suppress_tokens": [97], "forced_eos_token_id": 3}
    params = resolve_params({}, generation_config=file, prompt_length=3, max_context=64, vocab_size=97)
    assert (params.suppress_tokens, params.begin_suppress_tokens) == ((5,), ())
    assert params.forced_eos_token_id == (3,)


def test_ids_and_biases_may_be_numpys():
    row = mine({"sequence_bias": {(np.int64(5), 6): np.float32(0.5)}, "bad_words_ids": [[np.int32(7)]]}, [5], 97)
    assert row.params.sequence_bias == (((5, 6), 0.5),)
    assert row.params.bad_words_ids == ((7,),)


@pytest.mark.parametrize("returned", [[], [97], [-1], [[1]], [1.5], [True], None, "abc"], ids=repr)
def test_a_constraint_that_returns_no_tokens_fails_its_row_only(returned):
    rows = [mine({"prefix_allowed_tokens_fn": lambda *_: returned}, [5], 97), mine({"suppress_tokens": [5]}, [5], 97)]
    scores = some_scores(97, 0, "random").repeat(2, 1)
    errors = apply_rules(scores, rows)
    assert "prefix_allowed_tokens_fn" in str(errors[0])
    assert errors[1] is None
    assert scores[1, 5] == -INF


def test_a_constraint_is_told_its_prompts_ids():
    told: list[Any] = []
    row = mine({"prefix_allowed_tokens_fn": lambda batch_id, ids: told.append((batch_id, ids)) or [1]}, [5, 6, 7], 97)
    apply_rules(some_scores(97, 0, "random"), [row])
    assert told[0][0] == 0
    assert torch.equal(told[0][1], torch.tensor([5, 6, 7]))


def test_an_exponential_penalty_never_overflows():
    row = mine({"exponential_decay_length_penalty": (0, 1e30)}, [5], 97)
    scores = some_scores(97, 0, "random")
    row.token_ids = [5] * 4000
    row.prompt_length = 1
    apply_rules(scores, [row])
    assert bool(scores.isfinite().all())
    assert int(scores.argmax()) in EOS


# What rules remember --------------------------------------------------------------------------------------

REMEMBERS: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "watermarking_config": {"ngram_len": 3, "keys": [5, 6], "context_history_size": 3},
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    surgery=st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 4), max_size=4)), min_size=1, max_size=8),
    name=st.sampled_from(sorted(REMEMBERS)),
    long_ngrams=st.booleans(),
)
def test_a_sequence_rewound_and_continued_is_scored_as_if_it_had_never_been_otherwise(surgery, name, long_ngrams):
    options = {name: REMEMBERS[name]}
    if long_ngrams and "ngram" in name:
        options = {name: 18}
    ids = [0, 1, 2, 1, 2, 0] * (4 if long_ngrams else 1)
    row = mine(options, ids, 11)
    for rewind, more in surgery:
        ids = ids[: len(ids) - rewind] + more or [0]
        row.token_ids = ids
        anew = mine(options, [0] * row.prompt_length, 11)
        anew.token_ids = ids
        left, right = some_scores(11, len(ids), "random"), some_scores(11, len(ids), "random")
        apply_rules(left, [row])
        apply_rules(right, [anew])
        assert torch.equal(left, right)
