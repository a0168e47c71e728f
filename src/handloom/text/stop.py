"""Stop strings in a text that arrives piece by piece.

transformers' rule (`StopStringCriteria`): generation stops at the first token whose text holds the end of a stop
string; the stop string and the rest of that token stay in the output. A hit gives the offsets to follow that rule or to
cut the stop string off.

One thing differs from transformers, which compares bytes: here the decoded text is compared. So bytes that are not
UTF-8 match a stop string with U+FFFD in it; and where byte fallback turns a whole run of byte tokens into U+FFFD for
one bad byte among them, the good ones match nothing.

The matcher is an Aho-Corasick automaton (Aho and Corasick, CACM 18(6), 1975): each character is looked at once, however
many stop strings there are and however they overlap.

This module does not know tokens, or what follows from a hit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from handloom.errors import InvalidParam

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024


@dataclass(frozen=True, slots=True)
class StopHit:
    """`text[start:end] == stop_string`, in characters from the start of all the text pushed so far."""

    stop_string: str
    start: int
    end: int


def check_stop_strings(stop_strings: Sequence[str]) -> list[str]:
    """The stop strings as a list. Raises InvalidParam for too many, an empty, an overlong or a non-text one."""
    if isinstance(stop_strings, str) or not isinstance(stop_strings, Sequence):
        raise InvalidParam(f"stop_strings must be a list of strings, not {type(stop_strings).__name__}")
    if len(stop_strings) > MAX_STOP_STRINGS:
        raise InvalidParam(f"{len(stop_strings)} stop strings; the limit is {MAX_STOP_STRINGS}")
    for index, stop in enumerate(stop_strings):
        where = f"stop_strings[{index}]"
        if not isinstance(stop, str):
            raise InvalidParam(f"{where} must be a str, not {type(stop).__name__}")
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidParam(f"{where} has {len(stop)} characters; 1 to {MAX_STOP_CHARS} are allowed")
        try:
            stop.encode()
        except UnicodeEncodeError as error:
            raise InvalidParam(f"{where} is not text: character {error.start} is a lone surrogate") from None
    return list(stop_strings)


class StopMatcher:
    """Finds stop strings in a text that is pushed in pieces, wherever the pieces are cut.

    Text pushed before the output (the end of the prompt) counts too, as it does in transformers: ignore its hits.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        # One entry per state; a state is a beginning of some stop string, 0 the empty one.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]  # its length
        self._fallback = [0]  # the longest shorter end of it that is a state too
        self._stop = [""]  # the longest stop string that it ends with
        for stop in check_stop_strings(stop_strings):
            self._insert(stop)
        self._link()
        self._state = 0
        self._length = 0

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fallback.append(0)
                self._stop.append("")
            state = self._next[state][character]
        self._stop[state] = stop

    def _link(self) -> None:
        """Set the fallbacks, level by level, so that those of shorter states are ready."""
        queue = deque(self._next[0].values())
        while queue:
            parent = queue.popleft()
            for character, child in self._next[parent].items():
                self._fallback[child] = self._step(self._fallback[parent], character)
                self._stop[child] = self._stop[child] or self._stop[self._fallback[child]]
                queue.append(child)

    def _step(self, state: int, character: str) -> int:
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][character]

    def push(self, piece: str) -> StopHit | None:
        """Take the next piece; of the stop strings that end in it, return the one that ends first.

        Of several that end together, it is the longest. More pieces may follow a hit.
        """
        self._state, hit = self._scan(piece)
        self._length += len(piece)
        return hit

    def peek(self, piece: str) -> StopHit | None:
        """What `push` would return, for text that is not certain yet (`Detokenizer.pending`). Nothing is taken."""
        return self._scan(piece)[1] if piece else None

    def _scan(self, piece: str) -> tuple[int, StopHit | None]:
        hit = None
        state = self._state
        for end, character in enumerate(piece, self._length + 1):
            state = self._step(state, character)
            if hit is None and (stop := self._stop[state]):
                hit = StopHit(stop, end - len(stop), end)
        return state, hit

    @property
    def held(self) -> int:
        """How many characters at the end of the text may still become a stop string."""
        state = self._state
        while state and not self._next[state]:
            state = self._fallback[state]
        return self._depth[state]
