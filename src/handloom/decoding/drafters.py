"""Drafts from the text so far: what followed when the last tokens were there before.

`PromptLookup` is transformers' prompt lookup, kept up to date token by token; `SuffixAutomaton` finds the longest such
ending, whatever its length.

This module does not know models, sequences of the cache, or what becomes of a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Draft(NamedTuple):
    """Tokens that may come next; matched: how many of the last tokens were found, none if nothing was."""

    token_ids: list[int]
    matched: int


NOTHING = Draft([], 0)


class TextDrafter(Protocol):
    """A drafter that goes by token ids alone."""

    def draft(self, token_ids: Sequence[int], most: int) -> Draft:
        """At most `most` tokens that may follow these; they begin with those it was given before, or drafts are bad."""


class PromptLookup:
    """What followed the last n tokens where they were first: n from max_ngram_size down to 1, until one is found.

    Saxena, "Prompt lookup decoding", 2023 (github.com/apoorvumang/prompt-lookup-decoding); the matches are those of
    transformers' PromptLookupCandidateGenerator.
    """

    def __init__(self, max_ngram_size: int) -> None:
        self._tables: list[dict[tuple[int, ...], int]] = [{} for _ in range(max_ngram_size)]  # n-gram -> where it ends
        self._read = 0

    def draft(self, token_ids: Sequence[int], most: int) -> Draft:
        """See `TextDrafter`."""
        end = len(token_ids) - 1  # the n-grams that end in the last token are those looked for
        for size, table in enumerate(self._tables, 1):
            for at in range(max(size, self._read), end + 1):
                table.setdefault(tuple(token_ids[at - size : at]), at)
        self._read = max(self._read, end + 1)
        for size in range(min(len(self._tables), end), 0, -1):
            after = self._tables[size - 1].get(tuple(token_ids[-size:]))
            if after is not None:
                return Draft(list(token_ids[after : after + most]), size)
        return NOTHING


class SuffixAutomaton:
    """What followed the longest ending of the text that was there before, where it was last.

    The automaton of all substrings, built online in amortised constant time per token (Blumer et al., "The smallest
    automaton recognizing the subwords of a text", 1985): the suffix link of the state of the whole text is that ending.
    A draft that reaches the end of the text goes on with itself, so what repeats is drafted as long as one likes.
    Holds about 500 bytes per token.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]  # of the longest substring of a state
        self._end = [0]  # where its substrings ended, seen last
        self._last = 0
        self._read = 0
        self._found = self._start = 0  # how long that ending is, and where it ended

    def draft(self, token_ids: Sequence[int], most: int) -> Draft:
        """See `TextDrafter`."""
        if len(token_ids) < self._read:  # somebody has taken tokens back
            self._start_anew()
        if len(token_ids) > self._read:
            for token_id in token_ids[self._read :]:
                self._read += 1
                self._extend(token_id)
            found = self._link[self._last]
            self._found, self._start = self._length[found], self._end[found]
            self._end[found] = self._read
        if not self._found:
            return NOTHING
        tokens = list(token_ids[self._start : self._start + most])
        while len(tokens) < most:
            tokens.append(tokens[len(tokens) - (self._read - self._start)])
        return Draft(tokens, self._found)

    def _extend(self, token_id: int) -> None:
        state = self._add({}, self._length[self._last] + 1, self._read)
        at, self._last = self._last, state
        while at >= 0 and token_id not in self._next[at]:
            self._next[at][token_id] = state
            at = self._link[at]
        if at < 0:
            self._link[state] = 0
            return
        target = self._next[at][token_id]
        if self._length[target] == self._length[at] + 1:
            self._link[state] = target
            return
        clone = self._add(dict(self._next[target]), self._length[at] + 1, self._end[target])
        self._link[clone] = self._link[target]
        self._link[target] = self._link[state] = clone
        while at >= 0 and self._next[at].get(token_id) == target:
            self._next[at][token_id] = clone
            at = self._link[at]

    def _add(self, transitions: dict[int, int], length: int, end: int) -> int:
        self._next.append(transitions)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1
