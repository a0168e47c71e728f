"""A decoder of the caller's, held to what the scheduler and whoever reads its events rely on.

What it does wrong (no work, work on another's sequence, tokens that do not exist, events that are none, an exception
anywhere) becomes an error of its own request; no other request, and no caller of `step`, hears of it.

This module does not know what any decoder is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Seq
from typing import get_args

from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Decoder, Event, FinishedEvent, FinishReason
from handloom.engine.model import Model
from handloom.errors import HandloomError, InvalidParam, RequestFailed
from handloom.model.hooks import Hook
from handloom.sampling.params import GenerationParams

EVENTS = get_args(Event)
REASONS = get_args(FinishReason)
LOGITS = ("none", "last", "all")
FIELDS = {"token_id": int, "sample": int, "text": str}


class Guarded:
    """A decoder around the caller's, `inner`. num_outputs: the inner one's, or 1 where it does not say.

    Raises InvalidParam where the inner one lacks something, RequestFailed where it has sequences of another pool.
    """

    def __init__(self, inner: Decoder, model: Model) -> None:
        self.inner, self._pool = inner, model.pool
        self._vocab_size, self._max_context = model.transformer.spec.vocab_size, model.max_context
        for name in ("plan", "advance", "close"):
            if not callable(self._read(name)):
                raise InvalidParam(f"the decoder {inner!r} has no method {name}; see handloom.Decoder for what one has")
        self._error: RequestFailed | None = None  # what went wrong where nothing can be raised
        self._known: Seq[Sequence] = ()
        self.max_length = _integer(inner, "max_length", self._read("max_length"))
        self.num_outputs = _integer(inner, "num_outputs", self._read("num_outputs", 1))
        self._closed = False
        self._read_sequences()

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def sequences(self) -> Seq[Sequence]:
        """The inner decoder's. Where asking for them fails, those it had before, and the next `plan` raises that."""
        try:
            self._read_sequences()
        except RequestFailed as failure:
            self._error = failure
        return self._known

    def _read(self, name: str, default: object = None) -> object:
        """An attribute that it may not have. Raises RequestFailed where asking for it raises."""
        try:
            return getattr(self.inner, name, default)
        except Exception as cause:
            raise self._wrong(f"raised {cause!r} when asked for its {name}") from cause

    def _read_sequences(self) -> None:
        try:
            sequences = tuple(self.inner.sequences)
        except Exception as cause:
            raise self._wrong(f"raised {cause!r} when asked for its sequences") from cause
        for sequence in sequences:
            if not isinstance(sequence, Sequence) or sequence.pool is not self._pool:
                raise RequestFailed(
                    f"the decoder {self.inner!r} has {sequence!r} among its sequences, which is none of this model's"
                )
        self._known = sequences

    def plan(self) -> Seq[Work]:
        """Its works. Raises RequestFailed for such as cannot be run, and what it raises."""
        if self._error is not None:
            raise self._error
        works = tuple(self.inner.plan())
        own = {id(sequence) for sequence in self.sequences}
        for work in works:
            if not isinstance(work, Work):
                raise self._wrong(f"planned {work!r}, which is no Work")
            if id(work.sequence) not in own:
                raise self._wrong("planned work on a sequence that is not among its `sequences`, or the same one twice")
            own.remove(id(work.sequence))
            if work.logits not in LOGITS:
                raise self._wrong(f"planned work with logits={work.logits!r}; expected one of {', '.join(LOGITS)}")
            if not isinstance(work.hook, Hook | None):
                raise self._wrong(f"planned work with hook={work.hook!r}; expected a handloom.Hook or None")
            self._check_tokens(work)
        return works

    def _check_tokens(self, work: Work) -> None:
        sequence, count = work.sequence, work.num_tokens
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= sequence.num_pending:
            raise self._wrong(
                f"planned to run {count!r} tokens of a sequence in which {sequence.num_pending} are pending; append a "
                "token first, or call recompute_last"
            )
        end, most = sequence.num_computed + count, min(self.max_length, self._max_context)
        if end > most:
            raise self._wrong(
                f"planned to run token {end} of a sequence; the most are {most}, of its max_length={self.max_length} "
                f"and the {self._max_context} of the context"
            )
        first = max(sequence.num_computed, sequence.num_embeddings)
        for token_id in sequence.token_ids[first:end]:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < self._vocab_size:
                raise self._wrong(f"appended token {token_id!r}; ids are integers from 0 to {self._vocab_size - 1}")

    def advance(self, logits: Tensor) -> list[Event]:
        """Its events. Raises RequestFailed for what is no event, and what it raises."""
        events = list(self.inner.advance(logits))
        for event in events:
            self._check_event(event)
        if any(isinstance(event, FinishedEvent) for event in events[:-1]):
            raise self._wrong("returned events after a FinishedEvent, which is the last of a request")
        if events and isinstance(events[-1], FinishedEvent) and (failure := self._close()) is not None:
            events[-1] = FinishedEvent("error", error=failure)
        return events

    def _check_event(self, event: object) -> None:
        if not isinstance(event, EVENTS):
            raise self._wrong(f"returned {event!r}, which is no event")
        for name, kind in FIELDS.items():
            if not isinstance(getattr(event, name, kind()), kind):
                raise self._wrong(f"returned {event!r}, whose {name} is no {kind.__name__}")
        if getattr(event, "reason", "eos") not in REASONS:
            raise self._wrong(f"returned {event!r}, whose reason is none of {', '.join(REASONS)}")
        if not 0 <= getattr(event, "sample", 0) < self.num_outputs:
            raise self._wrong(f"returned {event!r}, and has {self.num_outputs} outputs (`num_outputs`)")

    def close(self) -> None:
        """Close it. What that raises is a warning: the request is over, and its events have been told."""
        if (failure := self._close()) is not None:
            warnings.warn(f"{failure}, after its request had ended", RuntimeWarning, stacklevel=2)

    def _close(self) -> RequestFailed | None:
        """Close it once; what went wrong, after freeing its sequences in its stead."""
        if self._closed:
            return None
        self._closed = True
        known = self.sequences
        try:
            self.inner.close()
        except Exception as cause:
            for sequence in known:
                sequence.free()
            failure = self._wrong(f"raised {cause!r} when it was closed")
            failure.__cause__ = cause
            return failure
        return None

    def _wrong(self, what: str) -> RequestFailed:
        return RequestFailed(f"the decoder {self.inner!r} {what}")


def works_of(decoder: Decoder) -> Seq[Work]:
    """What a decoder plans. Raises the HandloomError it raises; RequestFailed where it raises another."""
    try:
        return tuple(decoder.plan())
    except HandloomError:
        raise
    except Exception as cause:
        raise RequestFailed(f"the decoder {decoder!r} raised {cause!r} when asked for its work") from cause


def events_of(decoder: Decoder, logits: Tensor) -> Seq[Event]:
    """The events a decoder makes of its logits, or the end of the request where it raises."""
    try:
        return list(decoder.advance(logits))
    except HandloomError as error:
        return [FinishedEvent("error", error=error)]
    except Exception as cause:
        failure = RequestFailed(f"the decoder {decoder!r} raised {cause!r} when given its logits")
        failure.__cause__ = cause
        return [FinishedEvent("error", error=failure)]


def _integer(inner: object, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidParam(f"the decoder {inner!r} has {name}={value!r}; expected an integer from 1")
    return value


class Custom(Guarded):
    """The decoder that params.custom_decoder makes. Raises RequestFailed where that raises, and what Guarded raises."""

    def __init__(self, sequence: Sequence, params: GenerationParams, model: Model) -> None:
        self.sequence, self.params, make = sequence, params, params.custom_decoder
        assert make is not None
        try:
            inner = make(sequence, params, model.tokenizer)
        except Exception as cause:
            raise RequestFailed(f"custom_decoder={make!r} raised {cause!r} when it was called") from cause
        super().__init__(inner, model)
