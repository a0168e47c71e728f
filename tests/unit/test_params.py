"""Options resolved as transformers resolves them, from the caller, the file and the tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from handloom.errors import ContextOverflow, HandloomError, InvalidParam
from handloom.sampling import options as names
from option_checks import CONTEXT, VOCAB, resolve

# Against transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=CONTEXT, **sizes))


def prepared_by_transformers(
    model: LlamaForCausalLM, options: dict[str, Any], passed: dict[str, Any] | None, file: dict[str, Any], length: int
) -> GenerationConfig:
    """The config that `generate` hands to its decoding loop."""
    seen: list[GenerationConfig] = []

    def decoding_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.append(generation_config)
        return input_ids

    model.generation_config = GenerationConfig(**file)
    config = None if passed is None else GenerationConfig(**passed)
    model.generate(torch.full((1, length), 7), generation_config=config, custom_generate=decoding_loop, **options)
    return seen[0]


def some(values: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.integers(1, 20),
    "max_length": st.integers(1, 60),
    "min_new_tokens": st.integers(0, 3),
    "min_length": st.integers(0, 12),
    "temperature": st.floats(0.1, 3.0),
    "top_k": st.integers(1, 200),
    "top_p": st.floats(0.01, 1.0),
    "min_p": st.floats(0.0, 1.0),
    "repetition_penalty": st.floats(0.5, 2.0),
    "eos_token_id": st.one_of(st.integers(0, VOCAB - 1), st.lists(st.integers(0, VOCAB - 1), min_size=1, unique=True)),
}
SWITCHED_OFF = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=some(NUMBERS),
    off=st.sets(st.sampled_from(SWITCHED_OFF), max_size=2),
    passed=st.one_of(st.none(), some(NUMBERS)),
    file=some({**NUMBERS, "do_sample": st.booleans()}),
    length=st.sampled_from([1, 10, 40, 50, 63]),
)
def test_priorities_and_lengths_are_those_of_generate(model, options, off, passed, file, length):
    options = {**options, **dict.fromkeys(off), "do_sample": True}
    ours_options = {**options, **({} if passed is None else {"generation_config": GenerationConfig(**passed)})}
    try:
        theirs = prepared_by_transformers(model, options, passed, file, length)
    except ValueError:
        with pytest.raises(HandloomError):
            resolve(ours_options, file, prompt_length=length)
        return
    try:
        ours = resolve(ours_options, file, prompt_length=length)
    except (ContextOverflow, InvalidParam):  # beyond the context, or a minimum above the maximum: there a warning
        low, high = theirs.min_length or 0, theirs.max_length
        assert high > CONTEXT or low > high
        return
    assert ours.max_new_tokens == min(theirs.max_length, CONTEXT) - length
    assert ours.min_length == (theirs.min_length or 0)
    assert ours.min_new_tokens == (theirs.min_new_tokens or 0)
    assert ours.do_sample is theirs.do_sample
    assert ours.temperature == (1.0 if theirs.temperature is None else theirs.temperature)
    assert ours.top_k == (theirs.top_k or 0)
    assert ours.top_p == (1.0 if theirs.top_p is None else theirs.top_p)
    assert ours.min_p == theirs.min_p
    assert ours.repetition_penalty == (1.0 if theirs.repetition_penalty is None else theirs.repetition_penalty)
    eos = theirs.eos_token_id
    assert list(ours.eos_token_id) == ([] if eos is None else [eos] if isinstance(eos, int) else eos)


def test_global_defaults_are_those_of_transformers():
    theirs = GenerationConfig._get_default_generation_params()
    ours = resolve({"do_sample": True})
    for name in ("temperature", "top_k", "top_p", "repetition_penalty", "min_length", "output_scores"):
        assert getattr(ours, name) == theirs[name]
    assert ours.max_new_tokens == theirs["max_length"]
    assert {name: theirs[name] for name in names.INERT if name in theirs} == {
        name: value for name, value in names.INERT.items() if name in theirs
    }


def test_a_config_that_spells_out_every_default_changes_nothing():
    defaults = {**GenerationConfig._get_default_generation_params(), "max_length": 30}
    expected = resolve({"seed": 1, "do_sample": False, "max_length": 30})
    assert resolve({"seed": 1, "generation_config": defaults}) == expected
    assert resolve({"seed": 1, "do_sample": False}, defaults) == expected
    assert resolve({"seed": 1, "generation_config": GenerationConfig(**defaults)}) == expected


# Lengths ----------------------------------------------------------------------------------------------


def test_without_a_limit_twenty_tokens_or_what_the_context_leaves():
    assert resolve().max_new_tokens == 20
    assert resolve(prompt_length=CONTEXT - 3).max_new_tokens == 3


def test_max_new_tokens_beats_max_length_wherever_it_stands():
    assert resolve({"max_new_tokens": 5, "max_length": 50}).max_new_tokens == 5
    assert resolve({"max_length": 50}, {"max_new_tokens": 7}).max_new_tokens == 7
    assert resolve({"max_new_tokens": None, "max_length": 50}, {"max_new_tokens": 7}).max_new_tokens == 40


def test_max_length_of_the_models_file_counts_the_prompt_and_refuses_a_longer_one():
    assert resolve({}, {"max_length": 30}).max_new_tokens == 20
    with pytest.raises(InvalidParam, match="max_length=10 counts the prompt, which has 10 tokens"):
        resolve({}, {"max_length": 10})


def test_a_limit_of_the_models_file_is_cut_at_the_context_and_one_of_the_caller_is_not():
    assert resolve({}, {"max_length": 10**6}).max_new_tokens == CONTEXT - 10
    assert resolve({}, {"max_new_tokens": 512}).max_new_tokens == CONTEXT - 10
    assert resolve({"max_new_tokens": CONTEXT - 10}).max_new_tokens == CONTEXT - 10
    for options in (
        {"max_new_tokens": CONTEXT - 9},
        {"max_length": CONTEXT + 1},
        {"generation_config": {"max_length": 99}},
    ):
        with pytest.raises(ContextOverflow, match=f"10 prompt tokens.* context of {CONTEXT}; .*at most 54"):
            resolve(options)


def test_minimum_lengths_resolve_to_the_prompt_at_hand_and_an_impossible_one_is_refused():
    assert resolve({"min_new_tokens": 4}, {"min_length": 30}).min_length == 14
    assert resolve({}, {"min_length": 56}).min_length == 56
    with pytest.raises(InvalidParam, match=r"min_new_tokens asks for 16 tokens .*at most 15"):
        resolve({"min_new_tokens": 6, "max_new_tokens": 5})
    with pytest.raises(InvalidParam, match="min_length"):
        resolve({"min_length": 31})


# Whether to sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "file", "sampled"),
    [
        ({}, {}, False),
        ({}, {"do_sample": True}, True),
        ({"do_sample": None}, {"do_sample": True}, True),
        ({"do_sample": False}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}, False),
        ({"do_sample": True}, {}, True),
        ({"temperature": 0.7}, {}, True),
        ({"top_k": 5}, {"do_sample": False}, True),
        ({"top_p": 0.5}, {}, True),
        ({"min_p": 0.0}, {}, True),
        ({"seed": 0}, {}, True),
        ({"temperature": None, "top_k": None, "seed": None}, {}, False),
        ({"repetition_penalty": 1.3}, {}, False),
        ({"generation_config": {"temperature": 0.7}}, {}, True),
        ({"generation_config": {"temperature": 1.0, "top_k": 50, "top_p": 1.0}}, {}, False),
        ({"generation_config": {"do_sample": False, "top_k": 50}}, {"do_sample": True}, False),
        ({"temperature": 0}, {"do_sample": True}, False),
        ({"temperature": 0.0, "top_k": 5, "seed": 3}, {}, False),
        ({"temperature": 0, "do_sample": False}, {}, False),
        ({"do_sample": False, "seed": 3}, {}, False),
        ({}, {"do_sample": True, "temperature": 0.0}, False),
    ],
)  # fmt: skip
def test_when_tokens_are_drawn(options, file, sampled):
    assert resolve(options, file).do_sample is sampled


@pytest.mark.parametrize(
    ("options", "file", "message"),
    [
        ({"do_sample": False, "temperature": 0.7}, {}, "no use for temperature"),
        ({"do_sample": False, "temperature": 1.0, "min_p": 0.1}, {}, "no use for temperature, min_p"),
        ({"do_sample": False, "top_k": 50}, {}, "no use for top_k"),
        ({"do_sample": False, "generation_config": {"top_p": 0.9}}, {}, "no use for top_p"),
        ({"generation_config": GenerationConfig(do_sample=False), "top_p": 0.9}, {}, "no use for top_p"),
        ({"do_sample": True, "temperature": 0}, {}, "temperature=0 .from the caller. means greedy"),
        ({"do_sample": True}, {"temperature": 0.0}, "temperature=0 .in the model's .* means greedy"),
        ({"top_k": 3}, {"temperature": 0.0}, "temperature=0 .in the model's .* means greedy"),
        ({"seed": 3, "rng": "torch"}, {}, "torch.manual_seed"),
        ({"stop": "a", "stop_strings": "b"}, {}, "two names of one option"),
    ],
)
def test_contradictions_are_refused(options, file, message):
    with pytest.raises(InvalidParam, match=message):
        resolve(options, file)


def test_a_request_without_a_seed_gets_a_fresh_one_that_reproduces_it():
    first, second = resolve({"temperature": 0.5}), resolve({"temperature": 0.5})
    assert first.seed != second.seed
    assert resolve({"temperature": 0.5, "seed": first.seed}) == first
    assert resolve({"seed": 2**64 - 1}).seed == 2**64 - 1


# The rest ---------------------------------------------------------------------------------------------


def test_eos_comes_from_the_caller_else_the_file_else_the_tokenizer():
    assert resolve({"eos_token_id": 3}, {"eos_token_id": 4}, eos_token_id=5).eos_token_id == (3,)
    assert resolve({}, {"eos_token_id": [4, 6]}, eos_token_id=5).eos_token_id == (4, 6)
    assert resolve({}, {"eos_token_id": None}, eos_token_id=(5,)).eos_token_id == (5,)
    assert resolve().eos_token_id == ()
    assert resolve({"eos_token_id": None}, {"eos_token_id": 4}).eos_token_id == ()
    assert resolve({"eos_token_id": []}, {"eos_token_id": 4}).eos_token_id == ()


def test_eos_ids_of_the_model_that_no_logit_stands_for_are_left_out():
    assert resolve({}, {"eos_token_id": [50256, 7, -1]}).eos_token_id == (7,)
    assert resolve(eos_token_id=50256).eos_token_id == ()
    with pytest.raises(InvalidParam, match="eos_token_id"):
        resolve({}, {"eos_token_id": "</s>"})


def test_stop_is_stop_strings_and_either_may_be_one_string():
    assert resolve({"stop": "a"}).stop_strings == ("a",)
    assert resolve({"stop": ["a", "b"]}).stop_strings == ("a", "b")
    assert resolve({"stop_strings": "a"}).stop_strings == ("a",)
    assert resolve({"stop": None}, {"stop_strings": ["b"]}).stop_strings == ("b",)
    assert resolve({"stop_strings": None}, {"stop_strings": ["b"]}).stop_strings == ()


def test_processors_come_as_any_list_of_callables_transformers_own_included():
    processors = LogitsProcessorList([print, max])
    assert resolve({"logits_processor": processors}).logits_processor == (print, max)
    assert resolve({"stopping_criteria": (print,)}).stopping_criteria == (print,)


def test_resolving_leaves_the_mappings_alone():
    options, file = {"stop": "a", "do_sample": None, "generation_config": {"top_k": 3}}, {"top_p": 0.5}
    before = json.dumps([options, file])
    resolve(options, file)
    assert json.dumps([options, file]) == before
