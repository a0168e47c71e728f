"""The text of an output as it streams, with and without stop strings, against a naive oracle that looks at it whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from handloom.decoding.stream_text import StreamText
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import BUILDERS, SETTINGS, tiny, wrap

SPECIAL = ["<s>", "</s>"]
PLAIN = ["a", "b", "ab", "ba", "aba", "<", "s", ">", " "]
E_ACUTE = ["Ã", "©"]  # the two bytes of é, as a byte-level vocabulary writes them
WORDS = [*PLAIN, *SPECIAL, "é"]
"""What outputs are made of: é is two tokens, all others one."""


@cache
def letters() -> Tokenizer:
    """A byte-level tokenizer of the tokens above, ids in that order."""
    plain = [{" ": "Ġ"}.get(token, token) for token in PLAIN]
    vocab = {token: i for i, token in enumerate([*plain, *SPECIAL, *E_ACUTE])}
    backend = Backend(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(wrap(backend))


def ids_of(words: list[str]) -> list[int]:
    spelled = [E_ACUTE if word == "é" else [{" ": "Ġ"}.get(word, word)] for word in words]
    return letters().hf.convert_tokens_to_ids([token for tokens in spelled for token in tokens])


@dataclass
class Request:
    stops: list[str]
    skip: bool
    include: bool
    prompt: list[str]


@dataclass
class Naive:
    """The whole spelled-out text is searched again after every token."""

    request: Request
    tokens: list[tuple[str, str]]  # spelled out and shown, of each token; é comes with its second

    def __init__(self, request: Request, words: list[str]) -> None:
        self.request = request
        self.tokens = []
        for word in words:
            shown = "" if request.skip and word in SPECIAL else word
            self.tokens += [("", ""), (word, shown)] if word == "é" else [(word, shown)]

    def hit(self, count: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first, of those the longest, if one ends in the last token."""
        before = "".join(self.request.prompt)
        text = before + "".join(spelled for spelled, _ in self.tokens[:count])
        seen = len(before) + sum(len(spelled) for spelled, _ in self.tokens[: count - 1])
        ends = [
            (end, -len(stop), stop)
            for stop in self.request.stops
            for end in range(seen + 1, len(text) + 1)
            if text[:end].endswith(stop)
        ]
        return (min(ends)[0] - len(min(ends)[2]), min(ends)[2]) if ends else None

    def shown_before(self, offset: int, count: int) -> str:
        """The shown part of what lies before `offset` in the spelled-out text of the first tokens."""
        at, shown = len("".join(self.request.prompt)), ""
        for spelled, visible in self.tokens[:count]:
            shown += "".join(c for i, c in enumerate(spelled) if visible and at + i < offset)
            at += len(spelled)
        return shown

    def certain(self, count: int) -> str:
        """What may be shown after so many tokens, none of which ended a stop string."""
        text = "".join([*self.request.prompt, *(spelled for spelled, _ in self.tokens[:count])])
        proper = [n for stop in self.request.stops for n in range(len(stop)) if text.endswith(stop[:n])]
        held = 0 if self.request.include else max(proper, default=0)
        return self.shown_before(len(text) - held, count)


def stream(request: Request, tokenizer: Tokenizer, prompt: list[int]) -> StreamText:
    return StreamText(
        tokenizer,
        skip_special_tokens=request.skip,
        stop_strings=request.stops,
        include_stop_text=request.include,
        prompt_ids=prompt,
    )


NEVER = [*(f"{letter}\ufffe" for letter in "aeinot \n"), "\ufffd\ufffe", "</s>\ufffe", "<|im_end|>\ufffe"]
"""Stop strings that often begin and never end."""

STOPS = st.lists(st.text("ab<s>/ é", min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(
    request=st.builds(
        Request, STOPS, st.booleans(), st.booleans(), st.lists(st.sampled_from(PLAIN + SPECIAL), max_size=4)
    ),
    words=st.lists(st.sampled_from(WORDS), max_size=14),
)
def test_streamed_text_is_that_of_the_naive_search_and_comes_as_soon_as_it_is_certain(
    request: Request, words: list[str]
) -> None:
    naive, ours = Naive(request, words), stream(request, letters(), ids_of(request.prompt))
    text = ""
    for count, token_id in enumerate(ids_of(words), 1):
        text += ours.push(token_id)
        hit = naive.hit(count)
        if hit is not None:
            assert ours.stopped_by == hit[1]
            expected = naive.shown_before(10**6 if request.include else hit[0], count)
            assert text + ours.finish() == expected
            return
        assert ours.stopped_by is None
        assert text == naive.certain(count), "too early or too late"
    assert text + ours.finish() == naive.shown_before(10**6, len(naive.tokens))
    assert ours.stopped_by is None


@pytest.mark.parametrize("name", sorted(BUILDERS))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_pieces_joined_are_the_decoded_text_whatever_the_tokens(name: str, data: st.DataObject) -> None:
    """Broken characters, byte fallback and special tokens anywhere; stop strings that never come change nothing."""
    tokenizer = Tokenizer(wrap(tiny(name), **SETTINGS[name]))
    skip, stops = data.draw(st.booleans()), data.draw(st.sampled_from(([], ["\ufffe"], NEVER)))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    ours = stream(Request(stops, skip, data.draw(st.booleans()), []), tokenizer, ids[:3])
    text = "".join(ours.push(token_id) for token_id in ids) + ours.finish()
    assert ours.stopped_by is None
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    ("include", "skip", "expected"),
    [(True, True, "abba"), (True, False, "ab</s>ba"), (False, True, "a"), (False, False, "a")],
)
def test_a_stop_string_may_span_a_special_token_that_is_not_shown(include: bool, skip: bool, expected: str) -> None:
    ours = stream(Request(["b</s>b"], skip, include, []), letters(), [])
    pieces = [ours.push(token_id) for token_id in ids_of(["ab", "</s>", "ba"])]
    assert "".join(pieces) + ours.finish() == expected
    assert ours.stopped_by == "b</s>b"


@pytest.mark.parametrize(("include", "expected"), [(True, "ba"), (False, "")])
def test_a_stop_string_may_begin_in_the_prompt(include: bool, expected: str) -> None:
    ours = stream(Request(["aab"], True, include, []), letters(), ids_of(["a", "a"]))
    assert ours.push(ids_of(["ba"])[0]) + ours.finish() == expected
    assert ours.stopped_by == "aab"


def test_a_stop_string_that_ends_in_the_prompt_stops_nothing() -> None:
    ours = stream(Request(["ab"], True, True, []), letters(), ids_of(["ab"]))
    assert ours.push(ids_of(["a"])[0]) == "a"
    assert ours.stopped_by is None


def test_a_character_in_pieces_waits_for_its_last_token_and_no_longer() -> None:
    ours = stream(Request(["zz"], True, True, []), letters(), [])
    first, second = ids_of(["é"])
    assert [ours.push(first), ours.push(second)] == ["", "é"]
    assert ours.push(first) + ours.finish() == "\ufffd"


@pytest.mark.parametrize(("include", "expected"), [(True, "a\n"), (False, "a")])
def test_a_stop_string_spelled_in_byte_tokens_stops_at_its_last_byte(include: bool, expected: str) -> None:
    """Under byte fallback a newline is the token <0x0A>, whose text only the next token makes certain."""
    tokenizer = Tokenizer(wrap(tiny("sentencepiece"), **SETTINGS["sentencepiece"]))
    ids = tokenizer.hf.convert_tokens_to_ids(["a", "<0x0A>"])
    assert None not in ids
    ours = stream(Request(["\n"], True, include, []), tokenizer, [])
    text = ours.push(ids[0]) + ours.push(ids[1])
    assert ours.stopped_by == "\n"
    assert text + ours.finish() == expected
