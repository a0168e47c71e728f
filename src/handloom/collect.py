"""Gathers an engine's events into outputs and pieces.

This module does not know models or how events come about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from handloom.decoding.decoder import Event, FinishedEvent, PromptLogprobsEvent, TokenEvent
from handloom.engine import Engine
from handloom.output import Output, Piece, Timing
from handloom.sampling.params import GenerationParams


class Collector:
    """One call's requests: `add` all, then exhaust `pieces`; `outputs` stand in the order of `add`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: list[Output] = []
        self._index: dict[int, int] = {}
        self._started: list[float] = []
        self._first: list[float | None] = []

    def add(self, prompt: Any, /, **options: Any) -> None:
        """Queue a prompt. Raises what Engine.add_request raises."""
        allowed = options.get("prefix_allowed_tokens_fn")
        if callable(allowed):  # as in transformers, it is told which prompt of the call it is about
            options["prefix_allowed_tokens_fn"] = partial(_about, len(self.outputs), allowed)
        decoder = self.engine.prepare(prompt, options)
        self._index[self.engine.add(decoder)] = len(self.outputs)
        self.outputs.append(_empty(decoder.sequence.token_ids, decoder.params))
        self._started.append(time.perf_counter())
        self._first.append(None)

    def pieces(self) -> Iterator[Piece]:
        """Run to the end, recording every event and yielding the visible ones."""
        for event in self.engine.run():
            piece = self._record(self._index[event.request_id], event)
            if piece is not None:
                yield piece

    def _record(self, index: int, event: Event) -> Piece | None:
        output = self.outputs[index]
        if isinstance(event, TokenEvent):
            if self._first[index] is None:
                self._first[index] = time.perf_counter()
            _add_token(output, event)
            return Piece(index, event.text, event.token_id, event.logprob, event.top_logprobs)
        if isinstance(event, PromptLogprobsEvent):
            assert output.prompt_logprobs is not None and output.prompt_top_logprobs is not None
            output.prompt_logprobs += event.logprobs
            output.prompt_top_logprobs += event.top_logprobs
            return None
        return self._finish(index, event)

    def _finish(self, index: int, event: FinishedEvent) -> Piece:
        output, now = self.outputs[index], time.perf_counter()
        output.text += event.text
        output.finish_reason, output.stop_string, output.error = event.reason, event.stop_string, event.error
        started, first = self._started[index], self._first[index] or now
        output.timing = Timing(first - started, now - started, len(output.prompt_token_ids), len(output.token_ids))
        return Piece(index, event.text, None, finish_reason=event.reason, error=event.error)


def _about(index: int, function: Callable[[int, Tensor], Any], _: int, token_ids: Tensor) -> Any:
    return function(index, token_ids)


def _empty(prompt: list[int], params: GenerationParams) -> Output:
    """An output with a list for everything that was asked for."""
    output = Output(list(prompt), seed=params.seed if params.do_sample and params.rng == "counter" else None)
    if params.logprobs is not None:
        output.logprobs = []
        output.top_logprobs = []
    if params.prompt_logprobs is not None:
        output.prompt_logprobs, output.prompt_top_logprobs = [], []
    output.scores = [] if params.output_scores else None
    output.logits = [] if params.output_logits else None
    return output


def _add_token(output: Output, event: TokenEvent) -> None:
    output.token_ids.append(event.token_id)
    output.text += event.text
    if output.logprobs is not None and event.logprob is not None:
        output.logprobs.append(event.logprob)
    if output.top_logprobs is not None:
        output.top_logprobs.append(event.top_logprobs or [])
    if output.scores is not None and event.scores is not None:
        output.scores.append(event.scores)
    if output.logits is not None and event.logits is not None:
        output.logits.append(event.logits)
