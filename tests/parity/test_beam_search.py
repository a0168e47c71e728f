"""Beam search and beam sampling: the outputs, scores and beams of generate(num_beams=…).

By the tie rule of parity: where an output differs, its score is that of generate's within SCORES_TOLERANCE.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from handloom.output import Output
from parity_checks import SCORES_TOLERANCE, Pair
from tiny_models import random_ids, tiny_tokenizer

EOS, EOS_SET = [7], list(range(4, 331, 30))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"eos_token_id": None},
    "one eos": {"eos_token_id": EOS},
    "several eos": {"eos_token_id": EOS_SET},
    "early": {"eos_token_id": EOS_SET, "early_stopping": True},
    "never": {"eos_token_id": EOS_SET, "early_stopping": "never"},
    "long": {"eos_token_id": EOS_SET, "length_penalty": 2.0},
    "never, long": {"eos_token_id": EOS_SET, "length_penalty": 1.5, "early_stopping": "never"},
    "short": {"eos_token_id": EOS_SET, "length_penalty": -1.0},
    "never, short": {"eos_token_id": EOS_SET, "length_penalty": -0.5, "early_stopping": "never"},
    "no length": {"eos_token_id": EOS_SET, "length_penalty": 0.0},
    "max_length": {"eos_token_id": EOS_SET, "max_length": 20, "max_new_tokens": None},
    "repetition": {"repetition_penalty": 1.8, "eos_token_id": EOS},
    "ngrams": {"no_repeat_ngram_size": 1, "eos_token_id": EOS_SET},
    "both lengths": {"min_new_tokens": 5, "min_length": 20, "eos_token_id": EOS_SET},
    "forced": {"forced_eos_token_id": 5, "eos_token_id": EOS, "suppress_tokens": [*range(100)][6:]},
    "biases": {"sequence_bias": [[[9], 3.0], [[9, 10], 20.0]], "bad_words_ids": [[11, 12], [13]]},
    "renormalised": {"renormalize_logits": True, "repetition_penalty": 0.7, "eos_token_id": EOS_SET},
    "decay": {"exponential_decay_length_penalty": (2, 1.3), "eos_token_id": EOS_SET},
    "stop strings": {"stop_strings": ["a", "in", "e", "\n"], "eos_token_id": EOS},
    "allowed": {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1]) * 7 % 331, 5, 9, 12], "eos_token_id": EOS},
    "few allowed": {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1]) * 7 % 331, 5], "eos_token_id": EOS},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "defaults": {"eos_token_id": EOS_SET},
    "no eos": {"eos_token_id": None},
    "hot": {"temperature": 2.5, "top_k": 0, "eos_token_id": EOS},
    "keeps what goes on": {"top_k": 1, "eos_token_id": EOS_SET, "top_p": 0.01},
    "nucleus": {"top_p": 0.3, "top_k": 0, "eos_token_id": EOS},
    "min_p": {"min_p": 0.9, "top_k": 0, "eos_token_id": EOS_SET},
    "typical": {"typical_p": 0.1, "top_k": 0, "eos_token_id": EOS_SET},
    "cutoffs": {"epsilon_cutoff": 0.2, "eta_cutoff": 0.3, "top_k": 0, "eos_token_id": EOS},
    "never": {"early_stopping": "never", "length_penalty": 0.5, "eos_token_id": EOS_SET},
}


def theirs(pair: Pair, prompt: list[int], options: dict[str, Any]) -> Any:
    tokenizer = {"tokenizer": tiny_tokenizer()} if "stop_strings" in options else {}
    return pair.hf.generate(
        torch.tensor([prompt]),
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=330,
        **{"do_sample": False, **options},
        **tokenizer,
    )


def check(ours: list[Output], result: Any, prompt: list[int], what: Any = "") -> int:
    """Every output, score and beam index is generate's, or ties with it; returns how many tied."""
    ties = 0
    assert len(ours) == len(result.sequences), what
    columns = zip(ours, result.sequences.tolist(), result.sequences_scores.tolist(), result.beam_indices, strict=True)
    for output, row, score, indices in columns:
        assert output.beams.score == pytest.approx(score, rel=SCORES_TOLERANCE, abs=SCORES_TOLERANCE), what
        tokens = row[len(prompt) :][: int((indices >= 0).sum())]
        if output.token_ids != tokens:
            ties += 1
        else:
            assert output.beams.beam_indices == indices[: len(tokens)].tolist(), what
    return ties


def as_list(outputs: Any) -> list[Output]:
    return outputs if isinstance(outputs, list) else [outputs]


@pytest.mark.parametrize("name", OPTIONS)
def test_beam_search_gives_the_outputs_of_generate(pair: Pair, name: str) -> None:
    for beams, outputs, length in ((2, 1, 11), (4, 4, 17), (5, 3, 1)):
        prompt = random_ids(beams, length)
        options = {"max_new_tokens": 12, "num_beams": beams, "num_return_sequences": outputs, **OPTIONS[name]}
        result = theirs(pair, prompt, options)
        ours = as_list(pair.lm().generate(prompt, **options))
        assert check(ours, result, prompt, options) == 0


@pytest.mark.parametrize("name", SAMPLED)
def test_beam_sampling_gives_the_outputs_of_generate(pair: Pair, name: str) -> None:
    for beams, outputs in ((2, 2), (4, 1)):
        prompt = random_ids(beams, 9)
        options = {"max_new_tokens": 12, "num_beams": beams, "num_return_sequences": outputs, **SAMPLED[name]}
        options["do_sample"] = True
        torch.manual_seed(3)
        result = theirs(pair, prompt, options)
        torch.manual_seed(3)
        ours = as_list(pair.lm().generate(prompt, rng="torch", **options))
        assert check(ours, result, prompt, options) == 0
