"""Gathers an engine's events into outputs and pieces.

This module does not know models or how events come about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from handloom.cache.sequence import Sequence as CacheSequence
from handloom.decoding.decoder import (
    Decoder,
    Event,
    FinishedEvent,
    HealedEvent,
    PromptLogprobsEvent,
    SampleFinishedEvent,
    TokenEvent,
)
from handloom.decoding.healing import HealingDecoder
from handloom.decoding.modes import RequestDecoder
from handloom.decoding.score import ScoreDecoder
from handloom.engine import Engine
from handloom.engine.async_engine import AsyncEngine
from handloom.engine.guarded import Custom
from handloom.errors import EngineError, HandloomError, InvalidParam, InvalidPrompt, RequestFailed
from handloom.output import Output, Piece, Score, Timing
from handloom.sampling.params import GenerationParams
from handloom.sampling.rng import seed_of_sample


class Streamer(Protocol):
    """What transformers' BaseStreamer is."""

    def put(self, value: Tensor) -> None:
        """Token ids int64 on the CPU: the prompt [1, n] first, then each token [1]."""

    def end(self) -> None:
        """No more come."""


class Collector:
    """One call's requests: `add` all, then exhaust `pieces`; `outputs` stand in that order, a prompt's together."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: list[Output] = []
        self._requests: dict[int, _Request] = {}

    def add(self, prompt: Any, /, **options: Any) -> None:
        """Queue a prompt. Raises what Engine.add_request raises, InvalidParam for a streamer that cannot be one."""
        decoder, request = _prepared(self.engine, len(self._requests), prompt, options)
        self._requests[self.engine.add(decoder)] = request
        self.outputs += request.outputs

    def pieces(self) -> Iterator[Piece]:
        """Run to the end, recording every event and yielding the visible ones; streamers get theirs first.

        A streamer that raises ends its request with RequestFailed. Each hears of the end, however it came about.
        """
        try:
            for request_id, request in self._requests.items():
                yield from request.take(None, partial(self.engine.abort, request_id))
            for event in self.engine.run():
                yield from self._requests[event.request_id].take(event, partial(self.engine.abort, event.request_id))
        finally:
            for request in self._requests.values():
                request.leave()

    def stream(self, *, single: bool) -> Iterator[Piece]:
        """`pieces`, and the engine is closed after them. single: an error is raised, since nobody else goes on."""
        try:
            for piece in self.pieces():
                if single and piece.error is not None:
                    raise piece.error
                yield piece
        finally:
            self.engine.close()


def pieces_of_all(
    engine: AsyncEngine, asked: Iterable[tuple[Any, dict[str, Any]]], *, single: bool, close: bool
) -> AsyncGenerator[Piece]:
    """The pieces of these prompts with their options, as they come; leaving the loop ends the requests.

    single: an error is raised; close: close the engine in the end. Raises at once what Engine.add_request raises.
    """
    prepared = [_prepared(engine, index, prompt, options) for index, (prompt, options) in enumerate(asked)]
    return _merged(engine, prepared, single, close)


async def _merged(
    engine: AsyncEngine, prepared: Sequence[tuple[Decoder, _Request]], single: bool, close: bool
) -> AsyncGenerator[Piece]:
    came: asyncio.Queue[tuple[_Request, Event | None]] = asyncio.Queue(max(1, len(prepared)))

    async def run(decoder: Decoder, request: _Request) -> None:
        await came.put((request, None))
        try:
            async for event in engine.run(decoder):
                await came.put((request, event))
        except HandloomError as error:
            await came.put((request, FinishedEvent("error", error=error)))
        except Exception as cause:  # whatever it is, who reads must hear of it
            failure = EngineError(f"the engine failed outside of a step: {cause!r}")
            failure.__cause__ = cause
            await came.put((request, FinishedEvent("error", error=failure)))

    tasks = [asyncio.create_task(run(decoder, request)) for decoder, request in prepared]
    try:
        while not all(request.is_over for _, request in prepared):
            request, event = await came.get()
            for piece in request.take(event, tasks[request.index].cancel):
                if single and piece.error is not None:
                    raise piece.error
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, request in prepared:
            request.leave()
        if close:
            await engine.aclose()


def score_all(engine: Engine, sequences: Sequence[CacheSequence], top_logprobs: int) -> list[Score]:
    """The scores of these sequences; the engine is closed after them. Raises InvalidPrompt, NonFiniteLogits."""
    scores: dict[int, Score] = {}
    try:
        for sequence in sequences:
            if sequence.num_embeddings:
                raise InvalidPrompt("only text and token ids can be scored; embeddings have no probability")
            scores[engine.add(ScoreDecoder(sequence, top_logprobs))] = Score(list(sequence.token_ids), [], [])
        for event in engine.run():
            if isinstance(event, PromptLogprobsEvent):
                scores[event.request_id].logprobs.extend(event.logprobs)
                scores[event.request_id].top_logprobs.extend(event.top_logprobs)
            elif isinstance(event, FinishedEvent) and event.error is not None:
                raise event.error
    finally:
        engine.close()
    return list(scores.values())


def _prepared(
    engine: Engine | AsyncEngine, index: int, prompt: Any, options: dict[str, Any]
) -> tuple[RequestDecoder | Custom, _Request]:
    """The decoder of a call's prompt number `index`, and the place for what it makes."""
    options, allowed = {**options}, options.get("prefix_allowed_tokens_fn")
    streamer = options.pop("streamer", None)
    if callable(allowed):  # as in transformers, it is told which prompt of the call it is about
        options["prefix_allowed_tokens_fn"] = partial(_about, index, allowed)
    decoder = engine.prepare(prompt, options)
    _check_streamer(streamer, decoder.num_outputs)
    outputs = [_empty(decoder.sequence.token_ids, decoder.params, at) for at in range(decoder.num_outputs)]
    for output in outputs:
        output.windows = tuple(layer.mixer.window for layer in engine.model.transformer.spec.layers)
    return decoder, _Request(index, outputs, time.perf_counter(), streamer, isinstance(decoder, HealingDecoder))


@dataclass(slots=True)
class _Request:
    """A prompt's place in the call, and its outputs as they grow. Times are time.perf_counter() in seconds."""

    index: int
    outputs: list[Output]
    started: float
    streamer: Streamer | None = None
    heals: bool = False
    first: float | None = None
    over: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        return len(self.over) == len(self.outputs)

    def take(self, event: Event | None, abort: Callable[[], object]) -> Sequence[Piece]:
        """Show an event, or the prompt (None), to the streamer, and record it: what is to be seen of it.

        Calls `abort` where the streamer raises.
        """
        if self.is_over:  # the streamer raised at an event before
            return ()
        try:
            if self.streamer is not None:
                self._show(self.streamer, event)
        except Exception as cause:
            abort()
            event = FinishedEvent("error", error=RequestFailed(f"the streamer {self.streamer!r} raised {cause!r}"))
            assert event.error is not None
            event.error.__cause__ = cause
            self.streamer = None
        return () if event is None else self.record(event)

    def leave(self) -> None:
        """Nobody goes on: the streamer hears of the end, if it has not yet."""
        streamer, self.streamer = self.streamer, None
        if streamer is not None:
            streamer.end()

    def _show(self, streamer: Streamer, event: Event | None) -> None:
        """Give the streamer the prompt, a token, or the end. Raises what it raises."""
        if event is None and self.heals:
            return  # the prompt comes when it is healed
        if event is None or isinstance(event, HealedEvent):
            ids = self.outputs[0].prompt_token_ids if event is None else event.token_ids
            prompt = [id_ for id_ in ids if id_ >= 0]
            streamer.put(torch.tensor([prompt], dtype=torch.int64, device="cpu"))
        elif isinstance(event, TokenEvent):
            streamer.put(torch.tensor([event.token_id], device="cpu"))
        elif isinstance(event, FinishedEvent):
            streamer.end()
            self.streamer = None

    def record(self, event: Event) -> Sequence[Piece]:
        """Take an event into the outputs; what is to be seen of it."""
        if isinstance(event, TokenEvent):
            self.first = self.first or time.perf_counter()
            _add_token(self.outputs[event.sample], event)
            index, sample = self.index, event.sample
            return (Piece(index, event.text, event.token_id, event.logprob, event.top_logprobs, sample=sample),)
        pieces: list[Piece] = []
        if isinstance(event, PromptLogprobsEvent):
            output = self.outputs[0]
            output.prompt_logprobs = [*(output.prompt_logprobs or []), *event.logprobs]
            output.prompt_top_logprobs = [*(output.prompt_top_logprobs or []), *event.top_logprobs]
        elif isinstance(event, HealedEvent):
            for sample, output in enumerate(self.outputs):
                output.prompt_token_ids, output.text = list(event.token_ids), event.text
                if event.text:
                    pieces.append(Piece(self.index, event.text, None, sample=sample))
        elif isinstance(event, SampleFinishedEvent):
            self.outputs[event.sample].beams = event.search
            self.outputs[event.sample].past_key_values = event.past_key_values
            pieces.append(self._finish(event.sample, event))
        else:
            self.outputs[0].past_key_values = self.outputs[0].past_key_values or event.past_key_values
            left = [sample for sample in range(len(self.outputs)) if sample not in self.over]
            pieces += [self._finish(sample, event) for sample in left]
        return pieces

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


def _check_streamer(streamer: Streamer | None, num_outputs: int) -> None:
    if streamer is None:
        return
    if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
        raise InvalidParam(f"streamer is {streamer!r}; expected one of transformers', with put and end")
    if num_outputs > 1:
        raise InvalidParam(
            f"one streamer for {num_outputs} outputs of a prompt: it could not tell them apart; ask for one, or use "
            "lm.stream, whose pieces say which sample they are of"
        )


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
