"""Where generation ends, and with which tokens: eos sets, lengths, stop strings, transformers' own criteria."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from handloom.errors import HandloomError
from parity_checks import Pair, hf_generate
from tiny_models import ragged_prompts, random_ids, tiny_tokenizer

COUNT = 40


def free_run(pair: Pair, prompt: list[int], count: int = COUNT) -> list[int]:
    """What comes when nothing ends it early."""
    return hf_generate(pair.hf, prompt, do_sample=False, eos_token_id=None, max_new_tokens=count)


# Tokens and lengths ----------------------------------------------------------------------------


def test_an_eos_token_ends_the_output_and_stays_in_it(pair: Pair) -> None:
    prompt = random_ids(1, 12)
    free = free_run(pair, prompt)
    for eos in (free[5], [free[9]], [330, free[14], free[3]]):
        output = pair.lm().generate(prompt, max_new_tokens=COUNT, eos_token_id=eos)
        assert output.token_ids == hf_generate(pair.hf, prompt, do_sample=False, max_new_tokens=COUNT, eos_token_id=eos)
        assert output.finish_reason == "eos"
        assert output.token_ids[-1] in (eos if isinstance(eos, list) else [eos])


def test_rows_of_a_batch_end_each_at_its_own_eos(pair: Pair) -> None:
    prompts = ragged_prompts(2, (3, 20, 7, 31))
    params = [{"eos_token_id": free_run(pair, prompt)[i * 4]} for i, prompt in enumerate(prompts)]
    outputs = pair.lm().generate(prompts, params=params, max_new_tokens=COUNT)
    for prompt, own, output in zip(prompts, params, outputs, strict=True):
        assert output.token_ids == hf_generate(pair.hf, prompt, do_sample=False, max_new_tokens=COUNT, **own)
        assert output.finish_reason == "eos"


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 11}, {"min_length": 30}])
def test_eos_is_barred_before_the_minimum(pair: Pair, minimum: dict[str, int]) -> None:
    prompt = random_ids(3, 12)
    free = free_run(pair, prompt)
    options = {"max_new_tokens": COUNT, "eos_token_id": sorted({free[2], free[6], *range(0, 331, 9)}), **minimum}
    output = pair.lm().generate(prompt, **options)
    assert output.token_ids == hf_generate(pair.hf, prompt, do_sample=False, **options)
    assert len(output.token_ids) >= (11 if "min_new_tokens" in minimum else 18)
    assert output.token_ids != free[: len(output.token_ids)]


def test_max_length_and_max_new_tokens(pair: Pair) -> None:
    prompt = random_ids(4, 12)
    for options in ({"max_new_tokens": 1}, {"max_length": 13}, {"max_length": 30}):
        output = pair.lm().generate(prompt, eos_token_id=None, **options)
        assert output.token_ids == hf_generate(pair.hf, prompt, do_sample=False, eos_token_id=None, **options)
        assert output.finish_reason == "length"


def test_max_time_that_is_over_leaves_one_token(pair: Pair) -> None:
    prompt = random_ids(5, 12)
    output = pair.lm().generate(prompt, max_new_tokens=COUNT, max_time=1e-6)
    assert output.token_ids == hf_generate(pair.hf, prompt, do_sample=False, max_new_tokens=COUNT, max_time=1e-6)
    assert len(output.token_ids) == 1
    assert output.finish_reason == "time"


# Stop strings ----------------------------------------------------------------------------------


def pieces_of(text: str, draw: random.Random, count: int) -> list[str]:
    """Random substrings of 1 to 6 characters that transformers can spell, i.e. without broken characters."""
    found: list[str] = []
    while len(found) < count:
        start = draw.randrange(len(text))
        piece = text[start : start + draw.randint(1, 6)]
        if "\ufffd" not in piece and piece.isascii():
            found.append(piece)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_end_the_output_where_generate_ends_it(pair: Pair, seed: int) -> None:
    """At the first token that completes one, wherever it lies in that token; the token stays."""
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    prompt = random_ids(seed, 12)
    text = tokenizer.decode(free_run(pair, prompt), skip_special_tokens=False)
    hits = 0
    for count in (1, 1, 1, 3):
        stops = pieces_of(text, draw, count)
        options = {"max_new_tokens": COUNT, "eos_token_id": None, "stop_strings": stops}
        output = pair.lm().generate(prompt, **options)
        assert output.token_ids == hf_generate(pair.hf, prompt, do_sample=False, tokenizer=tokenizer, **options), stops
        hits += output.finish_reason == "stop_string"
        if output.finish_reason == "stop_string":
            assert output.stop_string in stops
            assert output.stop_string in tokenizer.decode((prompt + output.token_ids)[-20:])
    assert hits


def test_a_stop_string_that_begins_in_the_prompt_ends_the_output(pair: Pair) -> None:
    tokenizer = tiny_tokenizer()
    words = tokenizer.encode("Once upon a time there was a weave")
    ends = 0
    for last in range(3, 60):
        prompt = [*words, last]
        before, after = tokenizer.decode(prompt), tokenizer.decode(free_run(pair, prompt, 1))
        if not (before + after).isascii() or not after.strip():
            continue
        options = {"max_new_tokens": 4, "eos_token_id": None, "stop_strings": [before[-3:] + after[:1]]}
        output = pair.lm().generate(prompt, **options)
        theirs = hf_generate(pair.hf, prompt, do_sample=False, tokenizer=tokenizer, **options)
        assert output.token_ids == theirs
        ends += len(theirs) == 1
    assert ends


def test_stop_strings_and_eos_in_a_batch(pair: Pair) -> None:
    tokenizer, draw = tiny_tokenizer(), random.Random(3)
    prompts = ragged_prompts(3, (4, 18, 9))
    params = []
    for prompt in prompts:
        free = free_run(pair, prompt)
        params.append({"stop_strings": pieces_of(tokenizer.decode(free), draw, 2), "eos_token_id": free[20]})
    outputs = pair.lm().generate(prompts, params=params, max_new_tokens=COUNT)
    for prompt, own, output in zip(prompts, params, outputs, strict=True):
        options = {"do_sample": False, "max_new_tokens": COUNT, "tokenizer": tokenizer, **own}
        assert output.token_ids == hf_generate(pair.hf, prompt, **options)


def test_the_text_of_an_output_is_its_tokens_decoded(pair: Pair) -> None:
    prompts = ragged_prompts(7, range(1, 10))
    params = [{"seed": seed} for seed in range(9)]
    for output in pair.lm().generate(prompts, params=params, max_new_tokens=60, temperature=2.0, top_k=0):
        assert output.text == tiny_tokenizer().decode(output.token_ids, skip_special_tokens=True)


# transformers' criteria, and the caller's own ---------------------------------------------------


class SumDivisible(StoppingCriteria):
    """Stops after a token that makes the sum of all ids, prompt included, divisible by `by`."""

    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.sum(dim=-1) % self.by == 0


class Confident(StoppingCriteria):
    """Stops once the best score leads the next by more than 0.5; needs output_scores."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        assert len(scores) >= 1
        best = scores[-1].topk(2, dim=-1).values
        return best[:, 0] - best[:, 1] > 0.5


def plain_function(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    """A function is a criterion too."""
    return torch.isin(input_ids[:, -1], torch.arange(0, 331, 11))


@pytest.mark.parametrize(
    "criteria",
    [
        [SumDivisible(5)],
        [SumDivisible(23), MaxLengthCriteria(max_length=35)],
        [MaxTimeCriteria(max_time=0.0, initial_timestamp=1.0)],
        [EosTokenCriteria(eos_token_id=list(range(0, 331, 13)))],
        [StopStringCriteria(tiny_tokenizer(), [*string.ascii_letters, *string.digits, *string.punctuation])],
        [plain_function],
        [Confident()],
    ],
    ids=lambda criteria: "+".join(getattr(each, "__name__", type(each).__name__) for each in criteria),
)
def test_stopping_criteria_stop_where_generate_stops(pair: Pair, criteria: list[Any]) -> None:
    prompts = ragged_prompts(6, (2, 12, 33))
    options = {"max_new_tokens": COUNT, "eos_token_id": None, "output_scores": True}
    outputs = pair.lm().generate(prompts, stopping_criteria=StoppingCriteriaList(criteria), **options)
    for prompt, output in zip(prompts, outputs, strict=True):
        theirs = hf_generate(
            pair.hf,
            prompt,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList(criteria),
            return_dict_in_generate=True,
            **options,
        )
        assert output.token_ids == theirs
        assert output.finish_reason == ("criteria" if len(theirs) < COUNT else output.finish_reason)
    assert any(len(output.token_ids) < COUNT for output in outputs)


@pytest.mark.parametrize("lengths", [[30], [60, 45], [7]])
def test_a_length_that_only_a_criterion_says_is_the_length(pair: Pair, lengths: list[int]) -> None:
    """More than the 20 new tokens of a request that says nothing, and no fewer than one."""
    prompt = random_ids(8, 9)
    criteria = [MaxLengthCriteria(max_length=length) for length in lengths]
    ours = pair.lm().generate(prompt, eos_token_id=None, stopping_criteria=criteria).token_ids
    options = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList(criteria)}
    assert ours == hf_generate(pair.hf, prompt, do_sample=False, **options)
    assert len(ours) == max(1, min(lengths) - 9)


EOS = list(range(0, 331, 13))


def test_criteria_that_say_what_the_options_say_go_beside_them(pair: Pair) -> None:
    prompt = random_ids(8, 9)
    for options in (
        {"eos_token_id": EOS, "stopping_criteria": StoppingCriteriaList([EosTokenCriteria(EOS[::-1])])},
        {"max_length": 30, "eos_token_id": None, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(14)])},
    ):
        theirs = hf_generate(pair.hf, prompt, do_sample=False, **options)
        assert pair.lm().generate(prompt, **options).token_ids == theirs


REPLACING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "eos": (EosTokenCriteria([7]), {"eos_token_id": EOS}, r"eos_token_id=\[7\]"),
    "max_new_tokens": (MaxLengthCriteria(30), {"max_new_tokens": 4}, "max_length=30"),
    "max_length": (MaxLengthCriteria(30), {"max_length": 12}, "max_length=30"),
    "a config": (MaxLengthCriteria(30), {"generation_config": {"max_new_tokens": 4}}, "max_length=30"),
    "forced": (MaxLengthCriteria(40), {"forced_eos_token_id": 1}, "max_length=40"),
    "beams": (MaxLengthCriteria(40), {"num_beams": 2}, "max_length=40"),
    "past the context": (MaxLengthCriteria(10**6), {}, "context holds 256"),
    "no length": (MaxLengthCriteria("9"), {}, "no integer"),
    "time": (MaxTimeCriteria(9.0), {"max_time": 1.0}, "one of the two"),
    "stop strings": (StopStringCriteria(tiny_tokenizer(), ["a"]), {"stop_strings": "b"}, "one of the two"),
}


@pytest.mark.parametrize("name", REPLACING)
def test_a_criterion_that_would_replace_what_an_option_says_is_refused(
    tiny_pair: Callable[..., Pair], name: str
) -> None:
    """transformers leaves the option out, silently."""
    criterion, options, says = REPLACING[name]
    with pytest.raises(HandloomError, match=says):
        tiny_pair("llama").lm().generate(random_ids(8, 9), stopping_criteria=[criterion], **options)
