"""Drafts from a text are what brute force finds, and those of transformers' prompt lookup."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from handloom.decoding.drafters import NOTHING, PromptLookup, SuffixAutomaton, TextDrafter


def texts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(rng.choice((2, 3, 8))) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_prompt_lookup_drafts_what_transformers_does_as_the_text_grows(size: int) -> None:
    for text in texts(60):
        drafter = PromptLookup(size)
        theirs = PromptLookupCandidateGenerator(num_output_tokens=4, max_matching_ngram_size=size, max_length=10_000)
        for end in range(1, len(text) + 1):
            ids, _ = theirs.get_candidates(torch.tensor([text[:end]]))
            assert drafter.draft(text[:end], 4).token_ids == ids[0, end:].tolist()


def test_the_suffix_automaton_finds_the_longest_ending_that_was_there_before() -> None:
    for text in texts(100):
        drafter = SuffixAutomaton()
        for end in range(1, len(text) + 1):
            so_far = text[:end]
            places = {
                length: [at + length for at in range(end - length) if so_far[at : at + length] == so_far[-length:]]
                for length in range(1, end)
            }
            longest = max((length for length, found in places.items() if found), default=0)
            draft = drafter.draft(so_far, 6)
            assert draft.matched == longest
            if not longest:
                assert draft == NOTHING
                continue
            assert draft.token_ids in [followed(so_far, start, 6) for start in places[longest]]


def followed(text: list[int], start: int, count: int) -> list[int]:
    """What comes after a place, as if the text went on so from its end."""
    longer = list(text)
    for at in range(start, start + count):
        longer.append(longer[at])
    return longer[len(text) :]


def test_drafters_catch_up_with_several_tokens_at_once() -> None:
    for text in texts(30):
        for make in (SuffixAutomaton, lambda: PromptLookup(3)):
            step_by_step, at_once = make(), make()
            for end in range(1, len(text)):
                step_by_step.draft(text[:end], 3)
            assert step_by_step.draft(text, 3).matched == at_once.draft(text, 3).matched


def test_of_several_places_the_automaton_takes_the_one_it_used_last() -> None:
    drafter, text = SuffixAutomaton(), [1, 2, 3, 9, 1, 2]
    assert drafter.draft(text, 1).token_ids == [3]
    text += [4, 8, 1, 2]
    assert drafter.draft(text, 1).token_ids == [4]


@pytest.mark.parametrize("make", [SuffixAutomaton, lambda: PromptLookup(3)])
def test_asked_again_after_the_same_text_a_drafter_says_the_same(make: Callable[[], TextDrafter]) -> None:
    for text in texts(30):
        drafter = make()
        for end in range(1, len(text) + 1):
            first, again = drafter.draft(text[:end], 4), drafter.draft(text[:end], 4)
            assert first == again and drafter.draft(text[:end], 2).token_ids == first.token_ids[:2]


def test_tokens_that_are_taken_back_leave_a_drafter_as_good_as_new() -> None:
    automaton = SuffixAutomaton()
    automaton.draft([1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 8, 9], 3)
    assert automaton.draft([1, 2, 3], 3) == SuffixAutomaton().draft([1, 2, 3], 3)
    assert automaton.draft([1, 2, 3, 1], 3).token_ids == [2, 3, 1]
