"""Stop strings are found where a plain search of the whole text finds them, and where transformers stops."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StopStringCriteria

from handloom.errors import InvalidParam
from handloom.text.detokenizer import Detokenizer
from handloom.text.stop import MAX_STOP_CHARS, MAX_STOP_STRINGS, StopHit, StopMatcher
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import tiny, wrap


def first_hit(stops: list[str], text: str, start: int) -> StopHit | None:
    """The oracle: of all the occurrences that end after `start`, the one that ends first, then the longest."""
    hits = [
        StopHit(stop, match.start(), match.start() + len(stop))
        for stop in stops
        for match in re.finditer(f"(?={re.escape(stop)})", text)
    ]
    return min((hit for hit in hits if hit.end > start), key=lambda hit: (hit.end, hit.start), default=None)


def still_open(stops: list[str], text: str) -> int:
    """The oracle for `held`: the longest end of the text that begins a stop string and is not all of it."""
    return max(
        n
        for n in range(len(text) + 1)
        if any(len(stop) > n and stop.startswith(text[len(text) - n :]) for stop in stops)
    )


LETTERS = st.sampled_from("aab\n🙂")
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stops=STOPS, pieces=st.lists(st.text(LETTERS, max_size=5), max_size=12))
def test_hits_and_held_text_are_those_of_a_plain_search(stops: list[str], pieces: list[str]) -> None:
    matcher, text = StopMatcher(stops), ""
    for piece in pieces:
        before, text = len(text), text + piece
        assert matcher.peek(piece) == first_hit(stops, text, before)
        assert matcher.push(piece) == first_hit(stops, text, before)
        assert matcher.held == still_open(stops, text)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_every_short_stop_string_in_every_short_text(length: int) -> None:
    for stop in map("".join, product("ab", repeat=length)):
        for text in map("".join, product("ab", repeat=7)):
            matcher = StopMatcher([stop])
            hit = next(filter(None, map(matcher.push, text)), None)
            assert (-1 if hit is None else hit.start) == text.find(stop)


def test_a_mismatch_falls_back_to_the_longest_beginning() -> None:
    matcher = StopMatcher(["[1,2]", "1,2"])
    assert [matcher.push(piece) for piece in ("1,", "1,", "2")] == [None, None, StopHit("1,2", 2, 5)]
    assert StopMatcher(["aab"]).push("aaaab") == StopHit("aab", 2, 5)
    assert StopMatcher(["ababac"]).push("abababac") == StopHit("ababac", 2, 8)


def test_the_first_to_end_wins_then_the_longest() -> None:
    assert StopMatcher(["abcd", "bc"]).push("xabcd") == StopHit("bc", 2, 4)
    assert StopMatcher(["c", "abc", "bc"]).push("abc") == StopHit("abc", 0, 3)
    assert StopMatcher(["</s>", "</s>"]).push("</s>") == StopHit("</s>", 0, 4)


def test_held_text_is_what_a_client_must_not_see_yet() -> None:
    matcher = StopMatcher(["STOP", "OPERA"])
    assert [(matcher.push(piece), matcher.held) for piece in ("x", "S", "TO", "X")] == [
        (None, 0),
        (None, 1),
        (None, 3),
        (None, 0),
    ]
    assert matcher.push("STOP") == StopHit("STOP", 5, 9)
    assert matcher.held == 2, "OP may still become OPERA; a whole STOP is not open any more"


def test_peeking_takes_nothing() -> None:
    matcher = StopMatcher(["ab"])
    matcher.push("xa")
    assert matcher.peek("b") == matcher.peek("b") == StopHit("ab", 1, 3)
    assert (matcher.peek("c"), matcher.peek(""), matcher.held) == (None, None, 1)
    assert matcher.push("b") == StopHit("ab", 1, 3)


def test_the_end_of_the_prompt_counts() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("Q: why?\n") is None
    assert matcher.push("\nA") == StopHit("\n\n", 7, 9)


@pytest.mark.parametrize(
    ("stops", "complaint"),
    [
        ("abc", "must be a list of strings, not str"),
        ({"a"}, "must be a list of strings, not set"),
        (None, "must be a list of strings, not NoneType"),
        ([""], rf"stop_strings\[0\] has 0 characters; 1 to {MAX_STOP_CHARS}"),
        (["ok", "x" * (MAX_STOP_CHARS + 1)], rf"stop_strings\[1\] has {MAX_STOP_CHARS + 1} characters"),
        (["ok", b"bytes"], r"stop_strings\[1\] must be a str, not bytes"),
        (["a\ud800"], "character 1 is a lone surrogate"),
        (["x"] * (MAX_STOP_STRINGS + 1), f"{MAX_STOP_STRINGS + 1} stop strings; the limit is {MAX_STOP_STRINGS}"),
        (["x"] * 10**6, "1000000 stop strings; the limit"),
    ],
)
def test_15_stop_strings_past_the_limits_are_refused(stops: Any, complaint: str) -> None:
    with pytest.raises(InvalidParam, match=complaint):
        StopMatcher(stops)


def test_the_largest_allowed_set_works() -> None:
    stops = ["a" * (MAX_STOP_CHARS - 2) + f"{index:02}" for index in range(MAX_STOP_STRINGS)]
    matcher = StopMatcher(stops)
    assert matcher.push("a" * 3000) is None
    assert matcher.held == MAX_STOP_CHARS - 2
    assert matcher.push("41") == StopHit(stops[41], 3002 - MAX_STOP_CHARS, 3002)
    assert StopMatcher([]).push("anything") is None


@pytest.mark.parametrize("name", ["byte_bpe", "sentencepiece"])
def test_generation_stops_at_the_token_where_transformers_stops(name: str) -> None:
    tokenizer = Tokenizer(wrap(tiny(name)))
    stop_sets = [
        ["slowly"],
        ["weav", "loom"],
        ["r w"],
        [" t"],
        ["n t"],
        ["es", "token"],
        ["a", "by h"],
        ["absent"],
        ["dog;"],
        ["hand."],
    ]
    for text in (
        "Once upon a time there was a weaver who wove tokens on a loom, slowly, by hand.",
        "the lazy dog; it stops not",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for stops in stop_sets:
            criteria = StopStringCriteria(tokenizer.hf, stops)
            theirs = [bool(criteria(torch.tensor([ids[:count]]), None)) for count in range(1, len(ids) + 1)]
            assert any(theirs) == any(stop in text for stop in stops)
            matcher, stream = StopMatcher(stops), Detokenizer(tokenizer, skip_special_tokens=False)
            ours = [(matcher.push(stream.push(index)) or matcher.peek(stream.pending)) is not None for index in ids]
            assert ours.index(True) == theirs.index(True) if any(theirs) else not any(ours)
