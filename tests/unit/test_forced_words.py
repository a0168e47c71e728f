"""How much of its forced words a sequence has, what would bring it forward, and what groups keep away from."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom.errors import InvalidParam
from handloom.sampling.constraints import diversity_penalty
from handloom.sampling.forced_words import MAX_FORCED_IDS, ForcedWords, Progress, forced_words
from option_checks import VOCAB, resolve


def progress_over(words: ForcedWords, token_ids: list[int]) -> Progress:
    progress = words.start
    for token_id in token_ids:
        progress = words.after(progress, token_id)
    return progress


def test_a_phrase_is_had_when_its_tokens_came_one_after_another() -> None:
    words = ForcedWords((((1, 2, 3),), ((4,),)))
    for token_ids, bank, complete in (
        ([], 0, False), ([1], 1, False), ([1, 2], 2, False), ([1, 2, 4], 0, False), ([4], 3, False),
        ([4, 1, 2, 3], 6, True), ([1, 2, 3, 9, 4, 1], 6, True), ([1, 1, 2, 3, 4], 3, False),
    ):  # fmt: skip
        progress = progress_over(words, token_ids)
        assert (words.bank(progress), progress.is_complete) == (bank, complete), token_ids


def test_one_of_several_phrases_is_enough_and_a_short_one_counts_as_the_longest() -> None:
    words = ForcedWords((((1, 2, 3), (1, 4), (5,)),))
    for token_ids, bank in (([5], 3), ([1], 1), ([1, 4], 3), ([1, 2], 2), ([1, 2, 4], 0), ([1, 2, 3], 3)):
        assert words.bank(progress_over(words, token_ids)) == bank, token_ids


def test_what_was_broken_off_goes_to_the_end_of_what_is_looked_for() -> None:
    words = ForcedWords((((1, 2),), ((1, 3),)))
    assert progress_over(words, [1]).current == 0
    assert progress_over(words, [1, 3]).missing == (1, 0), "a token that breaks a phrase off begins none"
    assert progress_over(words, [1, 3, 1, 3]).done == 1


def test_proposals_are_the_tokens_that_go_on_and_of_a_fork_only_the_first_counts() -> None:
    words = ForcedWords((((1, 2), (1, 3)), ((7, 8),)))
    assert list(words.proposals(words.start)) == [(1, 1), (7, 1)]
    assert list(words.proposals(progress_over(words, [7]))) == [(8, 2)]
    assert list(words.proposals(progress_over(words, [1]))) == [(2, 2), (3, 0)], "as transformers counts"
    assert not list(words.proposals(progress_over(words, [1, 2, 7, 8])))


PHRASES = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(PHRASES, min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_following_the_proposals_always_gets_there(words: list[list[int]], seed: int) -> None:
    checked = ForcedWords(forced_words(5, ())(words))
    progress, draw, steps = checked.start, random.Random(seed), 0
    while not progress.is_complete:
        proposals = [token_id for token_id, _ in checked.proposals(progress)]
        before, progress = checked.bank(progress), checked.after(progress, draw.choice(proposals))
        assert checked.bank(progress) > before
        steps += 1
    assert steps == sum(map(len, words))
    assert checked.bank(progress) == len(words) * max(map(len, words))


def test_as_many_ids_as_are_allowed_are_read_and_one_more_is_refused() -> None:
    words = [[at % VOCAB for at in range(MAX_FORCED_IDS)]]
    assert resolve({"force_words_ids": words, "num_beams": 2}).force_words_ids == ((tuple(words[0]),),)
    with pytest.raises(InvalidParam, match=f"force_words_ids.*at most {MAX_FORCED_IDS}"):
        resolve({"force_words_ids": [*words, [1]], "num_beams": 2})


def test_the_penalty_is_taken_once_for_each_beam_of_another_group_that_chose_a_token() -> None:
    """As in transformers' HammingDiversityLogitsProcessor of 4.56: the penalty times torch.bincount."""
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    scores[0, 7], scores[0, 9] = -torch.inf, 3e38
    expected, taken = scores.clone(), [7, 9, 9, 4]
    expected[0] -= 0.7 * torch.bincount(torch.tensor(taken), minlength=50)
    diversity_penalty(scores, [0.7, 0.0, 0.7], [taken, taken, []])
    assert torch.equal(scores, expected)
