"""SAFETY row 20 for the other kinds of grammars: each beside every option works, or is refused by name.

`features.py` has a regex among its options; here are a JSON schema, choices and a grammar in Lark.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from features import EOS, FEATURES, WORDS, merged, prompt_of, text_of
from handloom.errors import GrammarError, InvalidParam, UnsupportedOption
from handloom.sampling.rules import FORBIDDING
from parity_checks import Pair

CHOICES = ["yes", "no", "not at all", "it was"]
SCHEMA = {"type": "string", "maxLength": 4}


def is_short_string(text: str) -> bool:
    value = json.loads(text)
    return isinstance(value, str) and len(value) <= 4


GRAMMARS: dict[str, tuple[Any, Callable[[str], bool]]] = {
    "json_schema": (SCHEMA, is_short_string),
    "choices": (CHOICES, CHOICES.__contains__),
    "grammar": (f"start: /{WORDS.pattern}/", lambda text: bool(WORDS.fullmatch(text))),
}
REFUSED = {
    "structure": "regex and {option} each say|{option} and regex each say",
    "token_healing": "token_healing beside {option}",
    "DoLa": "{option} beside dola_layers",
}


@pytest.fixture
def pair(tiny_pair: Callable[..., Pair]) -> Pair:
    return tiny_pair("llama")


@pytest.mark.parametrize("option", GRAMMARS)
@pytest.mark.parametrize("name", FEATURES)
def test_safety_20_a_grammar_beside_every_option_works_or_is_refused_by_name(
    pair: Pair, name: str, option: str
) -> None:
    lm, (value, fits) = pair.lm(), GRAMMARS[option]
    shared, own = merged(frozenset({name}))
    asked = {**shared, **own, option: value, **({"seed": 5} if shared.get("do_sample") else {})}
    if name in REFUSED:
        with pytest.raises((InvalidParam, UnsupportedOption), match=REFUSED[name].format(option=option)):
            lm.generate(prompt_of(own), **asked)
        return
    try:
        output = lm.generate(prompt_of(own), **asked)
    except GrammarError as error:
        assert FORBIDDING & shared.keys() or "logits_processor" in shared, "nothing forbids what the grammar needs"
        assert option in str(error)
        return
    text = output.text if output.token_ids[-1] not in EOS else text_of(output.token_ids[:-1])
    if output.finish_reason == "eos":
        assert fits(text)
    FEATURES[name].holds(output, shared)
    if option == "grammar":
        regex = {key: value for key, value in asked.items() if key != option} | {"regex": WORDS.pattern}
        assert output.token_ids == lm.generate(prompt_of(own), **regex).token_ids
