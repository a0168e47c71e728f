"""Every way of sampling draws from the exact distribution that transformers' processors give: chi-square, p > 1e-6."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation.utils import GenerationMixin

from chi_square import p_value
from handloom.sampling.params import GenerationParams, resolve_params
from handloom.sampling.rules import AFTER_THE_CALLERS, RequestRules, Row
from handloom.sampling.sampler import choose

VOCAB, DRAWS, PROMPT = 40, 8000, [5, 6, 7, 5, 6, 9]

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.5},
    "top_h": {"top_h": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "epsilon_cutoff": {"epsilon_cutoff": 0.03},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "sequence_bias": {"sequence_bias": {(3,): 1.5, (9, 4): 2.5, (8, 5): 9.0}},
    "bad_words_ids": {"bad_words_ids": [[3], [9, 5], [9, 6], [8, 7]]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(1, VOCAB, 3))},
    "suppress_tokens": {"suppress_tokens": list(range(0, VOCAB, 3))},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch_id, ids: list(range(int(ids[-1])))},
    "green list": {"watermarking_config": WatermarkingConfig()},
    "SynthID": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836])},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 9},
    "top_k, top_p": {"top_k": 15, "top_p": 0.7},
    "top_p, min_p, hot": {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05},
    "top_h, top_k": {"top_h": 0.8, "top_k": 12},
    "typical_p, eta_cutoff": {"typical_p": 0.8, "eta_cutoff": 0.02},
    "epsilon_cutoff, penalties": {"epsilon_cutoff": 0.02, "repetition_penalty": 1.5, "encoder_repetition_penalty": 1.3},
    "green list, top_p": {"watermarking_config": WatermarkingConfig(bias=1.5), "top_p": 0.9},
    "SynthID, top_k": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=2, keys=[7, 8]), "top_k": 12},
    "many": {
        "temperature": 1.5, "top_k": 25, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 0.002,
        "repetition_penalty": 1.3, "watermarking_config": WatermarkingConfig(bias=1.0), "renormalize_logits": True,
    },
}  # fmt: skip


class NoModel(GenerationMixin):
    """As much of a model as `_get_logits_processor` reads."""

    class Config:
        is_encoder_decoder, vocab_size = False, VOCAB

        def get_text_config(self) -> Any:
            return self

    config = Config()


def exact(options: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """The next token's probabilities by transformers' processors, float64 [V]."""
    options = dict(options)
    allowed = options.pop("prefix_allowed_tokens_fn", None)
    config = GenerationConfig(do_sample=True, num_beams=1, max_length=20, **options)
    config._eos_token_tensor = torch.tensor([1])
    chain = NoModel()._get_logits_processor(
        config, input_ids_seq_length=len(PROMPT), encoder_input_ids=torch.tensor([PROMPT]), device="cpu",
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    return chain(torch.tensor([PROMPT]), logits.clone())[0].double().softmax(dim=0)


def drawn(options: dict[str, Any], logits: torch.Tensor, **more: Any) -> torch.Tensor:
    """How often each token came up in DRAWS draws, a seed each: int64 [V]."""
    params: GenerationParams = resolve_params(
        {"do_sample": True, "max_new_tokens": 9, "top_k": 0, **options, **more},
        generation_config={}, prompt_length=len(PROMPT), max_context=64, vocab_size=VOCAB, eos_token_id=1,
    )  # fmt: skip
    rules = RequestRules(params, len(PROMPT))
    rows = [Row(dataclasses.replace(params, seed=seed), PROMPT, len(PROMPT), rules) for seed in range(DRAWS)]
    return torch.bincount(torch.tensor(choose(logits.expand(DRAWS, -1), rows).token_ids), minlength=VOCAB)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(11)) * 1.5
    logits[0, PROMPT] = torch.tensor([2.0, 1.5, 2.5, 2.0, 1.5, 3.0])
    return logits


@pytest.mark.parametrize("rng", ["counter", "torch"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_draws_follow_the_exact_distribution(name: str, rng: str, logits: torch.Tensor) -> None:
    torch.manual_seed(1)
    options = {"top_k": 0, **CONFIGURATIONS[name]}
    probabilities = exact(options, logits)
    counts = drawn(options, logits, rng=rng)
    assert int((probabilities > 0).sum()) > 3
    assert p_value(counts, probabilities) > 1e-6
    if name != "plain":
        far = (exact({"top_k": 0}, logits) - probabilities).abs().sum() / 2
        assert far > 0.05, "this option must matter here"


def test_every_rule_of_sampling_is_here_alone() -> None:
    assert {rule.option for rule in AFTER_THE_CALLERS if rule.sampled} - {"temperature"} <= CONFIGURATIONS.keys()


def test_the_test_sees_a_distribution_that_is_a_little_off(logits: torch.Tensor) -> None:
    assert p_value(drawn({"temperature": 1.1}, logits), exact({"top_k": 0}, logits)) < 1e-6
