"""The options of structured output, checked: at most one of four, and nothing that would be too much to compile; and
token healing, which goes with none of them.

The limits on size stand before llguidance's own: a long chain of rules, each in the one before, would overflow its
stack, and what it builds of a long regular expression grows with the square.

This module does not know what a grammar allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypedDict

from handloom.errors import InvalidParam, UnsupportedOption
from handloom.sampling.grammar import Grammar
from handloom.sampling.options import Expected, Options, flag

MAX_REGEX_CHARS = 8192
"""Of a regular expression, and of all in a schema together."""
MAX_SCHEMA_CHARS = 2**16
MAX_LARK_CHARS = 2**14
MAX_RULES = 1000
"""References in a schema; rules of a grammar."""
MAX_CHOICES = 2**13
MAX_CHOICES_CHARS = 2**17
_PATTERNS = {"pattern", "whitespace_pattern", "item_separator", "key_separator"}

Compile = Callable[[str, str], Grammar]


class Structure(TypedDict):
    """See `GenerationParams`."""

    json_schema: Grammar | None
    regex: Grammar | None
    grammar: Grammar | None
    choices: Grammar | None
    token_healing: bool


def read_structure(asked: Options, compile: Compile | None) -> Structure:
    """The options. compile: see `Grammars.compile`; None without a tokenizer.

    Raises InvalidParam, UnsupportedOption, TokenizerError.
    """
    sources = {name: asked.read(name, check, default=None, off=None) for name, check in _CHECKS.items()}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) > 1:
        raise InvalidParam(f"{given[0]} and {given[1]} each say what the whole output must be; give one of them")
    if given and compile is None:
        raise UnsupportedOption(f"{given[0]} needs the text of tokens, and this checkpoint has no tokenizer")
    healing = asked.read("token_healing", flag, default=False, off=False)
    if healing and given:
        raise UnsupportedOption(
            f"token_healing beside {given[0]}: a token that heals the prompt may go past its end, into what the "
            "grammar is about; end the prompt where a token ends, and leave token_healing out"
        )
    if healing and asked.given("custom_decoder") is not None:
        raise UnsupportedOption("token_healing beside custom_decoder: that one is given the prompt as it is")
    structure = Structure(json_schema=None, regex=None, grammar=None, choices=None, token_healing=healing)
    for name, source in sources.items():
        if source is not None and compile is not None:
            structure[name] = compile(name, source)
    return structure


def json_schema(value: Any) -> str:
    """A schema as JSON text: of a dict, of JSON text, or of a class with `model_json_schema` (pydantic's)."""
    if isinstance(value, type) and callable(getattr(value, "model_json_schema", None)):
        value = value.model_json_schema()  # type: ignore[attr-defined]
    if isinstance(value, str):
        _check_size(value, MAX_SCHEMA_CHARS, "JSON text")
        try:
            value = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise Expected(f"JSON text, and it is not: {_short(error)}") from None
    if not isinstance(value, dict):
        raise Expected("a JSON schema: a dict, JSON text of an object, or a class with model_json_schema")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Expected(f"a JSON schema, and it is no JSON: {_short(error)}") from None
    _check_size(text, MAX_SCHEMA_CHARS, "a schema")
    if (num_refs := text.count('"$ref"')) > MAX_RULES:
        raise Expected(f"a schema with at most {MAX_RULES} $refs, and it has {num_refs}")
    total = sum(len(pattern) for pattern in _patterns(value))
    if total > MAX_REGEX_CHARS:
        raise Expected(f"a schema whose patterns have at most {MAX_REGEX_CHARS} characters, and they have {total}")
    return text


def _patterns(schema: Any) -> Iterator[str]:
    """Every regular expression in a schema."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            todo += node.values()
            yield from (own for key, own in node.items() if key in _PATTERNS and isinstance(own, str))
            named = node.get("patternProperties")
            yield from named if isinstance(named, dict) else ()
        elif isinstance(node, list | tuple):
            todo += node


def regex(value: Any) -> str:
    """A regular expression that the whole output matches."""
    return _text(value, MAX_REGEX_CHARS, "a regular expression")


def lark(value: Any) -> str:
    """A Lark grammar."""
    text = _text(value, MAX_LARK_CHARS, "a grammar")
    if text.count(":") > MAX_RULES:  # each rule has one
        raise Expected(f"a grammar of at most {MAX_RULES} rules, and it has {text.count(':')} colons")
    return text


def choices(value: Any) -> str:
    """Texts, as a JSON list."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(choice, str) for choice in value):
        raise Expected("a list of one or more texts")
    if len(value) > MAX_CHOICES or sum(map(len, value)) > MAX_CHOICES_CHARS:
        raise Expected(f"a list of at most {MAX_CHOICES} texts with {MAX_CHOICES_CHARS} characters together")
    for choice in value:
        _check_text(choice)
    return json.dumps(list(dict.fromkeys(value)))


def _text(value: Any, limit: int, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise Expected(f"{what}, a text that is not empty")
    _check_size(value, limit, what)
    _check_text(value)
    return value


def _check_size(text: str, limit: int, what: str) -> None:
    if len(text) > limit:
        raise Expected(f"{what} of at most {limit} characters, and it has {len(text)}")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Expected(f"text, and character {error.start} is a lone surrogate") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


_CHECKS: dict[Literal["json_schema", "regex", "grammar", "choices"], Callable[[Any], str]] = {
    "json_schema": json_schema,
    "regex": regex,
    "grammar": lark,
    "choices": choices,
}
STRUCTURES = tuple(_CHECKS)
