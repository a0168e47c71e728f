"""JSON from a stranger: one object, read strictly and within bounds.

This module does not know what the keys mean.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from handloom.errors import HandloomError

MAX_SEPARATORS = 4_000_000
"""Commas and colons we parse at most. A Python object per value is some 100 bytes, so this bounds the memory that a
file of hostile JSON can ask for to a few hundred MB; the biggest real index needs 200,000."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def quote(value: object, limit: int = 120) -> str:
    """`repr(value)`, cut to `limit` characters: safe to print whatever a file holds (lone surrogates included)."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value if not isinstance(value, str) else value[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def parse_object(data: bytes, where: str, error: type[HandloomError]) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be one object.

    Args:
        data: the bytes.
        where: what they are, for messages ("config.json in /models/x").
        error: the class to raise.

    Raises:
        error: not UTF-8 (or an escaped lone surrogate), not JSON, not an object, a key given twice, NaN
            or an infinite number, nested too deeply, or more than `MAX_SEPARATORS` separators.
    """
    separators = data.count(b",") + data.count(b":")
    if separators > MAX_SEPARATORS:
        raise error(f"{where}: {separators} commas and colons, more than the {MAX_SEPARATORS} that we parse")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone half of a pair is not text
    except RecursionError:
        raise error(f"{where}: nested too deeply") from None
    except ValueError as cause:
        raise error(f"{where}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{where}: must be a JSON object, is {type(value).__name__}")
    return value


def read_object(path: Path, limit: int, error: type[HandloomError]) -> dict[str, Any]:
    """Read and parse a JSON file of at most `limit` bytes.

    Raises:
        error: bigger than `limit`, or anything that `parse_object` refuses.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path}: more than the {limit} bytes allowed for this file")
    return parse_object(data, str(path), error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {quote(twice)} is given twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too big for a number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
