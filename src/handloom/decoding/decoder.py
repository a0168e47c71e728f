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
from handloom.decoding.by_value import ByValue
from handloom.decoding.internals import NOTHING, KeysAndValues, Seen
from handloom.errors import HandloomError

FinishReason = Literal["eos", "stop_string", "length", "time", "criteria", "aborted", "error"]
TopLogprobs = list[tuple[int, float]]


@dataclass(slots=True, eq=False)
class TokenEvent(ByValue):
    """One chosen token. `text`: what is now certain of the output's text, possibly empty; seen: see `Internals`.

    sample: which of the request's outputs it belongs to, where there are several.
    """

    token_id: int
    text: str = ""
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None
    seen: Seen = field(default_factory=lambda: NOTHING)
    request_id: int = -1
    sample: int = 0


@dataclass(slots=True)
class PromptLogprobsEvent:
    """Log-probabilities of prompt tokens first, first + 1, …, each given all tokens before it."""

    first: int
    logprobs: list[float]
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    request_id: int = -1


@dataclass(slots=True, eq=False)
class SampleFinishedEvent(ByValue):
    """One output is over, of a request that has several or that searches with beams. Fields as in FinishedEvent.

    search: what beam search tells of this output.
    """

    sample: int
    reason: FinishReason
    text: str = ""
    stop_string: str | None = None
    error: HandloomError | None = None
    search: BeamTrace | None = None
    past_key_values: KeysAndValues | None = None
    request_id: int = -1


@dataclass(slots=True, eq=False)
class BeamTrace(ByValue):
    """How beam search came to an output of n tokens.

    score: the sum of its log-probabilities, over its length to the power of length_penalty. beam_indices [n]: which
    beam each token continued. scores, logits: of every step of the search, float32 [num_beams, vocab_size], after and
    before the rules, where asked for; the outputs of a request share them. seen: of every step, each tensor with
    num_beams first; past_key_values: of the beams that ran last, one after the other. Of beams of a group that is over
    scores, logits and seen are 0. fulfilled: whether the output has all of force_words_ids; None where there are none.
    """

    score: float
    beam_indices: list[int]
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    seen: list[Seen] | None = None
    past_key_values: list[KeysAndValues] | None = None
    fulfilled: bool | None = None


@dataclass(slots=True)
class DraftCounts:
    """What became of drafts: drafted tokens that a step checked, those of them that came out, and how many drafts."""

    drafted: int = 0
    accepted: int = 0
    num_drafts: int = 0

    @property
    def acceptance(self) -> float:
        """The share that was accepted; 0 where none was drafted."""
        return self.accepted / max(1, self.drafted)


@dataclass(slots=True, eq=False)
class FinishedEvent(ByValue):
    """The request is over: the last of its events. `text` is the rest of its text.

    `error` is set when reason is "error". A request with several outputs has told of each, and of its error, by a
    SampleFinishedEvent before, and the reason here is that of one of them; unless all ended together, by an error or
    from outside. past_key_values: where asked for; drafts: of a request with speculation.
    """

    reason: FinishReason
    text: str = ""
    stop_string: str | None = None
    error: HandloomError | None = None
    past_key_values: KeysAndValues | None = None
    drafts: DraftCounts | None = None
    request_id: int = -1


@dataclass(slots=True)
class HealedEvent:
    """The prompt was healed, before any other event: its token ids now, and the text that they add to what was given.

    See `handloom.decoding.healing`.
    """

    token_ids: list[int]
    text: str
    request_id: int = -1


Event = TokenEvent | PromptLogprobsEvent | HealedEvent | SampleFinishedEvent | FinishedEvent


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
        """Every sequence whose pages it holds. The scheduler may free them all between two steps: `plan` then asks for
        all their tokens again, and `advance` must not take logits that it has seen before for new ones."""

    def plan(self) -> Seq[Work]:
        """The work that must run before this decoder can go on; never empty until it has finished."""

    def advance(self, logits: Tensor) -> list[Event]:
        """Take the logits [r, vocab_size] of its works' rows, in order: choose, append, fork, free, emit."""

    def close(self) -> None:
        """Give back what it owns; called once, when the request ends for whatever reason."""
