"""Perplexity on a text, and what holding weights in fewer bits costs of it.

The text is cut into windows that overlap by half; every token but the first is scored once, given at least half a
window before it (the first window's tokens: what there is), and the model's first token where it has one. So a number
depends on the window, and two numbers compare only where window and text are the same.

The bundled text: prose of A. N. Whitehead, An Introduction to Mathematics (1911), chapters I, III to V and XII, the
paragraphs without formulas; in the public domain. Project Gutenberg has the book as number 41568.

This module does not know how models are loaded or results are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from handloom.errors import InvalidParam, InvalidPrompt
from handloom.lm import LM

BUNDLED = Path(__file__).parent / "texts" / "whitehead_1911.txt"
WINDOW = 512
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        tokens: how many were scored.
        value: exp of the mean negative log-likelihood per token.
        top: the token that the model held for likeliest at each of them.
    """

    tokens: int
    value: float
    top: list[int]


def perplexity(lm: LM, text: str, *, window: int = WINDOW, progress: Progress | None = None) -> Perplexity:
    """Score a text of any length in windows of so many tokens.

    progress(windows done, windows in all). Raises InvalidParam for a window that does not fit the context,
    InvalidPrompt for a text of fewer than two tokens or a model without tokenizer, NonFiniteLogits.
    """
    if lm.tokenizer is None:
        raise InvalidPrompt("this checkpoint has no tokenizer: it has token ids, but no text to score")
    if not 2 <= window <= lm.max_context:
        raise InvalidParam(f"window is {window}; expected 2 to {lm.max_context}, the context")
    first = lm.tokenizer.encode("")[:1]
    ids = lm.tokenizer.encode(text)[len(first) :]
    logprobs: list[float] = []
    top: list[int] = []
    pieces = windows(ids, window - len(first))
    for i, (piece, scored) in enumerate(pieces):
        score = lm.score([*first, *piece], top_logprobs=1)
        logprobs += score.logprobs[-scored:]
        top += [best[0][0] for best in score.top_logprobs[-scored:]]
        if progress is not None:
            progress(i + 1, len(pieces))
    return Perplexity(len(logprobs), math.exp(-math.fsum(logprobs) / len(logprobs)), top)


def windows(ids: Sequence[int], width: int) -> list[tuple[Sequence[int], int]]:
    """Runs of at most `width` ids, and how many at the end of each are scored there. Raises InvalidPrompt."""
    if len(ids) < 2:
        raise InvalidPrompt(f"the text has {len(ids)} tokens; a score needs two: a token, and one before it")
    half = max(1, width // 2)
    pieces = [(ids[:width], len(ids[:width]) - 1)]
    for begin in range(width, len(ids), half):
        end = min(begin + half, len(ids))
        pieces.append((ids[end - width : end], end - begin))
    return pieces


def agreement(a: Perplexity, b: Perplexity) -> float:
    """Share of positions at which both hold the same token for likeliest."""
    return sum(x == y for x, y in zip(a.top, b.top, strict=True)) / len(a.top)
