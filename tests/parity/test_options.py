"""Every field of transformers' GenerationConfig works as it does in generate, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

from handloom.errors import InvalidParam, UnsupportedOption
from parity_checks import Pair, hf_generate
from tiny_models import random_ids, tiny_tokenizer

PROMPT = random_ids(1, 12)
EOS_SET = list(range(4, 331, 30))
BASE: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": EOS_SET}
SAMPLED: dict[str, Any] = {**BASE, "do_sample": True}
BEAMS: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": list(range(1, 331, 8)), "num_beams": 4}

# A value that is not the default, and what it must be set beside to matter.
WORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_length": (17, {"eos_token_id": EOS_SET}),
    "max_new_tokens": (5, {"eos_token_id": None}),
    "min_length": (30, SAMPLED),
    "min_new_tokens": (20, SAMPLED),
    "max_time": (1e-6, BASE),
    "stop_strings": ([*"abcdefghijklmnopqrstuvwxyz0123456789 "], {**BASE, "eos_token_id": None}),
    "do_sample": (True, BASE),
    "temperature": (0.1, SAMPLED),
    "top_k": (2, SAMPLED),
    "top_p": (0.2, SAMPLED),
    "min_p": (0.5, SAMPLED),
    "repetition_penalty": (5.0, {**SAMPLED, "eos_token_id": None}),
    "eos_token_id": (list(range(200)), {"max_new_tokens": 24, "do_sample": True}),
    "top_h": (0.2, SAMPLED),
    "typical_p": (0.2, SAMPLED),
    "epsilon_cutoff": (0.1, SAMPLED),
    "eta_cutoff": (0.3, SAMPLED),
    "sequence_bias": ([[[id_], 8.0] for id_ in range(100, 200)], SAMPLED),
    "encoder_repetition_penalty": (5.0, {**SAMPLED, "eos_token_id": None}),
    "no_repeat_ngram_size": (1, {**SAMPLED, "temperature": 0.1}),
    "encoder_no_repeat_ngram_size": (1, {**SAMPLED, "encoder_repetition_penalty": 5.0}),
    "bad_words_ids": ([[id_] for id_ in range(0, 331, 2)], SAMPLED),
    "forced_eos_token_id": (5, {"max_new_tokens": 24, "eos_token_id": None}),
    "exponential_decay_length_penalty": ((0, 30.0), SAMPLED),
    "suppress_tokens": (list(range(0, 331, 2)), SAMPLED),
    "begin_suppress_tokens": (list(range(300)), SAMPLED),
    "watermarking_config": (WatermarkingConfig(bias=20.0), SAMPLED),
    "guidance_scale": (2.0, BASE),
    "num_beams": (3, {"max_new_tokens": 24, "eos_token_id": None}),
    "early_stopping": (True, {**BEAMS, "length_penalty": 2.0}),
    "length_penalty": (-1.0, BEAMS),
}
# What another file compares with generate: it makes a list of outputs, changes no token, or needs a model
# that computes plainly.
ELSEWHERE = {
    "num_return_sequences": "test_several_samples.py",
    "num_beam_groups": "test_group_beams.py",
    "diversity_penalty": "test_group_beams.py",
    "force_words_ids": "test_constrained_beams.py",
    "constraints": "test_constrained_beams.py",
    "output_hidden_states": "test_internals.py",
    "output_attentions": "test_internals.py",
    "prompt_lookup_num_tokens": "test_speculation.py",
    "max_matching_ngram_size": "test_speculation.py",
    "num_assistant_tokens": "test_speculation.py",
    "num_assistant_tokens_schedule": "test_speculation.py",
    "assistant_confidence_threshold": "test_speculation.py",
    "penalty_alpha": "test_contrastive_and_dola.py",
    "dola_layers": "test_contrastive_and_dola.py",
    "token_healing": "test_token_healing.py",
}
# Fields that change no token: what they ask for is given, or is how an Output always is.
CHANGE_NO_TOKEN: dict[str, Any] = {
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "low_memory": True,
    "disable_compile": True,
    "pad_token_id": 5,
    "bos_token_id": 5,
    "transformers_version": "4.0.0",
    "_from_model_config": True,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "forced_bos_token_id": 5,  # it follows a prompt of one token only
}
REFUSED: dict[str, Any] = {
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 64,
    "decoder_start_token_id": 5,
    "is_assistant": True,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "mtp",
    "compile_config": {"mode": "default"},
    "continuous_batching_config": {"block_size": 16},
    "prefill_chunk_size": 16,
}
FIELDS = sorted(GenerationConfig().to_dict())


def test_every_field_of_the_installed_transformers_is_in_one_of_the_tables() -> None:
    known = [*WORKS, *ELSEWHERE, *CHANGE_NO_TOKEN, *REFUSED]
    assert len(known) == len(set(known))
    assert not set(FIELDS) - set(known)


@pytest.mark.parametrize("name", [name for name in FIELDS if name in WORKS])
def test_a_field_that_works_gives_the_tokens_of_generate(pair: Pair, name: str) -> None:
    value, beside = WORKS[name]
    options = {**beside, name: value}
    torch.manual_seed(3)
    ours = pair.lm().generate(PROMPT, rng="torch", **options).token_ids
    torch.manual_seed(3)
    tokenizer = {"tokenizer": tiny_tokenizer()} if name == "stop_strings" else {}
    assert ours == hf_generate(pair.hf, PROMPT, **options, **tokenizer)

    torch.manual_seed(3)
    without = pair.lm().generate(PROMPT, rng="torch", **beside).token_ids
    if name in ("min_length", "min_new_tokens"):
        assert len(ours) >= value - (len(PROMPT) if name == "min_length" else 0)
    else:
        assert ours != without


@pytest.mark.parametrize("name", [name for name in FIELDS if name in CHANGE_NO_TOKEN])
def test_a_field_that_changes_no_token_changes_none(pair: Pair, name: str) -> None:
    options = {**BASE, name: CHANGE_NO_TOKEN[name]}
    output = pair.lm().generate(PROMPT, **options)
    assert output.token_ids == pair.lm().generate(PROMPT, **BASE).token_ids
    kept = {"output_scores": output.scores, "output_logits": output.logits}
    for field, values in kept.items():
        assert (values is not None) == (name == field)
    if not name.startswith(("_", "transformers")):
        assert output.token_ids == hf_generate(pair.hf, PROMPT, do_sample=False, **options)


@pytest.mark.parametrize("name", [name for name in FIELDS if name in REFUSED])
def test_a_field_that_does_not_work_is_refused_by_name(pair: Pair, name: str) -> None:
    with pytest.raises((UnsupportedOption, InvalidParam), match=rf"\b{name}\b"):
        pair.lm().generate(PROMPT, **BASE, **{name: REFUSED[name]})
    # The default says nothing, so it may be said.
    default = GenerationConfig._get_default_generation_params().get(name)
    expected = pair.lm().generate(PROMPT, **BASE).token_ids
    assert pair.lm().generate(PROMPT, **BASE, **{name: default}).token_ids == expected


@pytest.mark.parametrize("name", ["use_mtp", "decoder_start_token_id"])
def test_a_field_in_a_passed_generation_config_is_refused_by_name(pair: Pair, name: str) -> None:
    config = GenerationConfig(**BASE)
    setattr(config, name, REFUSED[name])
    with pytest.raises((UnsupportedOption, InvalidParam), match=rf"\b{name}\b"):
        pair.lm().generate(PROMPT, generation_config=config)


def test_an_option_nobody_knows_is_refused_by_name(pair: Pair) -> None:
    with pytest.raises(ValueError, match="temprature"):
        pair.hf.generate(torch.tensor([PROMPT]), temprature=0.5)
    with pytest.raises(InvalidParam, match=r"temprature.*temperature"):
        pair.lm().generate(PROMPT, temprature=0.5)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_a_sampling_option_beside_do_sample_false_is_refused(pair: Pair, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParam, match=next(iter(options))):
        pair.lm().generate(PROMPT, do_sample=False, **options)
