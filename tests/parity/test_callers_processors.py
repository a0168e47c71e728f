"""transformers' LogitsProcessors, and the caller's own, run inside our loop with the result they have in generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from handloom.errors import UnsupportedOption
from parity_checks import Pair, assert_tokens_equal, hf_generate
from tiny_models import ragged_prompts, random_ids

LENGTH, COUNT = 12, 24


class Alternate(LogitsProcessor):
    """Allows even ids after an odd number of tokens, odd ids after an even number."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wrong = torch.arange(scores.shape[-1]) % 2 == input_ids.shape[1] % 2
        return scores.masked_fill(wrong, -torch.inf)


def push_last_token_down(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A plain function that writes into the scores it is given."""
    scores.scatter_(1, input_ids[:, -1:], -50.0)
    return scores


# Built for each run, for some keep state; the prompt is what some of them are about.
PROCESSORS: dict[str, Callable[[list[int]], list[Any]]] = {
    "no repeated 2-grams": lambda prompt: [NoRepeatNGramLogitsProcessor(2)],
    "suppressed tokens": lambda prompt: [SuppressTokensLogitsProcessor(list(range(0, 331, 3)))],
    "suppressed at begin": lambda prompt: [SuppressTokensAtBeginLogitsProcessor(list(range(300)), len(prompt))],
    "bad words": lambda prompt: [NoBadWordsLogitsProcessor([[i] for i in range(40)] + [[50, 60]], eos_token_id=[0])],
    "sequence bias": lambda prompt: [SequenceBiasLogitsProcessor({(i,): -6.0 for i in range(100)} | {(200, 7): 9.0})],
    "encoder repetition": lambda prompt: [EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.tensor([prompt]))],
    "prefix constrained": lambda prompt: [
        PrefixConstrainedLogitsProcessor(lambda batch, ids: [int(ids[-1]) * 7 % 331, 5, 9, 12], num_beams=1)
    ],
    "exponential decay": lambda prompt: [ExponentialDecayLengthPenalty((4, 1.6), [17], len(prompt))],
    "forced eos": lambda prompt: [ForcedEOSTokenLogitsProcessor(LENGTH + 20, [17])],
    "no infinities": lambda prompt: [InfNanRemoveLogitsProcessor()],
    "normalized": lambda prompt: [LogitNormalization()],
    "typical": lambda prompt: [TypicalLogitsWarper(mass=0.4)],
    "epsilon": lambda prompt: [EpsilonLogitsWarper(epsilon=0.01)],
    "eta": lambda prompt: [EtaLogitsWarper(epsilon=0.02)],
    "a class": lambda prompt: [Alternate()],
    "a function": lambda prompt: [push_last_token_down],
    "three together": lambda prompt: [NoRepeatNGramLogitsProcessor(1), Alternate(), push_last_token_down],
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_choose_the_tokens_of_generate(pair: Pair, name: str) -> None:
    """Greedy in a batch, and drawn alone."""
    lm, prompts = pair.lm(), ragged_prompts(11, (LENGTH, LENGTH))
    options: dict[str, Any] = {"max_new_tokens": COUNT, "eos_token_id": 17, "min_new_tokens": 3}
    params = [{"logits_processor": LogitsProcessorList(PROCESSORS[name](prompt))} for prompt in prompts]
    outputs = lm.generate(prompts, params=params, **options)
    changed = False
    for prompt, output in zip(prompts, outputs, strict=True):
        theirs = {**options, "logits_processor": LogitsProcessorList(PROCESSORS[name](prompt))}
        assert_tokens_equal(pair.hf, prompt, output.token_ids, **theirs)
        changed |= output.token_ids != lm.generate(prompt, **options).token_ids
        sampled = {**options, "do_sample": True, "temperature": 1.5, "top_k": 0}
        own = LogitsProcessorList(PROCESSORS[name](prompt))
        torch.manual_seed(1)
        ours = lm.generate(prompt, rng="torch", logits_processor=own, **sampled)
        own = LogitsProcessorList(PROCESSORS[name](prompt))
        torch.manual_seed(1)
        assert ours.token_ids == hf_generate(pair.hf, prompt, logits_processor=own, **sampled)
        torch.manual_seed(1)
        changed |= ours.token_ids != lm.generate(prompt, rng="torch", **sampled).token_ids
    assert changed or name in ("no infinities", "normalized"), "these processors must matter here"


@pytest.mark.filterwarnings("ignore:A custom logits processor")
@pytest.mark.parametrize(
    ("processor", "option"),
    [
        (lambda: RepetitionPenaltyLogitsProcessor(3.0), {"repetition_penalty": 1.1}),
        (lambda: MinLengthLogitsProcessor(20, torch.tensor([17])), {"min_length": 14}),
    ],
    ids=["repetition_penalty", "min_length"],
)
def test_a_processor_of_a_built_in_class_replaces_the_built_in_one(
    pair: Pair, processor: Callable[[], Any], option: dict[str, Any]
) -> None:
    prompt = random_ids(4, LENGTH)
    free = hf_generate(pair.hf, prompt, do_sample=False, max_new_tokens=COUNT, eos_token_id=None)
    options = {"max_new_tokens": COUNT, "eos_token_id": [17, free[4]], **option}
    ours = pair.lm().generate(prompt, logits_processor=[processor()], **options)
    theirs = hf_generate(
        pair.hf, prompt, do_sample=False, logits_processor=LogitsProcessorList([processor()]), **options
    )
    assert ours.token_ids == theirs


def test_a_warper_among_the_processors_runs_before_our_own(pair: Pair) -> None:
    """In transformers a caller's temperature takes the built-in's place only when sampling turns one on."""
    prompt = random_ids(4, LENGTH)
    for own, option in (
        ([TemperatureLogitsWarper(3.0)], {"top_k": 0}),
        ([TopKLogitsWarper(3)], {"temperature": 0.9, "top_k": 0}),
    ):
        options = {"do_sample": True, "max_new_tokens": COUNT, **option}
        torch.manual_seed(1)
        ours = pair.lm().generate(prompt, rng="torch", logits_processor=own, **options).token_ids
        torch.manual_seed(1)
        assert ours == hf_generate(pair.hf, prompt, logits_processor=LogitsProcessorList(own), **options)


def test_scores_are_those_after_the_callers_processors(pair: Pair) -> None:
    prompt = random_ids(5, LENGTH)
    options = {"max_new_tokens": 10, "repetition_penalty": 1.3, "output_scores": True, "output_logits": True}
    ours = pair.lm().generate(prompt, logits_processor=[Alternate()], **options)
    theirs = pair.hf.generate(
        torch.tensor([prompt]),
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([Alternate()]),
        **options,
    )
    assert ours.token_ids == theirs.sequences[0, LENGTH:].tolist()
    for step in range(10):
        assert torch.allclose(ours.scores[step], theirs.scores[step][0], atol=2e-5)
        assert torch.allclose(ours.logits[step], theirs.logits[step][0], atol=2e-5)


class Learned(LogitsProcessor):
    """Has weights, as one that asks a second model has."""

    def __init__(self, *, returned: bool = False) -> None:
        self.weights, self.returned = torch.nn.Parameter(torch.linspace(-9, 9, 331)[None]), returned

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.returned:
            return self.weights if len(scores) == 1 else self.weights.expand_as(scores)
        return scores + self.weights


class Trained(StoppingCriteria):
    """Has weights too."""

    def __init__(self) -> None:
        self.weights = torch.nn.Parameter(torch.ones(1))

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids.shape[1] * self.weights > 20).expand(len(input_ids))


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_processors_and_criteria_with_weights_run_without_gradients(pair: Pair, more: dict[str, Any]) -> None:
    """As in generate, which turns them off."""
    prompt = random_ids(3, LENGTH)
    options = {
        "max_new_tokens": COUNT,
        "eos_token_id": None,
        "stopping_criteria": StoppingCriteriaList([Trained()]),
        **more,
    }
    for processor in (Learned(), Learned(returned=True)):
        processors = LogitsProcessorList([processor])
        torch.manual_seed(3)
        theirs = pair.hf.generate(torch.tensor([prompt]), logits_processor=processors, **options)[:, LENGTH:]
        torch.manual_seed(3)
        ours = pair.lm().generate([prompt], logits_processor=processors, rng="torch", **options)
        assert [output.token_ids for output in ours] == theirs.tolist()
        assert theirs.shape[1] == 21 - LENGTH


REMEMBERING: dict[str, Callable[[Pair], LogitsProcessor]] = {
    "watermarking_config": lambda pair: SynthIDTextWatermarkLogitsProcessor(
        3,
        [1, 2, 3],
        sampling_table_size=1024,
        sampling_table_seed=0,
        context_history_size=64,
        device=torch.device("cpu"),
    ),
    "guidance_scale": lambda pair: UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, pair.hf),
}


@pytest.mark.parametrize("instead", REMEMBERING)
def test_a_processor_that_remembers_serves_one_output(pair: Pair, instead: str) -> None:
    """Several would mix theirs up in it, and come out otherwise than in generate."""
    prompts = ragged_prompts(4, (LENGTH, LENGTH))
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    params = [{"logits_processor": [REMEMBERING[instead](pair)]} for _ in prompts]
    for prompt, output in zip(prompts, pair.lm().generate(prompts, params=params, **options), strict=True):
        own = LogitsProcessorList([REMEMBERING[instead](pair)])
        assert output.token_ids == hf_generate(pair.hf, prompt, do_sample=False, logits_processor=own, **options)
    shared = {**options, "logits_processor": [REMEMBERING[instead](pair)]}
    for given, more in (
        (prompts, {}),
        (prompts[0], {"num_beams": 2}),
        (prompts[0], {"do_sample": True, "num_return_sequences": 2}),
    ):
        with pytest.raises(UnsupportedOption, match=instead):
            pair.lm().generate(given, **shared, **more)
