"""How long a draft pays: by how often drafted tokens are right, and by what steps take, both measured as they run.

A step that checks k drafted tokens takes longer than one without, and gives more tokens if they are right. Tokens per
second decide, so where drafts are wrong, or the machine has no arithmetic to spare, none is made; the cost of finding
that out is a few of them, and of finding out that it has changed, one now and then.

This module does not know who drafts, or what a token is.
"""

from __future__ import annotations

from bisect import bisect_left

MARGIN = 0.02  # tokens that a draft must promise beyond what it costs
ROW_COST = 0.05  # of a step with one token, for each further one, until it was measured
_SMOOTHING = 0.2  # weight of the newest measurement
_FIRST = 0.7  # weight of the first measurement, against what was expected
_LARGEST_CHANGE = 2.0  # that one measurement may speak for: others use the machine too
_MEMORY = 0.9  # weight of the drafts before the newest
_FORGETTING = 0.97  # for each step in which it did not pay to draft
_MODEL_FORGETTING = 0.995  # the same for a model's drafts, which cost time to find out about
_PRIOR_WEIGHT = 1.0  # drafted tokens that the expectation counts for
_PRIOR = (0.7, 0.2, 0.45, 0.7, 0.85, 0.9)  # right ones expected, by class of the draft


class StepTimes:
    """Seconds of a step by how many tokens run in it."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}
        self._counts: list[int] = []  # sorted

    def learn(self, num_tokens: int, seconds: float) -> None:
        """A step has taken so long. What makes all steps slower (a longer context) moves the other counts too."""
        if not self._counts:
            self._add(num_tokens, seconds)
            return
        expected = self.seconds(num_tokens)
        change = min(max(seconds / expected, 1 / _LARGEST_CHANGE), _LARGEST_CHANGE)
        if num_tokens not in self._known:
            self._add(num_tokens, expected * change**_FIRST)
            return
        for count in self._known:
            self._known[count] *= change**_SMOOTHING
        self._known[num_tokens] *= change**_SMOOTHING

    def _add(self, num_tokens: int, seconds: float) -> None:
        self._known[num_tokens] = seconds
        self._counts.insert(bisect_left(self._counts, num_tokens), num_tokens)

    def seconds(self, num_tokens: int) -> float:
        """What a step is expected to take; where nothing was measured, relative to a step with one token."""
        if num_tokens in self._known:
            return self._known[num_tokens]
        if not self._counts:
            return 1 + ROW_COST * (num_tokens - 1)
        at = bisect_left(self._counts, num_tokens)
        if 0 < at < len(self._counts):
            low, high = self._counts[at - 1], self._counts[at]
            part = (num_tokens - low) / (high - low)
            return (1 - part) * self._known[low] + part * self._known[high]
        nearest = self._counts[0] if at == 0 else self._counts[-1]
        return self._known[nearest] * (1 + ROW_COST * (num_tokens - 1)) / (1 + ROW_COST * (nearest - 1))


class Acceptance:
    """How likely one request's drafted tokens are right, by class: 0 for a model's drafts, else by `draft_class`."""

    def __init__(self) -> None:
        self._right = [0.0] * len(_PRIOR)
        self._tried = [0.0] * len(_PRIOR)

    def rate(self, kind: int) -> float:
        """The probability that the next token of a draft is right, given those before it are."""
        expected = _PRIOR_WEIGHT * _PRIOR[kind]
        return (self._right[kind] + expected) / (self._tried[kind] + _PRIOR_WEIGHT)

    def learn(self, kind: int, drafted: int, right: int) -> None:
        """The first `right` of `drafted` tokens were; those after the first wrong one say nothing."""
        self._right[kind] = _MEMORY * self._right[kind] + right
        self._tried[kind] = _MEMORY * self._tried[kind] + min(drafted, right + 1)

    def forget(self, kind: int) -> None:
        """Nothing was drafted, since it did not pay: what is known grows old, so that it is tried again some time."""
        kept = _FORGETTING if kind else _MODEL_FORGETTING
        self._right[kind] *= kept
        self._tried[kind] *= kept


def draft_class(matched: int) -> int:
    """The class of a draft from a text, by how many tokens matched."""
    return min(matched.bit_length(), len(_PRIOR) - 1)


def best_length(
    times: StepTimes, rate: float, most: int, *, num_tokens: int, expected: float, draft_seconds: float = 0.0
) -> int:
    """How many tokens to draft for a request, 0 to `most`, to get the most tokens per second from the step.

    num_tokens: that run in the step so far; expected: new tokens it gives so far; draft_seconds: to draft one.
    """
    best, length = (expected + MARGIN) / times.seconds(num_tokens), 0
    gain, right = 0.0, 1.0
    for count in range(1, most + 1):
        right *= rate
        gain += right
        speed = (expected + gain) / (times.seconds(num_tokens + count) + count * draft_seconds)
        if speed > best:
            best, length = speed, count
    return length


def expected_gain(rate: float, length: int) -> float:
    """Tokens that a draft is expected to add to a step."""
    return sum(rate**count for count in range(1, length + 1))
