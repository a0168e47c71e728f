"""Requests to measure with: drawn from a seed or read from a file, and when each arrives.

This module does not know who serves them, or how long it takes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handloom.checkpoint.json_object import parse_object, quote
from handloom.errors import InvalidParam

MAX_REQUESTS = 100_000
MAX_TOKENS = 1 << 20
"""Of one prompt, and new ones of one request."""
MAX_ALL_TOKENS = 1 << 24
"""Of all prompts: a Python integer each."""
MAX_FILE_BYTES = 256 << 20
KEYS = ("prompt", "prompt_tokens", "new_tokens")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: prompt token ids, how many tokens are to be generated, and when it arrives, in seconds."""

    prompt: list[int]
    new_tokens: int
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Evenly drawn from low to high, both included. Raises InvalidParam."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= MAX_TOKENS:
            raise InvalidParam(
                f"lengths from {self.low} to {self.high}; expected one or two numbers from 1 to {MAX_TOKENS}, as 64-512"
            )

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """ "64-512", or "128" for always the same. Raises InvalidParam."""
        low, dash, high = text.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or len(text) > 20:
            raise InvalidParam(f"lengths {quote(text, 40)}; expected a range of tokens as 64-512, or a number")
        return cls(int(low), int(high or low))

    def __str__(self) -> str:
        return f"{self.low}-{self.high}" if self.low < self.high else str(self.low)


def draw(vocab_size: int, count: int, prompts: Lengths, outputs: Lengths, seed: int = 0) -> list[Asked]:
    """`count` requests of random token ids; the same for the same arguments, on every machine. Raises InvalidParam."""
    check_count(count, "asked for")
    source = random.Random(seed)
    return _bounded(_random(source, vocab_size, prompts, outputs) for _ in range(count))


def _bounded(requests: Iterable[Asked]) -> list[Asked]:
    """All of them, unless their prompts are too much. Raises InvalidParam."""
    found: list[Asked] = []
    total = 0
    for request in requests:
        total += len(request.prompt)
        if total > MAX_ALL_TOKENS:
            raise InvalidParam(
                f"the prompts of {len(found) + 1} requests have {total} tokens; the limit is {MAX_ALL_TOKENS} in all"
            )
        found.append(request)
    return found


def _random(source: random.Random, vocab_size: int, prompts: Lengths, outputs: Lengths) -> Asked:
    length, new_tokens = source.randint(prompts.low, prompts.high), source.randint(outputs.low, outputs.high)
    return Asked([source.randrange(vocab_size) for _ in range(length)], new_tokens)


def check_count(count: int, how: str) -> None:
    """Raises InvalidParam."""
    if not 1 <= count <= MAX_REQUESTS:
        raise InvalidParam(f"{count} requests {how}; expected 1 to {MAX_REQUESTS}")


def read(
    path: Path, vocab_size: int, outputs: Lengths, encode: Callable[[str], Sequence[int]], seed: int = 0
) -> list[Asked]:
    """Requests from a file with a JSON object per line: `prompt` (text, or token ids) or `prompt_tokens` (how many
    random ids), and `new_tokens` (else drawn from `outputs`).

    encode: text to token ids. Raises InvalidParam naming the line, OSError, and what encode raises.
    """
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidParam(f"{path}: more than the {MAX_FILE_BYTES >> 20} MiB that are read; split the file")
    lines = [(number, line) for number, line in enumerate(data.splitlines(), start=1) if line.strip()]
    check_count(len(lines), f"in {path}")
    source = random.Random(seed)
    return _bounded(
        _parsed(line, f"{path}: line {number}", vocab_size, outputs, encode, source) for number, line in lines
    )


def _parsed(
    line: bytes,
    where: str,
    vocab_size: int,
    outputs: Lengths,
    encode: Callable[[str], Sequence[int]],
    source: random.Random,
) -> Asked:
    found = parse_object(line, where, InvalidParam)
    for key in found.keys() - set(KEYS):
        raise InvalidParam(f"{where}: {quote(key)} is not one of {', '.join(KEYS)}")
    if ("prompt" in found) == ("prompt_tokens" in found):
        raise InvalidParam(f"{where}: has to have prompt or prompt_tokens, and not both")
    new_tokens = _whole(found["new_tokens"], where, "new_tokens") if "new_tokens" in found else None
    length = Lengths(1, 1)
    if "prompt_tokens" in found:
        number = _whole(found["prompt_tokens"], where, "prompt_tokens")
        length = Lengths(number, number)
    drawn = _random(source, vocab_size, length, outputs)
    prompt = _ids(found["prompt"], where, vocab_size, encode) if "prompt" in found else drawn.prompt
    return Asked(prompt, drawn.new_tokens if new_tokens is None else new_tokens)


def _whole(value: Any, where: str, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise InvalidParam(f"{where}: {name} is {quote(value, 40)}; expected an integer from 1 to {MAX_TOKENS}")
    return value


def _ids(value: Any, where: str, vocab_size: int, encode: Callable[[str], Sequence[int]]) -> list[int]:
    ids = list(encode(value)) if isinstance(value, str) else value
    if not isinstance(ids, list) or not ids:
        raise InvalidParam(f"{where}: prompt is {quote(value, 40)}; expected text, or a list of token ids, not empty")
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise InvalidParam(f"{where}: token id {quote(token_id, 40)}; ids go from 0 to {vocab_size - 1}")
    return ids


def arriving(requests: Sequence[Asked], rate: float, seed: int = 0) -> list[Asked]:
    """The requests in their order at the times of a Poisson process of `rate` per second. Raises InvalidParam."""
    if not 0 < rate < float("inf"):
        raise InvalidParam(f"rate is {rate}; expected requests per second, above 0")
    source = random.Random(f"arrivals {seed}")
    times = itertools.accumulate(source.expovariate(rate) for _ in requests)
    return [replace(request, at=at) for request, at in zip(requests, times, strict=True)]
