"""Every value is in its range, or refused by the name of its option."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from handloom.errors import ContextOverflow, InvalidParam
from option_checks import CONTEXT, VOCAB, resolve

NOT_NUMBERS: list[Any] = [
    True,
    False,
    "1",
    {},
    1j,
    math.nan,
    math.inf,
    -math.inf,
    torch.tensor(1.0),
    np.array([1, 2]),
]
BAD_VALUES: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 1.0, -(2**63)],
    "max_length": [0, -1, 1.5],
    "min_new_tokens": [-1, 1.0],
    "min_length": [-1, 1.0],
    "temperature": [-1, -1e-9, 1e-40, 1e39, 10**400],
    "top_k": [-1, 2**31, 2**63, 5.0],
    "top_p": [0, 0.0, -0.1, 1.0000001, 2],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 1e-40, 1e39],
    "seed": [-1, 2**64, 1.0],
    "logprobs": [-1, 101, 2**63],
    "prompt_logprobs": [-1, 101, 2**63],
    "max_time": [0, -1, 1e39],
    "eos_token_id": [-1, VOCAB, 2**63, [0, VOCAB], [True], [[1]], 1.0],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_VALUES.items() for value in [*values, *NOT_NUMBERS]],
    ids=str,
)
def test_safety_14_15_a_number_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidParam, match=f"^{name}="):
        resolve({name: value})


def test_safety_13_a_million_sequences_are_refused_at_parse():
    for name in ("num_return_sequences", "num_beams"):
        with pytest.raises(InvalidParam, match=f"{name}=1000000.*from 1 to 1024"):
            resolve({name: 1_000_000})


def test_safety_14_prompts_and_limits_beyond_the_context_are_refused_with_the_numbers():
    with pytest.raises(ContextOverflow, match=f"10 prompt tokens and {2**63} new ones exceed the context of {CONTEXT}"):
        resolve({"max_new_tokens": 2**63})
    for length in (CONTEXT, CONTEXT + 1, 10**9):
        with pytest.raises(ContextOverflow, match=f"the prompt has {length} tokens and the context holds {CONTEXT}"):
            resolve({"max_new_tokens": 1}, prompt_length=length)


@pytest.mark.parametrize(
    "value",
    [["a"] * 65, ["x"] * 10**6, "", ["a", ""], [1], 7, {"a": 1}, "\ud800", ["a", None], "s" * 10**6],
    ids=lambda v: repr(v)[:20],
)
@pytest.mark.parametrize("name", ["stop", "stop_strings"])
def test_safety_15_bad_stop_strings_are_refused(name, value):
    with pytest.raises(InvalidParam):
        resolve({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", 1), ("do_sample", "yes"), ("include_stop_text", 0), ("skip_special_tokens", "no"),
        ("output_scores", 1), ("output_logits", []), ("output_attentions", 1), ("output_hidden_states", "all"),
        ("output_past_key_values", 1), ("rng", "cuda"), ("rng", 1), ("logits_processor", print),
        ("logits_processor", [1]), ("stopping_criteria", "x"), ("stopping_criteria", {print}),
        ("generation_config", 3), ("generation_config", "file.json"),
    ],
)  # fmt: skip
def test_flags_names_and_callables_of_the_wrong_kind_are_refused(name, value):
    with pytest.raises(InvalidParam, match=name):
        resolve({name: value})


def test_values_at_the_edge_of_their_range_are_taken_as_they_are():
    edges: dict[str, Any] = {
        "temperature": 1e-30, "top_k": 2**31 - 1, "top_p": 1, "min_p": 1, "repetition_penalty": 1e30, "logprobs": 100,
        "prompt_logprobs": 0, "max_time": 1e-9, "eos_token_id": [0, VOCAB - 1, 0], "seed": 0,
    }  # fmt: skip
    params = resolve(edges)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1e-30, 2**31 - 1, 1.0, 1.0)
    assert (params.eos_token_id, params.logprobs, params.prompt_logprobs) == ((0, VOCAB - 1), 100, 0)
    assert resolve({"logprobs": 4}, vocab_size=4).logprobs == 4
    with pytest.raises(InvalidParam, match="logprobs"):
        resolve({"logprobs": 5}, vocab_size=4)


def test_numbers_of_other_kinds_become_pythons_own():
    params = resolve(
        {"top_k": np.int64(3), "temperature": np.float32(0.5), "top_p": Fraction(1, 2), "seed": np.uint8(7)}
    )
    assert (params.top_k, params.temperature, params.top_p, params.seed) == (3, 0.5, 0.5, 7)
    assert [type(value) for value in (params.top_k, params.temperature, params.top_p, params.seed)] == [
        int,
        float,
        float,
        int,
    ]
    json.dumps(params.temperature)
