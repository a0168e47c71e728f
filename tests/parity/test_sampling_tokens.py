"""rng="torch" draws the very tokens of generate(do_sample=True) after the same torch.manual_seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from parity_checks import Pair, hf_generate
from tiny_models import random_ids, tiny_tokenizer

EOS_SET = list(range(4, 331, 40))

COMBINATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "hot": {"temperature": 2.5, "top_k": 0},
    "cold": {"temperature": 0.2},
    "top_k 1": {"top_k": 1},
    "top_k past the vocabulary": {"top_k": 5000},
    "top_p": {"top_p": 0.5, "top_k": 0},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1, "top_k": 0, "temperature": 2.0},
    "top_k, top_p": {"top_k": 20, "top_p": 0.9},
    "top_k, top_p, min_p, temperature": {"top_k": 100, "top_p": 0.95, "min_p": 0.01, "temperature": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "repetition_penalty, temperature, top_p": {"repetition_penalty": 0.7, "temperature": 0.8, "top_p": 0.8},
    "eos set": {"eos_token_id": EOS_SET},
    "eos set, min_new_tokens": {"eos_token_id": EOS_SET, "min_new_tokens": 12},
    "eos set, min_length": {"eos_token_id": EOS_SET, "min_length": 25},
    "everything": {
        "temperature": 1.3,
        "top_k": 70,
        "top_p": 0.9,
        "min_p": 0.005,
        "repetition_penalty": 1.1,
        "eos_token_id": EOS_SET,
        "min_new_tokens": 7,
    },
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_sampled_tokens_are_those_of_generate(pair: Pair, name: str) -> None:
    options = {"do_sample": True, "max_new_tokens": 30, **COMBINATIONS[name]}
    for seed in range(3):
        prompt = random_ids(seed, 11)
        torch.manual_seed(seed)
        ours = pair.lm().generate(prompt, rng="torch", **options)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert ours.token_ids == hf_generate(pair.hf, prompt, **options)
        assert torch.equal(state, torch.get_rng_state()), "as many numbers were drawn"


def test_max_length_counts_the_prompt(pair: Pair) -> None:
    prompt = random_ids(1, 11)
    torch.manual_seed(1)
    ours = pair.lm().generate(prompt, rng="torch", do_sample=True, max_length=29).token_ids
    torch.manual_seed(1)
    assert ours == hf_generate(pair.hf, prompt, do_sample=True, max_length=29)
    assert len(ours) == 18


def test_max_new_tokens_wins_over_max_length(pair: Pair) -> None:
    prompt = random_ids(1, 11)
    options = {"max_length": 12, "max_new_tokens": 15, "eos_token_id": None}
    ours = pair.lm().generate(prompt, **options)
    assert ours.token_ids == hf_generate(pair.hf, prompt, do_sample=False, **options)
    assert len(ours.token_ids) == 15
    assert ours.finish_reason == "length"


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_without_a_length_there_are_twenty_tokens_or_what_the_context_holds(pair: Pair) -> None:
    for length in (11, 250):
        prompt = random_ids(1, length)
        ours = pair.lm().generate(prompt, eos_token_id=None).token_ids
        assert ours == hf_generate(pair.hf, prompt, do_sample=False, eos_token_id=None)
        assert len(ours) == min(20, 256 - length)


def random_options(draw: random.Random, length: int) -> dict[str, Any]:
    """Any of our options, each on or off, with values from harmless to extreme."""
    options: dict[str, Any] = {"do_sample": draw.random() < 0.6}
    knobs = {
        "temperature": draw.choice((0.1, 0.5, 1.0, 3.0)),
        "top_k": draw.choice((0, 1, 3, 50, 400)),
        "top_p": draw.choice((0.05, 0.5, 0.9, 1.0)),
        "min_p": draw.choice((0.0, 0.02, 0.3, 1.0)),
    }
    if options["do_sample"]:
        options |= {name: value for name, value in knobs.items() if draw.random() < 0.5}
    if draw.random() < 0.4:
        options["repetition_penalty"] = draw.choice((0.5, 1.1, 2.0, 10.0))
    if draw.random() < 0.7:
        options["eos_token_id"] = draw.sample(range(331), draw.randint(1, 40))
    if draw.random() < 0.3:
        options["max_length"] = length + draw.randint(1, 30)
    if draw.random() < 0.6 or "max_length" not in options:
        options["max_new_tokens"] = draw.randint(1, 30)
    most = options.get("max_new_tokens", options.get("max_length", 0) - length)
    if draw.random() < 0.3:
        options["min_new_tokens"] = draw.randint(0, most)
    if draw.random() < 0.3:
        options["min_length"] = draw.randint(0, length + most)
    if draw.random() < 0.4:
        options["stop_strings"] = [
            "".join(draw.choices("aeiot 123(){}n\n", k=draw.choice((1, 1, 2)))) for _ in range(4)
        ]
    return options


@pytest.mark.parametrize("seed", range(15))
def test_random_options_together_give_the_tokens_of_generate(pair: Pair, seed: int) -> None:
    draw = random.Random(seed)
    prompt = random_ids(seed, draw.choice((1, 2, 15, 16, 17, 40)))
    options = random_options(draw, len(prompt))
    torch.manual_seed(seed)
    ours = pair.lm().generate(prompt, rng="torch", **options).token_ids
    torch.manual_seed(seed)
    assert ours == hf_generate(pair.hf, prompt, tokenizer=tiny_tokenizer(), **options), options
