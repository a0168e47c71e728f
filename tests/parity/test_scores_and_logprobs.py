"""Scores, raw logits, log-probabilities and likelihoods equal what transformers computes for the same tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import handloom as hl
from handloom.collect import Collector
from parity_checks import Pair, assert_logits_equal, hf_logits
from tiny_models import ragged_prompts, random_ids

EVERY_SEVENTH = list(range(0, 331, 7))

RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_penalty below 1": {"repetition_penalty": 0.6},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": EVERY_SEVENTH},
    "min_length": {"min_length": 25, "eos_token_id": [3, 5, 7]},
    "temperature": {"do_sample": True, "temperature": 0.3},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_k off": {"do_sample": True, "top_k": 0},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.6},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "all": {
        "do_sample": True,
        "temperature": 1.4,
        "top_k": 60,
        "top_p": 0.8,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "min_new_tokens": 4,
        "eos_token_id": EVERY_SEVENTH,
    },
}


def assert_scores_equal(ours: Tensor, theirs: Tensor) -> None:
    """The same tokens are ruled out, and the others score the same."""
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    left = theirs > -torch.inf
    assert left.any()
    assert torch.allclose(ours[left], theirs[left], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rules", RULES)
def test_scores_and_logits_of_each_step_are_those_of_generate(pair: Pair, rules: str) -> None:
    """Teacher-forced: both continue the same prefixes by one token."""
    options = {**RULES[rules], "output_scores": True, "output_logits": True}
    ids = random_ids(1, 32)
    prefixes = [ids[:length] for length in range(20, 32)]
    if "min_new_tokens" in options:
        prefixes = prefixes[:1]
    ours = pair.lm().generate(prefixes, max_new_tokens=8, **options)
    for prefix, output in zip(prefixes, ours, strict=True):
        steps = range(len(output.token_ids)) if len(prefixes) == 1 else (0,)
        for step in steps:
            fed = prefix + output.token_ids[:step]
            rest = dict(options)
            if "min_new_tokens" in options:
                rest["min_new_tokens"] = max(0, options["min_new_tokens"] - step)
            theirs = pair.hf.generate(
                torch.tensor([fed]), max_new_tokens=8 - step, return_dict_in_generate=True, **rest
            )
            assert_scores_equal(output.scores[step], theirs.scores[0][0])
            assert_logits_equal(output.logits[step][None], theirs.logits[0])


def test_scores_of_a_whole_run_are_those_of_generate(pair: Pair) -> None:
    prompt = random_ids(2, 15)
    options = {"max_new_tokens": 30, "repetition_penalty": 1.4, "output_scores": True, "output_logits": True}
    ours = pair.lm().generate(prompt, **options)
    theirs = pair.hf.generate(torch.tensor([prompt]), do_sample=False, return_dict_in_generate=True, **options)
    assert ours.token_ids == theirs.sequences[0, 15:].tolist()
    assert len(ours.scores) == len(ours.logits) == len(theirs.scores) == len(ours.token_ids)
    for step, (scores, logits) in enumerate(zip(ours.scores, ours.logits, strict=True)):
        assert_scores_equal(scores, theirs.scores[step][0])
        assert_logits_equal(logits[None], theirs.logits[step])


# Log-probabilities -----------------------------------------------------------------------------


def test_logprobs_are_the_log_softmax_of_the_raw_logits(pair: Pair) -> None:
    """Of the chosen token and of the n most likely, whatever the rules did to the scores."""
    prompt = random_ids(3, 21)
    rules = {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.5, "seed": 1}
    for options in ({}, rules):
        output = pair.lm().generate(prompt, max_new_tokens=20, logprobs=5, **options)
        exact = hf_logits(pair.hf, prompt + output.token_ids)[20:-1].log_softmax(-1)
        assert len(output.logprobs) == len(output.top_logprobs) == len(output.token_ids) == len(exact)
        for token_id, logprob, top, row in zip(
            output.token_ids, output.logprobs, output.top_logprobs, exact, strict=True
        ):
            assert logprob == pytest.approx(row[token_id].item(), abs=2e-5)
            assert [value for _, value in top] == pytest.approx(row.topk(5).values.tolist(), abs=2e-5)
            assert all(value == pytest.approx(row[token].item(), abs=2e-5) for token, value in top)


@pytest.mark.parametrize("max_step_tokens", [512, 7])
def test_prompt_logprobs_are_the_log_softmax_of_the_prompt(pair: Pair, max_step_tokens: int) -> None:
    prompts = ragged_prompts(4, (2, 23, 40))
    options = {"max_new_tokens": 4, "prompt_logprobs": 3, "logprobs": 0}
    engine = hl.Engine(pair.lm(), max_step_tokens=max_step_tokens)
    collector = Collector(engine)
    for prompt in prompts:
        collector.add(prompt, **options)
    list(collector.pieces())
    for prompt, output in zip(prompts, collector.outputs, strict=True):
        exact = hf_logits(pair.hf, prompt + output.token_ids).log_softmax(-1)
        chosen = exact[:-1].gather(1, torch.tensor(prompt + output.token_ids)[1:, None]).squeeze(1)
        assert output.prompt_logprobs == pytest.approx(chosen[: len(prompt) - 1].tolist(), abs=2e-5)
        assert output.logprobs == pytest.approx(chosen[len(prompt) - 1 :].tolist(), abs=2e-5)
        for top, row in zip(output.prompt_top_logprobs, exact, strict=False):
            assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=2e-5)


def test_prompt_logprobs_of_a_sequence_that_is_computed_already(pair: Pair) -> None:
    ids = random_ids(6, 30)
    exact = hf_logits(pair.hf, ids).log_softmax(-1)
    with pair.lm().sequence(ids) as sequence:
        assert len(sequence.logits) == len(exact[0])
        output = pair.lm().generate(sequence, max_new_tokens=1, prompt_logprobs=0)
    assert output.prompt_logprobs == pytest.approx([exact[i, t].item() for i, t in enumerate(ids[1:])], abs=2e-5)


def test_score_is_the_likelihood_behind_the_loss(pair: Pair) -> None:
    texts = ragged_prompts(5, (2, 30, 9, 200))
    scores = pair.lm().score(texts, top_logprobs=2)
    for ids, score in zip(texts, scores, strict=True):
        with torch.no_grad():
            loss = pair.hf(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
        assert score.token_ids == ids
        assert score.total == pytest.approx(-loss * (len(ids) - 1), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        exact = hf_logits(pair.hf, ids).log_softmax(-1)
        assert score.logprobs == pytest.approx([exact[i, t].item() for i, t in enumerate(ids[1:])], abs=2e-5)
        assert [len(top) for top in score.top_logprobs] == [2] * (len(ids) - 1)


def test_score_of_a_text_is_that_of_its_tokens(pair: Pair) -> None:
    lm, text = pair.lm(), "Once upon a time there was a weaver."
    by_text = lm.score(text)
    assert by_text.token_ids == lm.tokenizer.encode(text)
    assert by_text.logprobs == lm.score(by_text.token_ids).logprobs
