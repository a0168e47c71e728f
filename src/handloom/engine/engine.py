"""The engine: requests in, events out, one step at a time.

This module does not know chat, the Hub, files, or how results are shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Decoder, Event
from handloom.decoding.sample import SampleDecoder
from handloom.engine.runner import Runner
from handloom.engine.scheduler import Request, Scheduler
from handloom.errors import InvalidParam, InvalidPrompt, UnsupportedOption
from handloom.model.hooks import Hooks
from handloom.model.transformer import Transformer
from handloom.sampling.params import GenerationParams, resolve_params
from handloom.text.tokenizer import Tokenizer

MAX_STEP_TOKENS = 512
MAX_LOGITS_BYTES = 128 << 20


class Model(Protocol):
    """What the engine needs of a loaded model; `handloom.LM` is one."""

    transformer: Transformer
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    max_context: int
    pool: PagePool
    hooks: Hooks

    def encode(self, prompt: Any) -> Sequence: ...


class Engine:
    """Continuous generation for many requests over one model.

    max_step_tokens: most tokens in one forward pass (longer prompts run in chunks); max_running: most
    requests in flight at once, the others wait. Raises InvalidParam. Not for use from several threads at once.
    """

    def __init__(self, model: Model, *, max_step_tokens: int = MAX_STEP_TOKENS, max_running: int = 256) -> None:
        if min(max_step_tokens, max_running) < 1:
            raise InvalidParam(f"max_step_tokens={max_step_tokens}, max_running={max_running}: both must be 1 or more")
        self.model = model
        self.runner = Runner(model.transformer, model.pool, model.hooks)
        row_bytes = 4 * model.transformer.spec.vocab_size
        self.scheduler = Scheduler(
            model.pool,
            max_tokens=max_step_tokens,
            max_running=max_running,
            max_rows=max(1, MAX_LOGITS_BYTES // row_bytes),
        )
        self._ids = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def resolve(self, sequence: Sequence, options: dict[str, Any]) -> GenerationParams:
        """A request's parameters. Raises InvalidPrompt, InvalidParam, UnsupportedOption, ContextOverflow."""
        if not len(sequence):
            raise InvalidPrompt("the sequence is empty; append a token to it first")
        spec = self.model.transformer.spec
        params = resolve_params(
            options,
            generation_config=self.model.generation_config,
            prompt_length=len(sequence),
            max_context=self.model.max_context,
            vocab_size=spec.vocab_size,
            # as in transformers, a generation_config.json that names no eos means that there is none
            eos_token_id=() if self.model.generation_config else spec.eos_token_ids,
        )
        if params.stop_strings and self.model.tokenizer is None:
            raise InvalidPrompt("stop_strings need a tokenizer, and this checkpoint has none; stop on eos_token_id")
        if params.prompt_logprobs is not None and sequence.num_embeddings:
            raise UnsupportedOption("prompt_logprobs need token ids, and the prompt begins with embeddings")
        return params

    def prepare(self, prompt: Any, options: dict[str, Any]) -> SampleDecoder:
        """The decoder of a request, checked and not queued yet. Arguments and errors are those of `add_request`."""
        if not isinstance(prompt, Sequence):
            sequence = self.model.encode(prompt)
            return SampleDecoder(sequence, self.resolve(sequence, options), self.model.tokenizer)
        if prompt.pool is not self.model.pool:
            raise InvalidPrompt("the sequence lives in the cache of another model; pass its token_ids instead")
        if any(prompt in request.decoder.sequences for request in self.scheduler):
            raise InvalidPrompt("the sequence is in use by another request of this engine; fork it")
        return SampleDecoder(prompt, self.resolve(prompt, options), self.model.tokenizer, owns_sequence=False)

    def add_request(self, prompt: Any, /, *, priority: int = 0, **options: Any) -> int:
        """Queue a prompt (text, token ids, embeddings [n, hidden_size], or a Sequence of the cache).

        A higher priority comes first; among equals, who came first. Returns the request id its events carry.
        A Sequence stays the caller's, receives the new tokens and keeps its pages when the request ends; while
        it lasts they may be taken for others and computed anew. Forks keep theirs.
        Raises InvalidPrompt, ContextOverflow, InvalidParam, UnsupportedOption.
        """
        return self.add(self.prepare(prompt, options), priority=priority)

    def add(self, decoder: Decoder, *, priority: int = 0) -> int:
        """Queue a decoder of any mode; returns its request id. Raises InvalidParam."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidParam(f"priority is {priority!r}; expected an integer, where higher comes first")
        request = Request(next(self._ids), decoder, priority)
        self.scheduler.add(request)
        return request.id

    def abort(self, request_id: int) -> bool:
        """End a request now and free its pages; False if it is already over."""
        return self.scheduler.remove(request_id)

    def step(self) -> list[Event]:
        """Run one step: plan, forward, choose, advance. Returns the events; nothing to do gives none."""
        plan, events = self.scheduler.plan()
        if plan.works:
            logits = self.runner.forward(plan.works)
            events += self.scheduler.advance(plan, logits)
        return events

    def run(self) -> Iterator[Event]:
        """Step until no request is left; events as they come."""
        while self.has_work:
            yield from self.step()

    def close(self) -> None:
        """Abort every request."""
        for request in tuple(self.scheduler):
            self.abort(request.id)
