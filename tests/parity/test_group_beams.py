"""Diverse beam search: the outputs and scores of transformers 4.56, recorded; and what must hold for any search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from handloom.errors import InvalidParam, UnsupportedOption
from old_beams import differing, recorded
from parity_checks import Pair
from parity_modes import PROPERTY
from tiny_models import random_ids

EOS_SET = list(range(4, 331, 30))
CASES = recorded("groups")


@pytest.mark.parametrize("start", range(0, len(CASES), 30))
def test_groups_give_the_recorded_outputs_of_the_last_transformers_that_had_them(
    tiny_pair: Callable[..., Pair], start: int, record_property: Any
) -> None:
    for case in CASES[start : start + 30]:
        assert not differing(tiny_pair(case["family"]).lm(), case), case
    record_property(PROPERTY, {"equal": sum(len(case["tokens"]) for case in CASES[start : start + 30])})


def test_the_record_has_what_it_should_prove() -> None:
    options = [case["options"] for case in CASES]
    assert len(options) >= 400
    assert {own["num_beam_groups"] for own in options} == {2, 3, 4}
    assert {own["early_stopping"] for own in options} == {False, True, "never"}
    assert sum(isinstance(own["eos_token_id"], list) for own in options) > 200
    short = sum(len(tokens) < case["options"]["max_new_tokens"] for case in CASES for tokens in case["tokens"])
    assert short > 500, "outputs that ended before the length"
    assert sum(own.get("pad_token_id") is not None for own in options) > 100


def search(pair: Pair, prompt: list[int], **options: Any) -> list[Any]:
    beams = {"num_beams": 6, "num_beam_groups": 3, "num_return_sequences": 6, "diversity_penalty": 1.0}
    outputs: list[Any] = pair.lm().generate(prompt, **{**beams, "eos_token_id": None, "max_new_tokens": 8, **options})
    return outputs


def test_a_strong_penalty_keeps_the_groups_of_every_step_apart(pair: Pair) -> None:
    outputs = search(pair, random_ids(1, 9), diversity_penalty=1e6)
    groups = [{output.token_ids[0] for output in outputs if output.beams.beam_indices[0] // 2 == g} for g in range(3)]
    assert all(groups) and not groups[0] & groups[1] and not (groups[0] | groups[1]) & groups[2]


def test_the_first_group_is_a_beam_search_of_its_size(pair: Pair) -> None:
    prompt = random_ids(2, 11)
    found = [(output.token_ids, output.beams) for output in search(pair, prompt)]
    first = [(token_ids, beams.score) for token_ids, beams in found if beams.beam_indices[0] < 2]
    alone = pair.lm().generate(prompt, num_beams=2, num_return_sequences=2, eos_token_id=None, max_new_tokens=8)
    assert [tokens for tokens, _ in first] == [output.token_ids for output in alone]
    assert [score for _, score in first] == pytest.approx([output.beams.score for output in alone], abs=1e-5)


def test_scores_along_the_beam_indices_add_up_and_groups_that_are_over_have_none(pair: Pair) -> None:
    prompt = random_ids(3, 10)
    eos = list(range(1, 331, 4))
    outputs = search(pair, prompt, eos_token_id=eos, output_scores=True, output_logits=True, early_stopping=True)
    for output in outputs:
        converted = output.to_transformers()
        transitions = pair.hf.compute_transition_scores(
            converted.sequences, converted.scores, converted.beam_indices, normalize_logits=False
        )
        assert float(transitions.sum() / len(output.token_ids)) == pytest.approx(output.beams.score, abs=1e-4)
    over = [bool((scores == 0).all()) for scores in outputs[0].beams.scores[-1].view(3, 2, -1)]
    assert not all(over)
    assert [bool((logits == 0).all()) for logits in outputs[0].beams.logits[-1].view(3, 2, -1)] == over


def test_hidden_states_of_every_beam_are_kept(pair: Pair) -> None:
    eos = list(range(1, 331, 4))
    outputs = search(pair, random_ids(3, 10), eos_token_id=eos, output_hidden_states=True, early_stopping=True)
    for step in outputs[0].beams.seen[1:]:
        assert all(states.shape[:2] == (6, 1) for states in step.hidden_states)


def test_criteria_end_the_search_where_they_say_so_of_every_beam(pair: Pair) -> None:
    shapes = []

    def after_five(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return torch.full((len(ids),), ids.shape[1] >= 15)

    def for_one(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.arange(len(ids)) == 0

    outputs = search(pair, random_ids(1, 10), stopping_criteria=StoppingCriteriaList([for_one, after_five]))
    assert shapes == [(6, length) for length in range(11, 16)]
    assert {(len(output.token_ids), output.finish_reason) for output in outputs} == {(5, "criteria")}


def test_time_ends_the_search(pair: Pair) -> None:
    outputs = search(pair, random_ids(1, 10), max_time=1e-9)
    assert {(len(output.token_ids), output.finish_reason) for output in outputs} == {(1, "time")}


def test_processors_of_the_caller_run_after_the_penalty(pair: Pair) -> None:
    prompt, seen = random_ids(1, 10), []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.min())
        return scores

    expected = search(pair, prompt, diversity_penalty=1e6)
    outputs = search(pair, prompt, diversity_penalty=1e6, logits_processor=LogitsProcessorList([look]))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert seen[0] > -1e5 > seen[1]


def test_what_pads_counts_as_chosen_by_groups_that_are_over(tiny_pair: Callable[..., Pair]) -> None:
    """As in transformers, where their rows go on: the record would not be met with another token."""
    padded = [case for case in CASES[:190] if isinstance(case["options"].get("eos_token_id"), list)]
    others = [{**case, "options": {**case["options"], "pad_token_id": 330}} for case in padded]
    assert any(differing(tiny_pair(case["family"]).lm(), case) for case in others)


GROUPS = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_beam_groups": 3}, InvalidParam, "num_beam_groups=3 must divide num_beams=4"),
        ({"num_beam_groups": 5}, InvalidParam, "num_beam_groups=5 must divide num_beams=4"),
        ({"num_beam_groups": 0}, InvalidParam, "num_beam_groups=0"),
        ({"num_beam_groups": 10**9}, InvalidParam, "num_beam_groups=1000000000"),
        ({"num_beam_groups": 2.0}, InvalidParam, "num_beam_groups=2.0"),
        ({"num_beam_groups": True}, InvalidParam, "num_beam_groups=True"),
        ({"num_beam_groups": 1}, InvalidParam, "diversity_penalty=0.5"),
        ({"num_beams": 1}, InvalidParam, "num_beam_groups=2"),
        ({"diversity_penalty": 0.0}, InvalidParam, "diversity_penalty=0"),
        ({"diversity_penalty": None}, InvalidParam, "diversity_penalty=0"),
        ({"diversity_penalty": -1.0}, InvalidParam, "diversity_penalty=-1.0"),
        ({"diversity_penalty": float("nan")}, InvalidParam, "diversity_penalty=nan"),
        ({"diversity_penalty": float("inf")}, InvalidParam, "diversity_penalty=inf"),
        ({"pad_token_id": 331}, InvalidParam, "pad_token_id=331"),
        ({"pad_token_id": -1}, InvalidParam, "pad_token_id=-1"),
        ({"pad_token_id": "0"}, InvalidParam, "pad_token_id='0'"),
        ({"do_sample": True}, InvalidParam, "num_beam_groups.*do_sample"),
        ({"temperature": 0.5}, InvalidParam, "num_beam_groups.*do_sample"),
        ({"seed": 3}, InvalidParam, "num_beam_groups.*seed"),
        ({"stop_strings": ["a"]}, UnsupportedOption, "stop_strings beside num_beam_groups"),
        ({"force_words_ids": [[5]]}, InvalidParam, "num_beam_groups=2 beside force_words_ids"),
        ({"num_return_sequences": 5}, InvalidParam, "num_return_sequences=5"),
        ({"prompt_logprobs": 0}, UnsupportedOption, "prompt_logprobs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_sense_is_refused_by_name(pair: Pair, options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pair.lm().generate(random_ids(1, 5), **{**GROUPS, **options})


def test_a_file_that_asks_for_groups_has_them_and_one_beam_needs_none(pair: Pair) -> None:
    lm, prompt = pair.lm(), random_ids(3, 10)
    config = {**GROUPS, "eos_token_id": 0, "pad_token_id": 400}
    own = type(lm)(lm.transformer, lm.tokenizer, lm.pool, name="", generation_config=config)
    assert own.generate(prompt).beams.score == lm.generate(prompt, **GROUPS, eos_token_id=0).beams.score
    assert own.generate(prompt, num_beams=1).token_ids == lm.generate(prompt, eos_token_id=0).token_ids
    expected = lm.generate(prompt, num_beams=4, eos_token_id=EOS_SET).token_ids
    assert own.generate(prompt, num_beam_groups=1, diversity_penalty=0, eos_token_id=EOS_SET).token_ids == expected
