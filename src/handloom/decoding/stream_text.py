"""The text of one output as it grows, and where a stop string ends it.

Stop strings are matched on the text with special tokens spelled out; the output's own text may skip them.
As in transformers, a stop string may begin in the prompt, as long as it ends in the output.

This module does not know sampling or requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from handloom.text.detokenizer import Detokenizer
from handloom.text.stop import StopMatcher
from handloom.text.tokenizer import Tokenizer

MAX_CHARACTER_TOKENS = 4
"""Tokens that one character can be spread over: the bytes of its UTF-8."""


class StreamText:
    """Turns token ids into pieces of text; `stopped_by` names the stop string once one has been met."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        stop_strings: Sequence[str],
        include_stop_text: bool,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._shown = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._include = include_stop_text
        self._matcher = StopMatcher(stop_strings) if stop_strings else None
        self._spelled = Detokenizer(tokenizer, skip_special_tokens=False) if stop_strings else None
        self._pending = ""
        self._emitted = 0
        # after each token: how much text there is, spelled out and shown
        self._ends: list[tuple[int, int]] = [(0, 0)]
        self.stopped_by: str | None = None
        if self._matcher is not None and self._spelled is not None:
            reach = MAX_CHARACTER_TOKENS * max(map(len, stop_strings))
            before = self._spelled.push_many(prompt_ids[-reach:])
            self._matcher.push(before)
            self._ends = [(len(before), 0)]

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain."""
        piece = self._shown.push(token_id)
        if self._matcher is None or self._spelled is None:
            return piece
        spelled, open_text = self._spelled.push(token_id), self._spelled.pending
        if open_text and not self._matcher.peek(spelled) and self._matcher.peek(spelled + open_text):
            # nothing comes after a stop, so what was waiting for the next token is certain
            piece, spelled = piece + self._shown.flush(), spelled + self._spelled.flush()
        return self._match(piece, spelled)

    def finish(self) -> str:
        """No more tokens come: the rest of the text."""
        piece = self._shown.flush()
        if self._matcher is None or self._spelled is None:
            return piece
        if self.stopped_by is not None:
            return self._take(self._pending + piece, len(self._pending + piece)) if self._include else ""
        out = self._match(piece, self._spelled.flush())
        if self.stopped_by is None:
            out += self._take(self._pending, len(self._pending))
        return out

    def _match(self, piece: str, spelled: str) -> str:
        """Feed the matcher and return the part of the pending text that can be shown."""
        assert self._matcher is not None
        self._pending += piece
        spelled_end, shown_end = self._ends[-1]
        self._ends.append((spelled_end + len(spelled), shown_end + len(piece)))
        hit = self._matcher.push(spelled)
        if hit is not None:
            self.stopped_by = hit.stop_string
        if self._include:
            return self._take(self._pending, len(self._pending))
        certain = self._ends[-1][0] - self._matcher.held if hit is None else hit.start
        return self._take(self._pending, self._shown_at(certain) - self._emitted)

    def _take(self, pending: str, count: int) -> str:
        count = max(0, count)
        self._pending = pending[count:]
        self._emitted += count
        return pending[:count]

    def _shown_at(self, spelled_at: int) -> int:
        """Where in the shown text an offset of the spelled-out text lies."""
        at = max(1, bisect_left(self._ends, (spelled_at, -1)))
        if at == len(self._ends):
            return self._ends[-1][1]
        spelled_start, shown_start = self._ends[at - 1]
        return max(0, min(shown_start + spelled_at - spelled_start, self._ends[at][1]))
