"""Constrained beam search: the outputs and scores of transformers 4.56, recorded; and what must hold for any search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList

from handloom.errors import InvalidParam, UnsupportedOption
from old_beams import differing, recorded
from parity_checks import Pair
from parity_modes import PROPERTY
from tiny_models import random_ids

CASES = recorded("words")


@pytest.mark.parametrize("start", range(0, len(CASES), 30))
def test_forced_words_give_the_recorded_outputs_of_the_last_transformers_that_had_them(
    tiny_pair: Callable[..., Pair], start: int, record_property: Any
) -> None:
    for case in CASES[start : start + 30]:
        assert not differing(tiny_pair(case["family"]).lm(), case), case
    record_property(PROPERTY, {"equal": sum(len(case["tokens"]) for case in CASES[start : start + 30])})


def test_the_record_has_what_it_should_prove() -> None:
    options = [case["options"] for case in CASES]
    assert len(options) >= 400
    assert {own["early_stopping"] for own in options} == {False, True, "never"}
    assert sum(any(isinstance(word[0], list) for word in own["force_words_ids"]) for own in options) > 150
    assert sum(len(own["force_words_ids"]) > 1 for own in options) > 150
    short = sum(len(tokens) < case["options"]["max_new_tokens"] for case in CASES for tokens in case["tokens"])
    assert short > 40, "outputs that ended before the length"


def has(tokens: list[int], phrase: list[int]) -> bool:
    return any(tokens[at : at + len(phrase)] == phrase for at in range(len(tokens)))


@pytest.mark.parametrize("seed", range(5))
def test_an_output_has_every_phrase_and_says_whether_it_does(pair: Pair, seed: int) -> None:
    phrases = [random_ids(10 + seed, 2), random_ids(20 + seed, 1)]
    either = [random_ids(30 + seed, 1), random_ids(40 + seed, 2)]
    options = {"num_beams": 6, "max_new_tokens": 24, "eos_token_id": None, "force_words_ids": [*phrases, either]}
    outputs = pair.lm().generate(random_ids(seed, 9), num_return_sequences=6, **options)
    for output in outputs:
        everything = all(has(output.token_ids, phrase) for phrase in phrases)
        assert output.beams.fulfilled == (everything and any(has(output.token_ids, phrase) for phrase in either))
    assert pair.lm().generate(random_ids(seed, 9), **options).beams.fulfilled, "one is enough of those that have it"


def test_one_token_is_too_few_for_two_phrases_and_the_output_says_so(pair: Pair) -> None:
    options = {"num_beams": 2, "max_new_tokens": 1, "force_words_ids": [[5], [6]]}
    assert pair.lm().generate(random_ids(1, 5), **options).beams.fulfilled is False
    assert pair.lm().generate([5, 6], **options).beams.fulfilled is True, "what the prompt has counts"


@dataclass
class PhrasalConstraint:
    """Like the class that transformers had."""

    token_ids: list[int]


@dataclass
class DisjunctiveConstraint:
    token_ids: list[list[int]]


def test_constraints_say_what_force_words_ids_say(pair: Pair) -> None:
    base = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9, "eos_token_id": None}
    words = [[5, 6], [[7, 8], [9]], [11]]
    expected = pair.lm().generate(random_ids(1, 5), force_words_ids=words, **base)
    objects = [PhrasalConstraint([5, 6]), DisjunctiveConstraint([[7, 8], [9]])]
    for options in ({"constraints": objects, "force_words_ids": [[11]]}, {"force_words_ids": words}):
        outputs = pair.lm().generate(random_ids(1, 5), **base, **options)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_criteria_end_the_search_where_they_say_so_of_every_beam(pair: Pair) -> None:
    def after_five(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 15)

    output = pair.lm().generate(
        random_ids(1, 10), num_beams=3, max_new_tokens=9, eos_token_id=None, force_words_ids=[[5]],
        stopping_criteria=StoppingCriteriaList([after_five]),
    )  # fmt: skip
    assert (len(output.token_ids), output.finish_reason) == (5, "criteria") and output.beams.fulfilled


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"force_words_ids": []}, InvalidParam, r"force_words_ids=\[\]"),
        ({"force_words_ids": [[]]}, InvalidParam, "force_words_ids.*not empty"),
        ({"force_words_ids": [[[]]]}, InvalidParam, "force_words_ids.*one or more token ids"),
        ({"force_words_ids": [[[5], 6]]}, InvalidParam, "force_words_ids.*one or more token ids"),
        ({"force_words_ids": [[5, [6]]]}, InvalidParam, r"force_words_ids.*in \[0, 331\)"),
        ({"force_words_ids": [5]}, InvalidParam, "force_words_ids.*not empty"),
        ({"force_words_ids": "word"}, InvalidParam, "force_words_ids='word'"),
        ({"force_words_ids": [[331]]}, InvalidParam, r"force_words_ids.*in \[0, 331\).*331"),
        ({"force_words_ids": [[-1]]}, InvalidParam, r"force_words_ids.*in \[0, 331\).*-1"),
        ({"force_words_ids": [[2**64]]}, InvalidParam, r"force_words_ids.*in \[0, 331\)"),
        ({"force_words_ids": [[True]]}, InvalidParam, "force_words_ids"),
        ({"force_words_ids": [[5.0]]}, InvalidParam, "force_words_ids"),
        ({"force_words_ids": [[5]] * 1025}, InvalidParam, "force_words_ids.*at most 1024"),
        ({"force_words_ids": [[[5] * 10**6]]}, InvalidParam, "force_words_ids.*at most 1024"),
        ({"force_words_ids": [[5, 7]]}, InvalidParam, "force_words_ids.*end-of-sequence token 7"),
        ({"force_words_ids": [[[5], [5, 6]]]}, InvalidParam, r"force_words_ids.*begins with another.*\[5\]"),
        ({"force_words_ids": [[[5], [5]]]}, InvalidParam, "force_words_ids.*begins with another"),
        ({"constraints": []}, InvalidParam, r"constraints=\[\]"),
        ({"constraints": [[5]]}, InvalidParam, "constraints.*PhrasalConstraint"),
        ({"constraints": [1.5j]}, InvalidParam, "constraints.*PhrasalConstraint"),
        ({"constraints": [PhrasalConstraint([400])]}, InvalidParam, r"constraints.*in \[0, 331\)"),
        ({"constraints": 5}, InvalidParam, "constraints=5"),
        ({"force_words_ids": [[5]], "num_beams": 1}, InvalidParam, "force_words_ids.*num_beams"),
        ({"force_words_ids": [[5]], "do_sample": True}, InvalidParam, "force_words_ids.*do_sample"),
        ({"force_words_ids": [[5]], "stop_strings": "a"}, UnsupportedOption, "stop_strings beside force_words_ids"),
        ({"force_words_ids": [[5]], "prompt_logprobs": 1}, UnsupportedOption, "prompt_logprobs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_sense_is_refused_by_name(pair: Pair, options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pair.lm().generate(random_ids(1, 5), **{"num_beams": 3, "eos_token_id": 7, **options})
