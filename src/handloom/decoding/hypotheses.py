"""The best that a search, or one group of its beams, has finished so far; and whether something better can still come.

Searches in groups and for forced words end as in the last transformers that had them (4.56), which is not how plain
beam search ends today: only an end-of-sequence token ends a beam by itself. The length, the time and the caller's
criteria end the whole search, and whatever runs then competes as it is. Scores are Python floats, and ties fall as they
do there.

This module does not know beams, tokens or logits.
"""

from __future__ import annotations

from handloom.decoding.beams import NOWHERE, Ended, Link
from handloom.decoding.decoder import FinishReason
from handloom.sampling.params import GenerationParams

NOBODY = NOWHERE / 2  # a total below this comes from a beam that is not there, or from what is banned


class Hypotheses:
    """At most `size` of them."""

    def __init__(self, size: int, params: GenerationParams) -> None:
        self._size, self._params = size, params
        self.ended: list[Ended] = []  # in the order they came
        self._worst = -NOWHERE

    def add(
        self, total: float, length: int, last: Link, reason: FinishReason, *, fulfilled: bool | None = None
    ) -> None:
        """Take in what has a sum of log-probabilities `total` over `length` tokens, if it is good enough."""
        ended = Ended(self._scored(total, length), last, reason, total > NOBODY, fulfilled)
        if len(self.ended) == self._size and ended.score <= self._worst:
            return
        self.ended.append(ended)
        if len(self.ended) <= self._size:
            self._worst = min(ended.score, self._worst)
            return
        scores = [own.score for own in self.ended]
        del self.ended[scores.index(min(scores))]
        self._worst = sorted(scores)[1]

    def cannot_improve(self, best_total: float, length: int) -> bool:
        """Whether the search is over, where its best beam is at best_total after `length` tokens."""
        if len(self.ended) < self._size:
            return False
        if self._params.early_stopping is True:
            return True
        if self._params.early_stopping == "never" and self._params.length_penalty > 0:
            length = self._params.max_new_tokens
        return self._worst >= self._scored(best_total, length)

    def _scored(self, total: float, length: int) -> float:
        score: float = total / length**self._params.length_penalty
        return score


def best_of(ended: list[Ended], count: int) -> list[Ended | None]:
    """The best `count`, the best first, and those as good as the last of them; None for those that are missing."""
    ordered = sorted(ended, key=lambda own: own.score)[::-1]
    last = ordered[count - 1].score if len(ordered) >= count else 0.0
    best: list[Ended | None] = [
        own if own.found else None for at, own in enumerate(ordered) if at < count or own.score == last
    ]
    return best + [None] * (count - len(best))
