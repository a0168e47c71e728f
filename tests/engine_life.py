"""Lives of an engine for fuzz tests: what may be asked of it, by whom, and what must hold whatever comes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from engines import Results, all_free, lm_in_float64
from handloom.engine import Engine
from handloom.errors import NonFiniteLogits, OutOfPages, RequestFailed
from handloom.live import LiveSequence
from handloom.lm import LM
from tiny_models import random_ids

LENGTHS = (1, 4, 9, 13, 19)
NEW_TOKENS = (3, 13, 26)
PROMPTS = [[*random_ids(7, 11)[:length], *random_ids(i, length)][:length] for i, length in enumerate(LENGTHS)]
MAX_STEPS = 5000


@dataclass(frozen=True)
class Asked:
    """A request as it is drawn. edited: the K of its first tokens is set before it runs; fails_at: new tokens after
    which its processor raises, or gives NaN; speculates: whether tokens are drafted."""

    prompt: int
    new_tokens: int
    sampled: bool = False
    priority: int = 0
    live: bool = False
    edited: bool = False
    fails_at: int | None = None
    how: str = "raises"
    speculates: bool = False

    def options(self) -> dict[str, Any]:
        own: dict[str, Any] = {"max_new_tokens": self.new_tokens, "eos_token_id": []}
        return own | ({"do_sample": True, "top_k": 0, "seed": 3} if self.sampled else {"do_sample": False})

    def drafts(self) -> dict[str, Any]:
        return {"speculation": "suffix"} if self.speculates else {}

    def processor(self) -> dict[str, Any]:
        def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] - LENGTHS[self.prompt] != self.fails_at:
                return scores
            if self.how == "raises":
                raise ZeroDivisionError("mine")
            return scores * torch.nan

        return {} if self.fails_at is None else {"logits_processor": [fail]}


def edit(sequence: LiveSequence) -> None:
    """Set the K of the first tokens of a sequence to something the model would not make of them."""
    _ = sequence.logits
    k, _v = sequence.kv(0, 0, 3)
    sequence.set_kv(0, 0, k=k.flip(0) * 2)


@cache
def alone(asked: Asked) -> list[int]:
    with lm_in_float64().sequence(PROMPTS[asked.prompt]) as sequence:
        if asked.edited:
            edit(sequence)
        tokens: list[int] = sequence.lm.generate(sequence, **asked.options()).token_ids
    return tokens


REQUESTS = st.builds(
    Asked,
    prompt=st.integers(0, len(PROMPTS) - 1),
    new_tokens=st.sampled_from(NEW_TOKENS),
    sampled=st.booleans(),
    priority=st.integers(-1, 1),
    live=st.sampled_from((False, False, False, True)),
    edited=st.booleans(),
    fails_at=st.none() | st.none() | st.none() | st.integers(0, 20),
    how=st.sampled_from(("raises", "NaN")),
)
ACTIONS = st.one_of(
    REQUESTS,
    REQUESTS,
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.sampled_from(("abort", "fork", "read", "pause", "pause", "resume")), st.integers(0, 9)),
)


@dataclass
class Life:
    """One engine, what was asked of it, and the sequences the caller holds."""

    lm: LM
    engine: Engine
    results: Results = field(default_factory=Results)
    asked: dict[int, Asked] = field(default_factory=dict)
    live: dict[int, LiveSequence] = field(default_factory=dict)
    forks: list[tuple[LiveSequence, list[int]]] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)

    def act(self, action: Any) -> None:
        if isinstance(action, Asked):
            prompt: Any = PROMPTS[action.prompt]
            if action.live:
                prompt = self.lm.sequence(prompt)
            edited = action.live and action.edited and len(prompt) > 3 and self.lm.pool.num_free > 2 * len(prompt)
            action = replace(action, edited=edited)
            if edited:
                edit(prompt)
            request = self.engine.add_request(
                prompt, priority=action.priority, **action.options(), **action.processor(), **action.drafts()
            )
            self.asked[request] = action
            if action.live:
                self.live[request] = prompt
            return
        name, number = action
        if name == "step":
            for _ in range(number):
                self.step()
        elif name == "abort" and self.asked:
            request = list(self.asked)[number % len(self.asked)]
            self.aborted |= {request} if self.engine.abort(request) else set()
        elif name in ("pause", "resume"):
            for request in list(self.asked)[number : number + 1]:
                getattr(self.engine, name)(request)
        elif self.live:
            sequence = self.live[list(self.live)[number % len(self.live)]]
            if name == "fork":
                self.forks.append((sequence.fork(), list(sequence.token_ids)))
            elif self.lm.pool.num_free > 2 * len(sequence):
                _ = sequence.logits

    def step(self) -> None:
        paused = {request.id for request in self.engine.scheduler if request.paused}
        events = self.engine.step()
        assert not paused & {event.request_id for event in events}, "who is paused says nothing"
        self.results.take(events)
        held = {page for page in range(self.lm.pool.num_pages) if self.lm.pool.references(page)}
        assert len(held) == self.lm.pool.num_pages - self.lm.pool.num_free
        assert self.lm.pool.spilled_bytes <= self.engine.scheduler.spill_bytes
        for request in self.engine.scheduler.waiting:
            if request.id not in self.live:
                assert not request.decoder.sequences[0].page_table, "who waits holds nothing"

    def finish(self) -> None:
        for request in self.asked:
            self.engine.resume(request)
        for _ in range(MAX_STEPS):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work
        assert self.results.ends.keys() | self.aborted == self.asked.keys()
        for request, asked in self.asked.items():
            self.check(request, asked)
        for sequence, tokens in self.forks:
            assert sequence.token_ids == tokens
            sequence.free()
        for sequence in self.live.values():
            sequence.free()
        assert all_free(self.lm) and self.lm.pool.spilled_bytes == 0

    def check(self, request: int, asked: Asked) -> None:
        tokens, expected = self.results.tokens.get(request, []), alone(asked)
        assert tokens == expected[: len(tokens)]
        if request in self.live:
            assert self.live[request].token_ids == PROMPTS[asked.prompt] + tokens
        if request in self.aborted:
            return
        end = self.results.ends[request]
        if end.reason != "error":
            assert tokens == expected
            assert asked.fails_at is None or asked.fails_at >= asked.new_tokens
        elif isinstance(end.error, OutOfPages):
            too_long = LENGTHS[asked.prompt] + asked.new_tokens > self.lm.pool.num_pages * self.lm.pool.page_size
            assert too_long or self.live, "there were pages for it, held by nobody else"
        else:
            assert isinstance(end.error, RequestFailed if asked.how == "raises" else NonFiniteLogits)
            assert len(tokens) == asked.fails_at
