"""Grammars over a small vocabulary against brute force: the tokens that may come are those with which some text of the
language begins, and the output may end exactly at a text of the language."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from itertools import product

import llguidance
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom.errors import GrammarError, InvalidParam
from handloom.sampling import grammar as grammar_module
from handloom.sampling.grammar import Grammars, Matcher, constrain
from handloom.sampling.options import Options
from handloom.sampling.structure_options import read_structure
from handloom.text.token_bytes import token_bytes
from handloom.text.tokenizer import Tokenizer
from tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer

TEXT_EOS = 70  # an end-of-sequence token that is text, too
NAMES = frozenset({"json_schema", "regex", "grammar", "choices"})


@cache
def grammars() -> Grammars:
    return Grammars(Tokenizer(tiny_tokenizer()), VOCAB_SIZE)


@cache
def values() -> list[bytes]:
    tokens = token_bytes(Tokenizer(tiny_tokenizer()), VOCAB_SIZE)
    return [b"" if id_ in tokens.special else value for id_, value in enumerate(tokens.values)]


def start(**options: object) -> Matcher:
    (grammar,) = [own for own in read_structure(Options(options, {}, NAMES), grammars().compile).values() if own]
    return grammar.start()


def allowed(matcher: Matcher, eos: Sequence[int] = (EOS,)) -> set[int]:
    words = np.full(matcher.num_words, -1, dtype=np.int32)
    matcher.fill(words, eos)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert not bits[VOCAB_SIZE:].any()
    return set(bits[:VOCAB_SIZE].nonzero()[0].tolist())


def expected(language: set[bytes], so_far: bytes, eos: Sequence[int] = (EOS,)) -> set[int]:
    texts = [text[len(so_far) :] for text in language if text.startswith(so_far)]
    tokens = {id_ for id_, value in enumerate(values()) if value and any(text.startswith(value) for text in texts)}
    return tokens | set(eos) if so_far in language else tokens - set(eos)


def walk(matcher: Matcher, language: set[bytes], seed: int, eos: Sequence[int] = (EOS,)) -> None:
    """A random way through the language, every mask on it compared."""
    rng, ids, text = random.Random(seed), list[int](), b""
    while True:
        matcher.follow(ids)
        assert matcher.fits
        found = allowed(matcher, eos)
        assert found == expected(language, text, eos), (text, sorted(language)[:5])
        going_on = sorted(found - set(eos))
        assert matcher.is_complete == (bool(ids) and expected(language, text) == {EOS})
        if not going_on:
            return
        ids.append(rng.choice(going_on))
        text += values()[ids[-1]]


# Regular expressions whose languages are finite, as (pattern, texts).
atoms = st.sampled_from(
    [
        ("a", {"a"}), ("b", {"b"}), ("the", {"the"}), ("[ao ]", {"a", "o", " "}), ("é", {"é"}), (r"\.", {"."}),
        ("1|22", {"1", "22"}),
    ]
)  # fmt: skip


def combined(parts: st.SearchStrategy[tuple[str, set[str]]]) -> st.SearchStrategy[tuple[str, set[str]]]:
    joined = st.tuples(parts, parts).map(
        lambda two: (f"(?:{two[0][0]})(?:{two[1][0]})", {a + b for a, b in product(two[0][1], two[1][1])})
    )
    either = st.tuples(parts, parts).map(lambda two: (f"(?:{two[0][0]})|(?:{two[1][0]})", two[0][1] | two[1][1]))
    maybe = parts.map(lambda own: (f"(?:{own[0]})?", own[1] | {""}))
    twice = parts.map(lambda own: (f"(?:{own[0]}){{1,2}}", own[1] | {a + b for a, b in product(own[1], own[1])}))
    return joined | either | maybe | twice


finite = st.recursive(atoms, combined, max_leaves=6).filter(lambda own: len(own[1]) < 400)


@given(finite, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_regex_allows_what_brute_force_over_its_language_does(own: tuple[str, set[str]], seed: int) -> None:
    pattern, texts = own
    assert all(re.fullmatch(pattern, text) for text in texts)
    walk(start(regex=pattern), {text.encode() for text in texts}, seed)


texts = st.text(st.characters(codec="utf-8"), max_size=6)


@given(
    st.lists(texts | st.sampled_from(["the", "then", "a", "", '"', "\\", "\n"]), min_size=1, max_size=8),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_choices_allow_what_brute_force_does(choices: list[str], seed: int) -> None:
    walk(start(choices=choices), {choice.encode() for choice in choices}, seed)


def test_an_end_of_sequence_token_that_is_text_ends_the_output_and_nothing_else() -> None:
    word = values()[TEXT_EOS].decode()
    language = {b"a", b"a" + values()[TEXT_EOS], values()[TEXT_EOS]}
    for seed in range(5):
        walk(start(choices=["a", "a" + word, word]), language, seed, (EOS, TEXT_EOS))


def json_texts() -> set[bytes]:
    kinds, flags = ["x", "yy"], [True, False, None]
    whole = [{"kind": kind, "flag": flag} for kind, flag in product(kinds, flags)] + [{"kind": kind} for kind in kinds]
    return {json.dumps(value).encode() for value in whole}


def test_a_schema_allows_what_brute_force_does_written_as_json_dumps_writes() -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["x", "yy"]}, "flag": {"type": ["boolean", "null"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    for seed in range(10):
        walk(start(json_schema=schema), json_texts(), seed)
        walk(start(json_schema=json.dumps(schema)), json_texts(), seed)


def test_a_grammar_allows_what_brute_force_does() -> None:
    lark = 'start: greeting (" " NAME)?\ngreeting: "hi" | "hello"\nNAME: "Al" | "Bo"\n'
    language = {a + b for a, b in product((b"hi", b"hello"), (b"", b" Al", b" Bo"))}
    for seed in range(10):
        walk(start(grammar=lark), language, seed)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 10**6)), max_size=12))
@settings(max_examples=40, deadline=None)
def test_going_back_forwards_and_astray_leads_where_a_new_matcher_is(moves: list[tuple[int, int]]) -> None:
    """As drafts do: each move takes tokens back and adds others, allowed or any."""
    matcher, ids = start(regex="[abt]{1,6}(the|[0-9]+ )*x"), list[int]()
    for back, choice in moves:
        ids = ids[: max(0, len(ids) - back)]
        matcher.follow(ids)
        going_on = sorted(allowed(matcher) - {EOS}) or [5]
        ids.append(choice % VOCAB_SIZE if choice % 4 == 0 else going_on[choice % len(going_on)])
        matcher.follow(ids)
        fresh = start(regex="[abt]{1,6}(the|[0-9]+ )*x")
        fresh.follow(ids)
        assert (matcher.fits, matcher.is_complete) == (fresh.fits, fresh.is_complete)
        assert allowed(matcher) == allowed(fresh) == (allowed(fresh) if fresh.fits else set())


def test_a_fork_goes_its_own_way() -> None:
    first = start(choices=["ab", "ac"])
    (a,) = [id_ for id_, value in enumerate(values()) if value == b"a"]
    (b,) = [id_ for id_, value in enumerate(values()) if value == b"b"]
    first.follow([a])
    second = first.fork()
    first.follow([a, b])
    assert first.is_complete and not second.is_complete
    assert allowed(second) == expected({b"ab", b"ac"}, b"a")


def test_special_tokens_are_never_text_and_can_be_named_in_a_grammar() -> None:
    spelled = start(regex=r"<\|bos\|>")
    assert allowed(spelled) == expected({b"<|bos|>"}, b"")
    named = start(grammar='start: "a" <|bos|>')
    (a,) = [id_ for id_, value in enumerate(values()) if value == b"a"]
    named.follow([a])
    assert allowed(named) == {1}


def test_a_dead_end_allows_nothing_and_can_be_left_again() -> None:
    matcher = start(json_schema={"$ref": "#"})
    assert allowed(matcher) == set()
    matcher.follow([])
    assert matcher.fits
    assert allowed(matcher) == set()


def test_a_limit_that_is_passed_in_the_middle_is_an_error_that_says_so() -> None:
    small = Grammars(Tokenizer(tiny_tokenizer()), VOCAB_SIZE, limits={"max_lexer_states": 40})
    matcher = small.compile("regex", "(a|b)*a(a|b){8}c").start()
    rng, ids = random.Random(0), list[int]()
    end = {id_ for id_, value in enumerate(values()) if b"c" in value}
    with pytest.raises(GrammarError, match=r"^regex: llguidance gave up after \d+ tokens: "):
        for _ in range(200):
            ids.append(rng.choice(sorted(allowed(matcher) - end)))
            matcher.follow(ids)
    matcher.follow([])
    assert allowed(matcher)


def test_rows_are_constrained_in_one_pass_and_those_without_keep_every_bit() -> None:
    scores = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    before, matchers = scores.clone(), [None, start(choices=["a"]), None, start(regex="[0-9]+")]
    assert constrain(scores, matchers, [(), (EOS,), (), ()]) == {}
    for row, matcher in enumerate(matchers):
        stays = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        if matcher is not None:
            stays = torch.tensor([id_ in allowed(matcher) for id_ in range(VOCAB_SIZE)])
        assert torch.equal(scores[row], before[row].masked_fill(~stays, -torch.inf))


def test_grammars_are_kept_up_to_a_bound() -> None:
    own = Grammars(Tokenizer(tiny_tokenizer()), VOCAB_SIZE)
    first = own.compile("regex", "a")
    assert own.compile("regex", "a") is first
    for number in range(grammar_module.MAX_KEPT):
        own.compile("regex", f"a{{{number + 1}}}")
    assert len(own._kept) == grammar_module.MAX_KEPT
    assert own.compile("regex", "a") is not first


def test_what_is_refused_is_refused_by_name() -> None:
    for options, words in (
        ({"regex": "a("}, "^regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "^regex: .*look-ahead"),
        ({"json_schema": {"type": "string", "contains": 3}}, "^json_schema: .*contains"),
        ({"grammar": "start: nobody"}, '^grammar: .*unknown name: "nobody"'),
    ):
        with pytest.raises(InvalidParam, match=words):
            start(**options)


def test_what_the_deep_stack_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As pyo3's: no Exception."""

    class Matcher:
        grammar_from_regex = llguidance.LLMatcher.grammar_from_regex

        def __init__(self, *_: object, **__: object) -> None:
            raise Panic("in Rust")

    monkeypatch.setattr("llguidance.LLMatcher", Matcher)
    with pytest.raises(Panic, match="in Rust"):
        Grammars(Tokenizer(tiny_tokenizer()), VOCAB_SIZE).compile("regex", "a+")
