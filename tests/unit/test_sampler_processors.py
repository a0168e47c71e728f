"""A caller's logits processors run where transformers runs them, and a wrong one fails its own row only."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as hf
from transformers.generation.utils import GenerationMixin

from handloom.errors import NonFiniteLogits, RequestFailed
from handloom.sampling.sampler import choose
from sampler_rows import SAMPLED, random_logits, row

INF = torch.inf


class NoModel(GenerationMixin):
    """As much of a model as `_get_logits_processor` reads."""

    class Config:
        is_encoder_decoder = False

    config = Config()


@pytest.mark.parametrize(
    "processors",
    [
        [hf.NoRepeatNGramLogitsProcessor(2)],
        [hf.TemperatureLogitsWarper(0.5), hf.TopKLogitsWarper(9)],
        [hf.RepetitionPenaltyLogitsProcessor(3.0), hf.NoRepeatNGramLogitsProcessor(2)],
        [hf.NoRepeatNGramLogitsProcessor(2), hf.RepetitionPenaltyLogitsProcessor(3.0)],
        [hf.RepetitionPenaltyLogitsProcessor(3.0), hf.RepetitionPenaltyLogitsProcessor(0.7)],
        [hf.MinLengthLogitsProcessor(2, [1]), hf.SuppressTokensLogitsProcessor([8])],
        [hf.MinNewTokensLengthLogitsProcessor(3, 1, [1])],
        [hf.SequenceBiasLogitsProcessor({(3,): 7.0}), hf.LogitNormalization()],
    ],
    ids=lambda processors: "+".join(type(processor).__name__ for processor in processors),
)
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.5])
def test_processors_of_transformers_run_in_the_place_transformers_gives_them(processors, repetition_penalty):
    tokens, prompt_length = [5, 6, 5, 6, 5, 7, 5], 3
    config = GenerationConfig(
        do_sample=True, num_beams=1, temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=repetition_penalty,
        min_length=9, min_new_tokens=6,
    )  # fmt: skip
    config._eos_token_tensor = torch.tensor([1])
    chain = NoModel()._get_logits_processor(
        config,
        input_ids_seq_length=prompt_length,
        logits_processor=hf.LogitsProcessorList(processors),
        device="cpu",
    )
    params = {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "eos_token_id": (1,), "min_length": 9}
    one = row(
        tokens, prompt_length, min_new_tokens=6, repetition_penalty=repetition_penalty, output_scores=True,
        logits_processor=tuple(processors), **params,
    )  # fmt: skip
    for seed in range(5):
        logits = random_logits(1, vocab_size=60, seed=seed)
        mine = choose(logits, [one]).scores[0]
        assert mine is not None
        assert torch.equal(mine[None], chain(torch.tensor([tokens]), logits.clone()))


def test_a_processor_given_twice_runs_once_as_in_transformers():
    calls = []

    def count(input_ids, scores):
        calls.append(input_ids.tolist())
        return scores

    choose(random_logits(1), [row([4, 5, 6], logits_processor=(count, count))])
    assert calls == [[[4, 5, 6]]]


def test_a_processor_may_force_a_token_by_infinity_when_greedy():
    def force(input_ids, scores):
        scores[:, 11] = INF
        return scores

    choice = choose(random_logits(2), [row(logits_processor=(force,)), row(do_sample=True, logits_processor=(force,))])
    assert choice.token_ids == [11, -1]
    assert isinstance(choice.errors[1], NonFiniteLogits)


def test_scores_that_a_processor_keeps_are_not_changed_later():
    kept = []

    def keep(input_ids, scores):
        kept.append(scores)
        return scores

    logits = random_logits(1)
    choose(logits, [row(do_sample=True, temperature=0.5, top_k=3, logits_processor=(keep,))])
    assert torch.equal(kept[0], logits)


def raises(input_ids, scores):
    raise KeyError("a processor's own mistake")


WRONG = [
    (raises, "raised KeyError"),
    (lambda input_ids, scores: None, "must return a tensor"),
    (lambda input_ids, scores: scores[0], "must return scores"),
    (lambda input_ids, scores: scores[:, :-1], "must return scores"),
    (lambda input_ids, scores: scores.double(), "must return scores"),
    (lambda scores: scores, "raised TypeError"),
]


@pytest.mark.parametrize(("processor", "message"), WRONG)
def test_a_wrong_processor_fails_its_own_row_only(processor, message):
    logits, good = random_logits(3), row(seed=4, **SAMPLED)
    choice = choose(logits, [good, row(logits_processor=(processor,), logprobs=1, output_scores=True), good])
    assert choice.token_ids[1] == -1
    assert choice.logprobs[1] is None and choice.scores[1] is None
    error = choice.errors[1]
    assert isinstance(error, RequestFailed)
    assert message in str(error)
    for i in (0, 2):
        assert choice.errors[i] is None
        assert choice.token_ids[i] == choose(logits[i : i + 1], [good]).token_ids[0]


def test_what_a_processor_raised_is_the_cause():
    error = choose(random_logits(1), [row(logits_processor=(raises,))]).errors[0]
    assert isinstance(error, RequestFailed)
    assert isinstance(error.__cause__, KeyError)
