"""What a decoding mode is, and the events it emits.

This module does not know the scheduler, budgets, or any particular mode.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.errors import HandloomError

FinishReason = Literal["eos", "stop_string", "length", "time", "criteria", "aborted", "error"]
TopLogprobs = list[tuple[int, float]]


@dataclass(slots=True)
class TokenEvent:
    """One chosen token. `text`: what is now certain of the output's text, possibly empty."""

    token_id: int
    text: str = ""
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None
    request_id: int = -1


@dataclass(slots=True)
class PromptLogprobsEvent:
    """Log-probabilities of prompt tokens first, first + 1, …, each given all tokens before it."""

    first: int
    logprobs: list[float]
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    request_id: int = -1


@dataclass(slots=True)
class FinishedEvent:
    """The request is over; `text` is the rest of its text. `error` is set when reason is "error"."""

    reason: FinishReason
    text: str = ""
    stop_string: str | None = None
    error: HandloomError | None = None
    request_id: int = -1


Event = TokenEvent | PromptLogprobsEvent | FinishedEvent


class Decoder(Protocol):
    """One request's way of making tokens.

    The scheduler asks for a plan, runs as much of each Work as fits the step, marks those tokens as
    computed, and hands back the logits rows of what ran.
    """

    @property
    def max_length(self) -> int:
        """Most tokens one of its sequences can ever hold; a cache without room for them refuses the request."""

    @property
    def sequences(self) -> Seq[Sequence]:
        """Every sequence it holds pages by. The scheduler may free them all between two steps: `plan` then asks for
        all their tokens again, and `advance` must not take for new what it has seen before."""

    def plan(self) -> Seq[Work]:
        """The work that must run before this decoder can go on; never empty until it has finished."""

    def advance(self, logits: Tensor) -> list[Event]:
        """Take the logits [r, vocab_size] of its works' rows, in order: choose, append, fork, free, emit."""

    def close(self) -> None:
        """Give back what it owns; called once, when the request ends for whatever reason."""
