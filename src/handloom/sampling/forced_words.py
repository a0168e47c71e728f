"""What force_words_ids and constraints ask of an output, and how much of it a sequence has.

A constraint is a phrase, or several of which one is enough. A sequence works on one constraint at a time: a token that
begins one that is missing starts it, and one that does not go on with it puts it back, to the end of those missing.

This module does not know scores, beams or how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from handloom.sampling.options import Expected, is_integer, show

MAX_FORCED_IDS = 1024  # of all constraints together

Phrase = tuple[int, ...]
Constraint = tuple[Phrase, ...]  # one of them is enough


@dataclass(frozen=True, slots=True)
class Progress:
    """missing: constraints not begun, by index, in the order they are looked for; done: how many are complete.

    current: the one that is worked on, if any, and how its phrase begins.
    """

    missing: tuple[int, ...]
    current: int | None = None
    begun: Phrase = ()
    done: int = 0

    @property
    def is_complete(self) -> bool:
        return not self.missing and self.current is None


class ForcedWords:
    """The constraints of a request."""

    def __init__(self, constraints: tuple[Constraint, ...]) -> None:
        self.start = Progress(tuple(range(len(constraints))))
        self._lengths = [max(map(len, phrases)) for phrases in constraints]
        self._next = [_continuations(phrases) for phrases in constraints]

    def after(self, progress: Progress, token_id: int) -> Progress:
        """The progress once a token has come."""
        if progress.current is not None:
            if token_id not in self._next[progress.current][progress.begun]:
                return Progress((*progress.missing, progress.current), done=progress.done)
            return self._gone_on(progress, progress.current, token_id)
        for index in progress.missing:
            if token_id in self._next[index][()]:
                missing = tuple(other for other in progress.missing if other != index)
                return self._gone_on(Progress(missing, done=progress.done), index, token_id)
        return progress

    def _gone_on(self, progress: Progress, index: int, token_id: int) -> Progress:
        begun = (*progress.begun, token_id)
        if not self._next[index][begun]:
            return Progress(progress.missing, done=progress.done + 1)
        return Progress(progress.missing, index, begun, progress.done)

    def bank(self, progress: Progress) -> int:
        """How much of what is asked for there is, counted as if all phrases were as long as the longest."""
        longest, at = max(self._lengths), progress.current
        return progress.done * longest + (0 if at is None else longest - self._lengths[at] + len(progress.begun))

    def proposals(self, progress: Progress) -> Iterator[tuple[int, int]]:
        """Tokens that would bring it forward, each with the bank that it counts for.

        As in transformers, of the several ways a phrase goes on only the first counts as progress: it looks at the
        others as if they came after it.
        """
        if progress.current is None:
            for index in progress.missing:
                for token_id in self._next[index][()]:
                    yield token_id, self.bank(self.after(progress, token_id))
            return
        at, walked = progress.current, progress
        states: list[tuple[int, Progress]] = []
        for token_id in self._next[at][progress.begun]:
            after = self.after(walked, token_id)
            states.append((token_id, after))
            if walked.current is not None and token_id in self._next[at][walked.begun]:
                walked = Progress(progress.missing, at, (*walked.begun, token_id), progress.done)
        for token_id, after in states:
            if after.current is not None:
                after = walked
            yield token_id, self.bank(after)


def _continuations(phrases: Constraint) -> dict[Phrase, dict[int, None]]:
    """What may come after each beginning of a phrase, in the order given; nothing after a whole one."""
    found: dict[Phrase, dict[int, None]] = {}
    for phrase in phrases:
        for end, token_id in enumerate(phrase):
            found.setdefault(phrase[:end], {})[token_id] = None
        found.setdefault(phrase, {})
    return found


# Checks: the value in its type, or Expected -----------------------------------------------------------


def forced_words(vocab_size: int, eos: tuple[int, ...]) -> Callable[[Any], tuple[Constraint, ...]]:
    """A list of phrases, each a list of token ids, or a list of such where one is enough."""

    def check(value: Any) -> tuple[Constraint, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise Expected("a list of one or more phrases, each a list of token ids or a list of such to choose from")
        return _checked(value, vocab_size, eos)

    return check


def constraints(vocab_size: int, eos: tuple[int, ...]) -> Callable[[Any], tuple[Constraint, ...]]:
    """A list of PhrasalConstraint and DisjunctiveConstraint, the classes of transformers up to 4.56."""

    def check(value: Any) -> tuple[Constraint, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise Expected("a list of one or more PhrasalConstraint and DisjunctiveConstraint")
        for item in value:
            if type(item).__name__ not in ("PhrasalConstraint", "DisjunctiveConstraint"):
                raise Expected(f"made of PhrasalConstraint and DisjunctiveConstraint, and has {show(item)}")
        return _checked([item.token_ids for item in value], vocab_size, eos)

    return check


def _checked(value: list[Any] | tuple[Any, ...], vocab_size: int, eos: tuple[int, ...]) -> tuple[Constraint, ...]:
    found: list[Constraint] = []
    listed = 0
    for item in value:
        if not isinstance(item, list | tuple) or not item:
            raise Expected(f"made of lists that are not empty, and has {show(item)}")
        phrases = item if isinstance(item[0], list | tuple) else [item]
        for phrase in phrases:
            if not isinstance(phrase, list | tuple) or not phrase:
                raise Expected(f"made of lists of one or more token ids, and has {show(phrase)}")
            listed += len(phrase)
            if listed > MAX_FORCED_IDS:
                raise Expected(f"made of at most {MAX_FORCED_IDS} token ids altogether")
            for id_ in phrase:
                if not is_integer(id_) or not 0 <= id_ < vocab_size:
                    raise Expected(f"made of token ids in [0, {vocab_size}), the vocabulary, and has {show(id_)}")
                if id_ in eos:
                    raise Expected(f"made of tokens that end nothing, and has the end-of-sequence token {id_}")
        found.append(_separate(tuple(tuple(int(id_) for id_ in phrase) for phrase in phrases)))
    return tuple(found)


def _separate(phrases: Constraint) -> Constraint:
    beginnings = {phrase[:end] for phrase in phrases for end in range(1, len(phrase))}
    for phrase in phrases:
        if phrase in beginnings or phrases.count(phrase) > 1:
            raise Expected(f"made of alternatives of which none begins with another, and has {show(list(phrase))}")
    return phrases
