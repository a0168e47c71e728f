"""Several sampled outputs of one prompt (num_return_sequences): the prompt runs once, and is forked.

With rng="counter" output i has a seed of its own, made of the request's and i: its tokens are those that a request with
that seed has. With rng="torch" the outputs of a step are drawn together, as transformers draws those of a batch.

This module does not know the scheduler or other modes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.branches import Branches
from handloom.decoding.decoder import Event, FinishedEvent, SampleFinishedEvent, TokenEvent
from handloom.decoding.internals import Internals
from handloom.decoding.sample import SampleDecoder
from handloom.sampling.params import GenerationParams
from handloom.sampling.rng import seed_of_sample
from handloom.sampling.sampler import Draws, choose
from handloom.text.tokenizer import Tokenizer


class SamplesDecoder:
    """Generates params.num_return_sequences outputs from a sequence, which it owns."""

    def __init__(
        self,
        sequence: Sequence,
        params: GenerationParams,
        tokenizer: Tokenizer | None,
        branches: Branches | None = None,
    ) -> None:
        self.sequence, self.params, self.num_outputs = sequence, params, params.num_return_sequences
        self._branches = branches or Branches(sequence)
        self._internals = self._branches.internals = Internals(params, sequence)
        self.max_length = self._branches.longest + params.max_new_tokens
        self._samples = [
            SampleDecoder(sequence, replace(params, seed=seed_of_sample(params.seed, at)), tokenizer)
            for at in range(self.num_outputs)
        ]
        self._alive: list[int] = []  # the outputs that the leaves are; none before the prompt has run

    @property
    def sequences(self) -> Seq[Sequence]:
        return self._branches.sequences

    def plan(self) -> Seq[Work]:
        return self._branches.plan()

    def advance(self, logits: Tensor) -> list[Event]:
        """Choose a token of every output that goes on, once the logits of all are there."""
        rows = self._branches.take(logits)
        if rows is None:
            return []
        beside, seen = self._branches.unconditional, self._internals.take(self._branches.leaves)
        if not self._alive:
            self._alive = list(range(self.num_outputs))
            self._branches.split([0] * self.num_outputs)
            rows, seen = rows.expand(self.num_outputs, -1), seen * self.num_outputs
            beside = None if beside is None else beside.expand(self.num_outputs, -1)
        for at, leaf in zip(self._alive, self._branches.leaves, strict=True):
            self._samples[at].sequence = leaf
        table = [self._samples[at].row() for at in self._alive]
        if beside is not None:
            for row, unconditional in zip(table, beside, strict=True):
                row.unconditional = unconditional
        choice = choose(rows, table, Draws(self._alive, self.num_outputs))
        events: list[Event] = []
        for place, at in enumerate(self._alive):
            events += [_tagged(event, at) for event in self._samples[at].accept(choice, place, seen[place])]
        going_on = [place for place, at in enumerate(self._alive) if not self._samples[at].finished]
        if not going_on:
            last = events[-1]
            assert isinstance(last, SampleFinishedEvent)
            return [*events, FinishedEvent(last.reason)]
        self._branches.split(going_on)
        self._alive = [self._alive[place] for place in going_on]
        return events

    def close(self) -> None:
        self._branches.free()


def _tagged(event: Event, sample: int) -> Event:
    """An event of one output as one of the request."""
    if isinstance(event, TokenEvent):
        event.sample = sample
    if isinstance(event, FinishedEvent):
        past = event.past_key_values
        return SampleFinishedEvent(
            sample, event.reason, event.text, event.stop_string, event.error, past_key_values=past
        )
    return event
