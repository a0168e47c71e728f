"""What a grammar promises of generate's output, in every mode; and that its tokens are those of transformers' generate
with a logits processor that applies llguidance's own mask."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

import handloom as hl
from engines import lm_with
from grammar_masks import OwnMask
from handloom.errors import GrammarError, InvalidParam, UnsupportedOption
from handloom.output import Output
from parity_checks import Pair, hf_generate
from tiny_models import EOS, random_ids

PROMPT = random_ids(3, 9)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", True]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "not at all", "maybe", "ja, 日本語 🙂"]
LARK = 'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]{1,3}/\n'
LIST = r"([a-zé]{1,5}, ){1,3}[A-Z][a-z]{0,4}\."
SUM = re.compile(r"[0-9]{1,3}(\+[0-9]{1,3})*")


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and isinstance(value["name"], str) and len(value["name"]) <= 6
        and type(value["age"]) is int and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 3 and all(tag in ("a", "bc", True) for tag in value["tags"])
    )  # fmt: skip


GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json_schema": ({"json_schema": SCHEMA}, fits_schema),
    "regex": ({"regex": LIST}, lambda text: bool(re.fullmatch(LIST, text))),
    "grammar": ({"grammar": LARK}, lambda text: bool(SUM.fullmatch(text))),
    "choices": ({"choices": CHOICES}, lambda text: text in CHOICES),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.5, "seed": 7},
    "top_p": {"top_p": 0.7, "top_k": 20, "seed": 11},
    "several": {"num_return_sequences": 4, "seed": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "seed": 5},
    "guided": {"guidance_scale": 1.7},
}


def outputs_of(result: Output | list[Output]) -> list[Output]:
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GRAMMARS)
def test_every_complete_output_is_one_of_the_grammars(name: str, mode: str) -> None:
    options, fits = GRAMMARS[name]
    lm, complete = lm_with(2000), 0
    for at in range(4):
        for output in outputs_of(lm.generate(random_ids(at, 5 + at), max_new_tokens=60, **options, **MODES[mode])):
            assert output.finish_reason in ("eos", "length")
            if output.finish_reason == "eos":
                assert fits(output.text), output.text
                complete += 1
    assert complete or (name, mode[-5:]) in {("grammar", "beams"), ("json_schema", "beams")}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", GRAMMARS)
def test_greedy_and_sampled_tokens_are_those_of_generate_with_llguidances_own_mask(
    tiny_pair: Callable[..., Pair], name: str, family: str
) -> None:
    pair = tiny_pair(family)
    for at in range(3):
        prompt = random_ids(20 + at, 6 + at)
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0}):
            theirs = LogitsProcessorList([OwnMask(len(prompt), name, GRAMMARS[name][0][name])])
            torch.manual_seed(4)
            expected = hf_generate(pair.hf, prompt, logits_processor=theirs, max_new_tokens=30, **options)
            torch.manual_seed(4)
            rng = "torch" if options["do_sample"] else "counter"
            ours = pair.lm().generate(prompt, max_new_tokens=30, rng=rng, **GRAMMARS[name][0], **options)
            assert ours.token_ids == expected


def test_beams_are_those_of_generate_with_llguidances_own_mask(tiny_pair: Callable[..., Pair]) -> None:
    pair = tiny_pair("llama")
    for name in ("choices", "regex"):
        theirs = LogitsProcessorList([OwnMask(len(PROMPT), name, GRAMMARS[name][0][name])])
        expected = hf_generate(
            pair.hf, PROMPT, logits_processor=theirs, max_new_tokens=25, num_beams=3, do_sample=False
        )
        ours = pair.lm().generate(PROMPT, max_new_tokens=25, num_beams=3, **GRAMMARS[name][0])
        assert ours.token_ids == expected[: len(ours.token_ids)]
        assert set(expected[len(ours.token_ids) :]) <= {EOS}


def test_requests_with_different_grammars_beside_each_other_get_what_they_get_alone() -> None:
    lm = lm_with(2000)
    params = [{**options, **mode} for options, _ in GRAMMARS.values() for mode in (MODES["greedy"], MODES["sampled"])]
    params += [{"seed": 4}, {}, {"eos_token_id": None, "regex": "[0-9]{3}"}]
    prompts = [random_ids(at, 4 + at) for at in range(len(params))]
    together = lm.generate(prompts, params=params, max_new_tokens=30)
    for prompt, own, output in zip(prompts, params, together, strict=True):
        alone = lm.generate(prompt, max_new_tokens=30, **own)
        assert (alone.token_ids, alone.text, alone.finish_reason) == (
            output.token_ids, output.text, output.finish_reason
        )  # fmt: skip


def test_a_grammar_survives_preemption() -> None:
    options = {"max_new_tokens": 24, **GRAMMARS["json_schema"][0], "seed": 6}
    prompts = [random_ids(at, 8) for at in range(4)]
    free = lm_with(200).generate(prompts, **options)
    tight = lm_with(10).generate(prompts, **options)
    assert [output.token_ids for output in free] == [output.token_ids for output in tight]


def test_without_an_end_of_sequence_token_the_request_ends_where_nothing_can_follow() -> None:
    lm = lm_with()
    output = lm.generate(PROMPT, choices=CHOICES, eos_token_id=None, max_new_tokens=30)
    assert output.text in CHOICES
    assert output.finish_reason == "criteria"
    beams = lm.generate(PROMPT, choices=CHOICES, eos_token_id=None, max_new_tokens=30, num_beams=2)
    assert beams.text in CHOICES
    endless = lm.generate(PROMPT, regex="[a-z]*", eos_token_id=None, max_new_tokens=9)
    assert (endless.finish_reason, len(endless.token_ids)) == ("length", 9)


def test_it_goes_on_from_a_sequence_and_from_embeddings() -> None:
    lm = lm_with()
    expected = lm.generate(PROMPT, choices=CHOICES)
    with lm.sequence(PROMPT) as sequence:
        assert lm.generate(sequence, choices=CHOICES).token_ids == expected.token_ids
    embeddings = torch.randn(5, lm.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    for eos in (EOS, None):
        assert lm.generate(embeddings, choices=CHOICES, eos_token_id=eos).text in CHOICES


def test_what_streams_is_the_output() -> None:
    lm = lm_with()
    for mode in ({}, {"seed": 5}, {"num_beams": 2}):
        expected = lm.generate(PROMPT, regex="[a-z]{2,9}", **mode)
        assert "".join(piece.text for piece in lm.stream(PROMPT, regex="[a-z]{2,9}", **mode)) == expected.text


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "ab", "min_new_tokens": 5}, "regex and min_new_tokens leave no token"),
    ({"regex": "ab", "min_length": 25}, "regex and min_length leave no token"),
    ({"choices": ["a"], "suppress_tokens": [EOS]}, "choices and suppress_tokens leave no token"),
    ({"choices": ["a"], "bad_words_ids": [[id_] for id_ in range(3, 331)]}, "choices and bad_words_ids leave"),
    ({"regex": "[0-9]{9}", "forced_eos_token_id": EOS, "max_new_tokens": 3}, "regex and forced_eos_token_id leave"),
    ({"regex": "[0-9]", "prefix_allowed_tokens_fn": lambda _, ids: [99]}, "regex and prefix_allowed_tokens_fn leave"),
    ({"json_schema": {"$ref": "#"}}, "json_schema leaves no token"),
]


@pytest.mark.parametrize("mode", [{}, {"seed": 3}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize(("options", "words"), CONFLICTS, ids=lambda value: str(value)[:40])
def test_where_a_rule_and_the_grammar_leave_nothing_that_request_alone_fails_and_both_are_named(
    options: dict[str, Any], words: str, mode: dict[str, Any]
) -> None:
    lm = lm_with()
    with pytest.raises(GrammarError, match=words):
        lm.generate(PROMPT, **{"max_new_tokens": 20, **options, **mode})
    failed, well = lm.generate(
        [PROMPT, PROMPT], params=[{"max_new_tokens": 20, **options, **mode}, {"choices": CHOICES}]
    )
    assert isinstance(failed.error, GrammarError) and failed.finish_reason == "error"
    assert well.text in CHOICES


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a", "choices": ["b"]}, "regex and choices each say"),
    ({"regex": 5}, "regex=5"),
    ({"regex": ""}, "regex=''"),
    ({"regex": "\ud800"}, "lone surrogate"),
    ({"regex": "a" * 9000}, "at most 8192 characters"),
    ({"choices": "yes"}, "choices='yes'"),
    ({"choices": []}, r"choices=\[\]"),
    ({"choices": ["a", 5]}, "choices="),
    ({"json_schema": '{"type": NaN}'}, "NaN is no JSON"),
    ({"json_schema": "[1]"}, "json_schema="),
    ({"json_schema": {"enum": {1, 2}}}, "it is no JSON"),
    ({"grammar": "start: nothing"}, "grammar: .*unknown name"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_no_grammar_is_refused_before_anything_runs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParam, match=words):
        lm_with().generate(PROMPT, **options)


def test_without_a_tokenizer_a_grammar_is_refused_by_name() -> None:
    lm = lm_with()
    bare = hl.LM(lm.transformer, None, lm.pool, name="bare")
    with pytest.raises(UnsupportedOption, match=r"^regex needs the text of tokens"):
        bare.generate(PROMPT, regex="a")


def test_a_class_with_a_schema_is_taken_for_it() -> None:
    class Person:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return SCHEMA

    lm = lm_with()
    assert lm.generate(PROMPT, json_schema=Person).token_ids == lm.generate(PROMPT, json_schema=SCHEMA).token_ids


plain = st.sampled_from(
    [{"type": "boolean"}, {"type": "null"}, {"enum": ["x", 3, None]}, {"type": "integer", "minimum": -9, "maximum": 99}]
)
schemas = st.recursive(
    plain,
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3).map(
            lambda own: {"type": "object", "properties": own, "required": list(own), "additionalProperties": False}
        )
        | inner.map(lambda own: {"type": "array", "items": own, "maxItems": 2})
    ),
    max_leaves=5,
)


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return any(type(value) is type(own) and value == own for own in schema["enum"])
    if schema["type"] == "object":
        return list(value) == list(schema["properties"]) and all(
            is_valid(value[name], own) for name, own in schema["properties"].items()
        )
    if schema["type"] == "array":
        return len(value) <= 2 and all(is_valid(item, schema["items"]) for item in value)
    return {
        "boolean": lambda: isinstance(value, bool),
        "null": lambda: value is None,
        "integer": lambda: type(value) is int and -9 <= value <= 99,
    }[schema["type"]]()


@given(schemas, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_comes_of_a_random_schema_is_valid(schema: dict[str, Any], seed: int) -> None:
    output = lm_with(2000).generate(PROMPT, json_schema=schema, seed=seed, temperature=2.0, max_new_tokens=200)
    assert output.finish_reason == "eos"
    assert is_valid(json.loads(output.text), schema)


patterns = st.recursive(
    st.sampled_from(["a", "[b-f]", "the ", "[0-9]", "é", r"\.", "[^a-z]"]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | inner.map(lambda own: f"(?:{own}){{0,2}}")
        | st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})")
    ),
    max_leaves=6,
)


@given(patterns, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_comes_of_a_random_regex_matches_as_python_says(pattern: str, seed: int) -> None:
    output = lm_with(2000).generate(PROMPT, regex=pattern, seed=seed, temperature=2.0, max_new_tokens=100)
    assert output.finish_reason == "eos"
    assert re.fullmatch(pattern, output.text)
