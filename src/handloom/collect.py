"""Gathers an engine's events into outputs and pieces.

This module does not know models or how events come about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from handloom.decoding.decoder import Event, FinishedEvent, PromptLogprobsEvent, SampleFinishedEvent, TokenEvent
from handloom.engine import Engine
from handloom.output import Output, Piece, Timing
from handloom.sampling.params import GenerationParams
from handloom.sampling.rng import seed_of_sample


class Collector:
    """One call's requests: `add` all, then exhaust `pieces`; `outputs` stand in that order, a prompt's together."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: list[Output] = []
        self._requests: dict[int, _Request] = {}
        self._windows = tuple(layer.mixer.window for layer in engine.model.transformer.spec.layers)

    def add(self, prompt: Any, /, **options: Any) -> None:
        """Queue a prompt. Raises what Engine.add_request raises."""
        index = len(self._requests)
        allowed = options.get("prefix_allowed_tokens_fn")
        if callable(allowed):  # as in transformers, it is told which prompt of the call it is about
            options["prefix_allowed_tokens_fn"] = partial(_about, index, allowed)
        decoder = self.engine.prepare(prompt, options)
        request = self.engine.add(decoder)
        outputs = [_empty(decoder.sequence.token_ids, decoder.params, at) for at in range(decoder.num_outputs)]
        for output in outputs:
            output.windows = self._windows
        self._requests[request] = _Request(index, outputs, time.perf_counter())
        self.outputs += outputs

    def pieces(self) -> Iterator[Piece]:
        """Run to the end, recording every event and yielding the visible ones."""
        for event in self.engine.run():
            yield from self._requests[event.request_id].record(event)


@dataclass(slots=True)
class _Request:
    """A prompt's place in the call, and its outputs as they grow. Times are time.perf_counter() in seconds."""

    index: int
    outputs: list[Output]
    started: float
    first: float | None = None
    over: set[int] = field(default_factory=set)

    def record(self, event: Event) -> Iterator[Piece]:
        """Take an event into the outputs; yield what is to be seen of it."""
        if isinstance(event, TokenEvent):
            self.first = self.first or time.perf_counter()
            _add_token(self.outputs[event.sample], event)
            yield Piece(self.index, event.text, event.token_id, event.logprob, event.top_logprobs, sample=event.sample)
        elif isinstance(event, PromptLogprobsEvent):
            output = self.outputs[0]
            output.prompt_logprobs = [*(output.prompt_logprobs or []), *event.logprobs]
            output.prompt_top_logprobs = [*(output.prompt_top_logprobs or []), *event.top_logprobs]
        elif isinstance(event, SampleFinishedEvent):
            self.outputs[event.sample].beams = event.search
            self.outputs[event.sample].past_key_values = event.past_key_values
            yield self._finish(event.sample, event)
        else:
            self.outputs[0].past_key_values = self.outputs[0].past_key_values or event.past_key_values
            for sample in range(len(self.outputs)):
                if sample not in self.over:
                    yield self._finish(sample, event)

    def _finish(self, sample: int, event: FinishedEvent | SampleFinishedEvent) -> Piece:
        self.over.add(sample)
        output, now = self.outputs[sample], time.perf_counter()
        output.text += event.text
        output.finish_reason, output.stop_string, output.error = event.reason, event.stop_string, event.error
        output.drafts = event.drafts if isinstance(event, FinishedEvent) else None
        first = self.first or now
        output.timing = Timing(
            first - self.started, now - self.started, len(output.prompt_token_ids), len(output.token_ids)
        )
        return Piece(self.index, event.text, None, finish_reason=event.reason, error=event.error, sample=sample)


def _about(index: int, function: Callable[[int, Tensor], Any], _: int, token_ids: Tensor) -> Any:
    return function(index, token_ids)


def _empty(prompt: list[int], params: GenerationParams, sample: int) -> Output:
    """Output number `sample` of a request, with a list for everything that was asked for."""
    output = Output(list(prompt))
    if params.do_sample and params.rng == "counter":
        output.seed = params.seed if params.num_beams > 1 else seed_of_sample(params.seed, sample)
    if params.logprobs is not None:
        output.logprobs = []
        output.top_logprobs = []
    if params.prompt_logprobs is not None:
        output.prompt_logprobs, output.prompt_top_logprobs = [], []
    output.scores = [] if params.output_scores and params.num_beams == 1 else None
    output.logits = [] if params.output_logits and params.num_beams == 1 else None
    output.hidden_states = [] if params.output_hidden_states and params.num_beams == 1 else None
    output.attentions = [] if params.output_attentions and params.num_beams == 1 else None
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
    if output.hidden_states is not None and event.seen.hidden_states is not None:
        output.hidden_states.append(event.seen.hidden_states)
    if output.attentions is not None and event.seen.attentions is not None:
        output.attentions.append(event.seen.attentions)
