"""The common mode: one sequence per request, one token a step, greedy or sampled.

`advance_together` takes all such requests of a step at once, so that choosing is vectorised over rows; also those that
draft tokens (`decoding/speculative.py`), which have several rows each.

This module does not know the scheduler or other modes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Event, FinishedEvent, FinishReason, PromptLogprobsEvent, TokenEvent
from handloom.decoding.internals import NOTHING, Internals, Seen, keys_and_values
from handloom.decoding.stream_text import StreamText
from handloom.errors import HandloomError, InvalidPrompt, RequestFailed
from handloom.ops.torch_threads import callers_threads, one_thread
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import RequestRules, Row
from handloom.sampling.sampler import Choice, choose, token_logprobs
from handloom.text.tokenizer import Tokenizer

Choosing = Callable[[Tensor, Seq[Row]], Choice]
"""`sampler.choose`, or another function that does the same."""
Logits = Tensor | Choice
"""What a step gives its decoders: logits [R, vocab_size], or, where the device has chosen, one choice for each."""


@dataclass(slots=True)
class Ready:
    """A decoder, and which rows of the step's logits are its own: start..end."""

    decoder: SampleDecoder
    start: int
    end: int


class SampleDecoder:
    """Generates from a sequence until a stop. `owns_sequence`: free its pages at the end.

    A sequence of the caller's keeps its pages at the end; in between they may be taken and computed anew.
    """

    def __init__(
        self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None, *, owns_sequence: bool = True
    ) -> None:
        self.sequence, self.params, self.owns_sequence, self.num_outputs = sequence, params, owns_sequence, 1
        self.prompt_length = len(sequence)
        # the sampler sees no ids for embedded positions, and counts no length for them
        hidden = sequence.num_embeddings
        self._params = replace(params, min_length=max(0, params.min_length - hidden))
        self.rules = RequestRules(self._params, self.prompt_length - hidden)
        self.started = time.monotonic()
        self.finished = False
        self._scores: list[Tensor] = []  # of all tokens, for the caller's criteria
        self._text = output_text(tokenizer, params, sequence.token_ids[hidden:])
        self._next_prompt_logprob = 1
        self.internals = Internals(params, sequence)

    @property
    def max_length(self) -> int:
        return self.prompt_length + self.params.max_new_tokens

    @property
    def sequences(self) -> Seq[Sequence]:
        return (self.sequence,)

    def plan(self) -> Seq[Work]:
        """Its next tokens. Raises InvalidPrompt if the caller has emptied the sequence."""
        sequence, length = self.sequence, len(self.sequence.token_ids)
        if not length:
            raise InvalidPrompt("the sequence was emptied while a request was running on it")
        logits: Literal["all", "last"] = "last"
        if self.params.prompt_logprobs is not None and length == self.prompt_length:
            logits = "all"
            sequence.forget(min(sequence.num_computed, self._next_prompt_logprob - 1))
        sequence.recompute_last()  # computed before, or by the caller meanwhile: its last logits are wanted
        return [Work(sequence, length - sequence.num_computed, logits, self.internals.hook(sequence))]

    def advance(self, logits: Tensor) -> list[Event]:
        return [event for _, told in advance_together([Ready(self, 0, len(logits))], logits) for event in told]

    def close(self) -> None:
        self.finished = True
        if self.owns_sequence:
            self.sequence.free()
        else:
            self.sequence.forget(self.sequence.num_computed)

    def first_row(self, start: int, end: int) -> int:
        """Which of its rows start..end of the logits is the first to choose from."""
        return end - 1

    def rows(self, count: int) -> Seq[Row]:
        """What the sampler needs to know of its next rows, `count` at most: as many as can be chosen from together."""
        return [self.row()]

    def take(self, choice: Choice, places: Seq[int]) -> tuple[list[Event], bool]:
        """Take what was chosen in these places of a choice: the events, and whether there are rows to go on with."""
        return self.accept(choice, places[0], self.internals.take([self.sequence])[0]), False

    def row(self) -> Row:
        """What the sampler needs to know; embedded prompt positions have no ids and are left out."""
        hidden, token_ids = self.sequence.num_embeddings, self.sequence.token_ids
        token_ids = token_ids[hidden:] if hidden else token_ids
        return Row(self._params, token_ids, self.prompt_length - hidden, self.rules)

    def prompt_logprobs(self, logits: Tensor) -> list[Event]:
        """Log-probabilities of the prompt tokens that these rows [r, vocab_size] of prompt positions predict."""
        first = self._next_prompt_logprob
        logits = logits[first - 1 - (self.sequence.num_computed - len(logits)) :]  # the others were told before
        targets = self.sequence.token_ids[first : min(first + len(logits), self.prompt_length)]
        if not targets:
            return []
        ids = torch.tensor(targets, device=logits.device)
        logprobs, top = token_logprobs(logits[: len(targets)], ids, self.params.prompt_logprobs or 0)
        self._next_prompt_logprob += len(targets)
        return [PromptLogprobsEvent(first, logprobs, top)]

    def accept(self, choice: Choice, i: int, seen: Seen = NOTHING) -> list[Event]:
        """Take row i of a choice, and what was seen on the way: append the token, find out whether it was the last."""
        error = choice.errors[i]
        if error is not None:
            return [self._finish("error", error=error)]
        token_id, scores = choice.token_ids[i], choice.scores[i]
        try:
            self.sequence.append(token_id)
        except HandloomError as failure:  # the caller has filled the context meanwhile
            return [self._finish("error", error=failure)]
        if scores is not None and self.params.stopping_criteria:
            self._scores.append(scores)
        text = self._text.push(token_id) if self._text is not None else ""
        event = TokenEvent(token_id, text, choice.logprobs[i], choice.top_logprobs[i], scores, choice.logits[i], seen)
        try:
            reason = self._stop_reason(token_id)
        except HandloomError as failure:
            return [event, self._finish("error", error=failure)]
        return [event] if reason is None else [event, self._finish(reason)]

    def _finish(self, reason: FinishReason, error: HandloomError | None = None) -> FinishedEvent:
        self.finished = True
        rest, stop_string = "", None
        if self._text is not None:
            rest, stop_string = self._text.finish(), self._text.stopped_by
        past = None if error is not None or not self.params.output_past_key_values else keys_and_values(self.sequence)
        return FinishedEvent(reason, rest, stop_string, error, past)

    def _stop_reason(self, token_id: int) -> FinishReason | None:
        params, generated = self.params, len(self.sequence.token_ids) - self.prompt_length
        if token_id in params.eos_token_id:
            return "eos"
        if self._text is not None and self._text.stopped_by is not None:
            return "stop_string"
        if generated >= params.max_new_tokens:
            return "length"
        if params.max_time is not None and time.monotonic() - self.started > params.max_time:
            return "time"
        return "criteria" if params.stopping_criteria and self._criteria_met() else None

    def _criteria_met(self) -> bool:
        ids = torch.tensor([self.sequence.token_ids[self.sequence.num_embeddings :]], device="cpu")
        scores = tuple(s.unsqueeze(0) for s in self._scores) if self._scores else None
        return criteria_met(self.params, ids, scores)[0]


def output_text(tokenizer: Tokenizer | None, params: GenerationParams, prompt_ids: Seq[int]) -> StreamText | None:
    """The text of an output that is to come after these ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    return StreamText(
        tokenizer,
        skip_special_tokens=params.skip_special_tokens,
        stop_strings=params.stop_strings,
        include_stop_text=params.include_stop_text,
        prompt_ids=prompt_ids,
    )


def criteria_met(params: GenerationParams, ids: Tensor, scores: tuple[Tensor, ...] | None) -> list[bool]:
    """Which of r sequences the caller's criteria end, called as transformers does: (input_ids [r, n], scores or None)
    -> bool or bool [r]. Raises RequestFailed where one of them raises."""
    met = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
    for criterion in params.stopping_criteria:
        try:
            with callers_threads(), torch.no_grad():
                met |= torch.as_tensor(criterion(ids, scores), device="cpu") != 0
        except Exception as cause:
            raise RequestFailed(f"the stopping criterion {criterion!r} raised {cause!r}") from cause
    found: list[bool] = met.tolist()
    return found


def advance_together(ready: Seq[Ready], logits: Logits, choose: Choosing = choose) -> Iterator[tuple[int, list[Event]]]:
    """Choose for every decoder whose prompt has run; yields (which of them, some of its events, in order).

    logits [R, vocab_size] of the whole step; each decoder's rows are logits[start:end]. Rows of all decoders are chosen
    from together: one of most, several of those with drafted tokens.
    """
    if isinstance(logits, Choice):
        for i, item in enumerate(ready):
            yield i, item.decoder.accept(logits, i)
        return
    choosing: list[tuple[int, int]] = []  # a decoder, and its first row that was not chosen from
    for i, item in enumerate(ready):
        decoder = item.decoder
        if decoder.params.prompt_logprobs is not None and len(decoder.sequence) == decoder.prompt_length:
            yield i, decoder.prompt_logprobs(logits[item.start : item.end])
        if decoder.sequence.num_pending == 0:
            choosing.append((i, decoder.first_row(item.start, item.end)))
    while choosing:
        tables = [ready[i].decoder.rows(ready[i].end - first) for i, first in choosing]
        picked = [first + at for (_, first), table in zip(choosing, tables, strict=True) for at in range(len(table))]
        choice = choose(_rows(logits, picked), [row for table in tables for row in table])
        end, going_on = 0, []
        for (i, first), table in zip(choosing, tables, strict=True):
            start, end = end, end + len(table)
            told, goes_on = ready[i].decoder.take(choice, range(start, end))
            yield i, told
            if goes_on and first + len(table) < ready[i].end:
                going_on.append((i, first + len(table)))
        choosing = going_on


def _rows(logits: Tensor, picked: list[int]) -> Tensor:
    if picked == list(range(logits.shape[0])):
        return logits
    with one_thread():
        return logits.index_select(0, torch.tensor(picked, device=logits.device))
