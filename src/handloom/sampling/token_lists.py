"""Checks of the options that are lists: token ids, sequences of them, biases, and the watermark's fields.

Each check returns the value in the type that the rules read, or raises `Expected`. However long a list is, it is
looked at once, and refused past MAX_LISTED_IDS.

This module does not know what an option means or where it was said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from handloom.sampling.options import LARGEST_FACTOR, Expected, flag, integer, is_integer, real, show
from handloom.sampling.watermark import SynthID, Watermark

MAX_LISTED_IDS = 2**20
_INT64 = 2**63


def token_sequences(vocab_size: int) -> Callable[[Any], tuple[tuple[int, ...], ...]]:
    """A list of lists of token ids, none empty; each once."""

    def check(value: Any) -> tuple[tuple[int, ...], ...]:
        if not isinstance(value, list | tuple) or not value:
            raise Expected("a list of one or more lists of token ids")
        return tuple(dict.fromkeys(_sequences(value, vocab_size)))

    return check


def token_biases(vocab_size: int) -> Callable[[Any], tuple[tuple[tuple[int, ...], float], ...]]:
    """A dict of token sequences to biases, or a list of such pairs: biases up to 1e30 either way, or -inf."""

    def check(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        well = isinstance(pairs, list | tuple) and len(pairs) > 0
        if not well or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise Expected("a dict {(token ids): bias}, or a list of [[token ids], bias], with one entry or more")
        sequences = _sequences([sequence for sequence, _ in pairs], vocab_size)
        return tuple(dict(zip(sequences, [_bias(bias) for _, bias in pairs], strict=True)).items())

    return check


def _sequences(value: Iterable[Any], vocab_size: int) -> list[tuple[int, ...]]:
    listed, sequences = 0, []
    for sequence in value:
        if not isinstance(sequence, list | tuple) or not sequence:
            raise Expected(f"made of lists of one or more token ids, and has {show(sequence)}")
        listed += len(sequence)
        if listed > MAX_LISTED_IDS:
            raise Expected(f"made of at most {MAX_LISTED_IDS} token ids altogether")
        for id_ in sequence:
            if not is_integer(id_) or not 0 <= id_ < vocab_size:
                raise Expected(f"made of token ids in [0, {vocab_size}), the vocabulary, and has {show(id_)}")
        sequences.append(tuple(int(id_) for id_ in sequence))
    return sequences


def _bias(value: Any) -> float:
    if isinstance(value, float) and value == -float("inf"):
        return value
    try:
        return real(-LARGEST_FACTOR, LARGEST_FACTOR)(value)
    except Expected:
        raise Expected(f"made of biases from -1e30 up to 1e30 or -inf, and has {show(value)}") from None


def start_and_factor(value: Any) -> tuple[int, float]:
    """A pair (tokens, factor)."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Expected("a pair (start, factor)")
    try:
        return integer(0)(value[0]), real(0, LARGEST_FACTOR, above=True)(value[1])
    except Expected as expected:
        raise Expected(f"a pair (start, factor): {expected} is needed") from None


def watermarking(value: Any) -> Watermark | SynthID:
    """One of our watermarks or of transformers' configs, or a mapping with their fields; keys make it a SynthID."""
    given = _fields_of(value)
    kind = SynthID if "keys" in given or "ngram_len" in given else Watermark
    unknown = given.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise Expected(f"a {kind.__name__}, which has no field {show(min(map(str, unknown)))}")
    checks = _SYNTHID if kind is SynthID else _WATERMARK
    checked = {}
    for name, check in checks.items():
        if name in given:
            try:
                checked[name] = check(given[name])
            except Expected as expected:
                raise Expected(f"a {kind.__name__} whose {name} is {expected}") from None
    if kind is SynthID and checked.keys() < {"keys", "ngram_len"}:
        raise Expected("a SynthID with keys and ngram_len")
    return kind(**checked)


def _fields_of(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Watermark | SynthID):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig, WatermarkingConfig

    if not isinstance(value, WatermarkingConfig | SynthIDTextWatermarkingConfig):
        raise Expected("a Watermark, a SynthID, a watermarking config of transformers, or a dict of its fields")
    return dict(vars(value))


def _between_0_and_1(value: Any) -> float:
    number = real(0, 1, above=True)(value)
    if number == 1:
        raise Expected("a number above 0 and below 1")
    return number


def _scheme(value: Any) -> str:
    if value not in ("lefthash", "selfhash"):
        raise Expected("'lefthash' or 'selfhash'")
    return str(value)


def _keys(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 1024:
        raise Expected("a list of 1 to 1024 integers")
    return tuple(integer(-_INT64, _INT64 - 1)(key) for key in value)


_WATERMARK: dict[str, Callable[[Any], Any]] = {
    "greenlist_ratio": _between_0_and_1,
    "bias": real(-LARGEST_FACTOR, LARGEST_FACTOR),
    "hashing_key": integer(-_INT64, _INT64 - 1),
    "seeding_scheme": _scheme,
    "context_width": integer(1, MAX_LISTED_IDS),
}
_SYNTHID: dict[str, Callable[[Any], Any]] = {
    "ngram_len": integer(2, 1024),
    "keys": _keys,
    "context_history_size": integer(1, MAX_LISTED_IDS),
    "sampling_table_seed": integer(-_INT64, 2 * _INT64 - 1),
    "sampling_table_size": integer(1, 2**24),
    "skip_first_ngram_calls": flag,
    "debug_mode": flag,
}
