"""Speculative decoding: several tokens a step, where somebody can guess what comes next.

A step runs a request's last token and k drafted ones after it, so it yields the logits after each. From these, tokens
are chosen in turn, by the same rules and the same noise as without drafts. While a chosen token is the drafted one, the
next row of logits counts too; the first that is another is kept, and ends it. So a step gives 1 to k + 1 tokens. K and
V of wrong drafts are written over.

So the tokens are those without speculation, sampled ones too, whoever drafts and however much. Leviathan et al., "Fast
inference from transformers via speculative decoding", 2023 (arXiv 2211.17192). For drafts that are certain of
themselves (from a text) choosing and comparing is their algorithm 1; for those of a model, which draws by the same
noise, it is the drafter-invariant kind: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant
speculative decoding", 2024 (arXiv 2408.07978). Algorithm 1 accepts with probability 1 - d, this with (1 - d) / (1 + d)
or more, d being the distance of the two distributions; in exchange, tokens depend on nothing that was measured.

This module does not know the scheduler, or how a draft is found.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Decoder, DraftCounts, Event, FinishedEvent, FinishReason
from handloom.decoding.draft_length import Acceptance, StepTimes, best_length, draft_class, expected_gain
from handloom.decoding.draft_model import Assistant, ModelDrafter, Wanted, draft_by_model
from handloom.decoding.drafters import PromptLookup, SuffixAutomaton, TextDrafter
from handloom.decoding.sample import SampleDecoder
from handloom.errors import HandloomError
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import Row
from handloom.sampling.sampler import Choice
from handloom.text.tokenizer import Tokenizer

BY_MODEL = 0  # the class of a model's drafts
UNMEASURED_DRAFT = 0.2  # seconds to draft a token, in steps of one token, until it was measured
FIRST_DRAFT = 2  # tokens that a model drafts before it is known how long that takes
_SMOOTHING = 0.2


def speculates(params: GenerationParams) -> bool:
    """Whether these ask for speculative decoding."""
    return (params.prompt_lookup_num_tokens, params.speculation, params.assistant_model) != (None, None, None)


class SpeculativeDecoder(SampleDecoder):
    """A SampleDecoder whose sequence may have tokens ahead of it, from a `Speculator`, which counts in `totals` too."""

    def __init__(
        self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None, *, owns_sequence: bool = True
    ) -> None:
        super().__init__(sequence, params, tokenizer, owns_sequence=owns_sequence)
        self.acceptance, self.counts, self.totals = Acceptance(), DraftCounts(), DraftCounts()
        self.by_text = _text_drafter(params)
        self.by_model: ModelDrafter | None = None
        if params.assistant_model is not None:
            self.by_model = ModelDrafter(params.assistant_model, self._params, self.prompt_length, sequence.salt)
        self._limit = params.prompt_lookup_num_tokens or params.num_assistant_tokens
        self._kind = BY_MODEL
        self._ran = self._right = 0  # tokens ahead: that ran in this step, and that were right
        self._failure: HandloomError | None = None  # of its drafts
        self._watched = params.output_hidden_states or params.output_attentions

    @property
    def ids(self) -> list[int]:
        """The token ids that a drafter goes by."""
        hidden = self.sequence.num_embeddings
        return self.sequence.token_ids[hidden:] if hidden else self.sequence.token_ids

    @property
    def most(self) -> int:
        """How many tokens a draft may have now: no more than it may still generate, and than its pages hold.

        None where every token that runs is looked at."""
        sequence = self.sequence
        if self._watched or sequence.num_pending > 1 or len(sequence) <= self.prompt_length:
            return 0
        left = self.max_length - len(sequence) - 1
        return max(0, min(self._limit, left, sequence.room))

    def ahead(self, token_ids: Seq[int], kind: int, failure: HandloomError | None = None) -> None:
        """Try these in the next step, up to an end-of-sequence token: a draft of that class. failure: what ends the
        request instead."""
        ends = [at for at, token_id in enumerate(token_ids, 1) if token_id in self.params.eos_token_id]
        self.sequence.ahead = list(token_ids[: ends[0] if ends else len(token_ids)])
        self._kind, self._failure = kind, failure

    def plan(self) -> Seq[Work]:
        """Its next tokens, and those ahead. Raises what went wrong in a hook on its assistant."""
        if self._failure is not None:
            raise self._failure
        (work,) = super().plan()
        sequence = self.sequence
        if work.num_tokens > 1:  # its K and V were taken meanwhile
            sequence.ahead = []
        return [work._replace(num_tokens=1 + len(sequence.ahead), logits="all")] if sequence.ahead else [work]

    def first_row(self, start: int, end: int) -> int:
        self._ran = end - start - 1 if self.sequence.ahead else 0
        self._right = 0
        return start if self.sequence.ahead else end - 1

    def rows(self, count: int) -> Seq[Row]:
        first = self.row()
        if count == 1 or first.memory.reads:
            return [first]
        after = [*first.token_ids, *self.sequence.ahead[self._right :]]
        ends = range(len(first.token_ids) + 1, len(first.token_ids) + count)
        return [first, *(Row(first.params, after[:end], first.prompt_length, first.rules) for end in ends)]

    def take(self, choice: Choice, places: Seq[int]) -> tuple[list[Event], bool]:
        events: list[Event] = []
        sequence, ran = self.sequence, self._ran
        for place in places:
            drafted = sequence.ahead[self._right] if self._right < ran else None
            length = sequence.num_computed = len(sequence)  # what was accepted ran in this step
            told, _ = super().take(choice, [place])
            events += told
            is_right = len(sequence) > length and sequence.token_ids[-1] == drafted
            self._right += is_right
            if self.finished or not is_right:
                self._settle()
                return events, False
        return events, True

    def _settle(self) -> None:
        """All rows that count were chosen from."""
        sequence = self.sequence
        if self._ran:
            for counts in (self.counts, self.totals):
                counts.drafted += self._ran
                counts.accepted += self._right
                counts.num_drafts += 1
            self.acceptance.learn(self._kind, self._ran, self._right)
            if self.params.num_assistant_tokens_schedule != "constant" and self.by_model is not None:
                self._limit = self._limit + 2 if self._right == self._ran else max(1, self._limit - 1)
        sequence.ahead = []

    def _finish(self, reason: FinishReason, error: HandloomError | None = None) -> FinishedEvent:
        event = super()._finish(reason, error)
        event.drafts = self.counts
        return event

    def close(self) -> None:
        self.sequence.ahead = []
        if self.by_model is not None:
            self.by_model.close()
        super().close()


def _text_drafter(params: GenerationParams) -> TextDrafter | None:
    if params.prompt_lookup_num_tokens is not None:
        return PromptLookup(params.max_matching_ngram_size)
    return None if params.speculation is None else SuffixAutomaton()


class Speculator:
    """Drafts for the requests of an engine before each of its steps, as long as it pays. See `draft_length`.

    counts: of all its requests, those that were aborted included.
    """

    def __init__(self) -> None:
        self._times = StepTimes()
        self._draft_seconds: WeakKeyDictionary[Assistant, float] = WeakKeyDictionary()  # of one pass
        self._expected: int | None = None  # tokens of the next step, if its time tells something
        self._started = 0.0
        self.counts = DraftCounts()

    def draft(self, running: Collection[Decoder], room: int) -> None:
        """Put drafts ahead of the sequences of those of these decoders that speculate.

        room: tokens that the next step may have, those that the running decoders need included.
        """
        decoders = [decoder for decoder in running if isinstance(decoder, SpeculativeDecoder)]
        if not decoders:
            self._expected = None
            return
        pending = [sequence.num_pending for decoder in running for sequence in decoder.sequences]
        tokens, expected, left = sum(pending), float(len(pending)), max(0, room - sum(pending))
        wanted: dict[Assistant, list[tuple[SpeculativeDecoder, Wanted]]] = {}
        for decoder in decoders:
            most = min(left, decoder.most)
            found: Seq[int] = ()
            kind, seconds = BY_MODEL, 0.0
            decoder.sequence.ahead, decoder.totals = [], self.counts
            if most and decoder.by_text is not None:
                found, matched = decoder.by_text.draft(decoder.ids, most)
                most, kind = len(found), draft_class(matched)
            elif most and decoder.by_model is not None:
                most = min(most, decoder.by_model.most(len(decoder.sequence)))
                if decoder.by_model.assistant not in self._draft_seconds:
                    most = min(most, FIRST_DRAFT)
                seconds = self._seconds(decoder.by_model.assistant) / len(decoders)
            if not most:
                continue
            rate = decoder.acceptance.rate(kind)
            length = best_length(self._times, rate, most, num_tokens=tokens, expected=expected, draft_seconds=seconds)
            if not length:
                decoder.acceptance.forget(kind)
                continue
            tokens, left, expected = tokens + length, left - length, expected + expected_gain(rate, length)
            if decoder.by_model is None:
                decoder.ahead(found[:length], kind)
            else:
                together = wanted.setdefault(decoder.by_model.assistant, [])
                together.append((decoder, Wanted(decoder.by_model, decoder.ids, length)))
        for assistant, together in wanted.items():
            self._draft_by_model(assistant, together)
        ahead = sum(len(decoder.sequence.ahead) for decoder in decoders)
        self._expected = sum(pending) + ahead if max(pending) == 1 else None
        self._started = time.perf_counter()

    def ran(self, num_tokens: int) -> None:
        """The step after `draft` is over and ran so many tokens. One that others joined tells nothing."""
        if num_tokens == self._expected:
            self._times.learn(num_tokens, time.perf_counter() - self._started)

    def _seconds(self, assistant: Assistant) -> float:
        return self._draft_seconds.get(assistant, UNMEASURED_DRAFT * self._times.seconds(1))

    def _draft_by_model(self, assistant: Assistant, together: Seq[tuple[SpeculativeDecoder, Wanted]]) -> None:
        started = time.perf_counter()
        passes = draft_by_model(assistant, [wanted for _, wanted in together])
        for decoder, wanted in together:
            decoder.ahead(wanted.drafted, BY_MODEL, wanted.error)
        if passes:
            seconds = (time.perf_counter() - started) / passes
            known = self._draft_seconds.setdefault(assistant, seconds)
            self._draft_seconds[assistant] = known + _SMOOTHING * (seconds - known)
