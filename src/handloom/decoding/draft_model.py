"""Drafts by a smaller model with the same tokens: `assistant_model`.

The drafts of all requests that have the same assistant are made together, one token of each in a forward pass. They are
chosen by the rules, and where tokens are drawn by the very noise, that the request's own tokens will be chosen by.

Drafts are a luxury: where the assistant's cache is full, no memory is left, or a long prompt is not in it yet, there
are none.

This module does not know how drafts are checked, or how long they should be.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.errors import HandloomError, InvalidParam, OutOfPages, UnsupportedOption
from handloom.model.spec import ModelSpec
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import RequestRules, Row
from handloom.sampling.sampler import choose
from handloom.text.tokenizer import Tokenizer

logger = logging.getLogger("handloom")

MAX_PASS_TOKENS = 512  # in one forward pass


class Forward(Protocol):
    """What runs forward passes; see `handloom.engine.runner`."""

    def run(self, works: Iterable[Work]) -> tuple[Tensor, Mapping[int, HandloomError]]: ...


@runtime_checkable
class Assistant(Protocol):
    """What drafting needs of a loaded model; `handloom.LM` is one."""

    tokenizer: Tokenizer | None
    max_context: int
    pool: PagePool

    @property
    def spec(self) -> ModelSpec: ...

    def runner(self) -> Forward: ...


def check_assistant(assistant: Any, prompt: Sequence, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Raises InvalidParam unless the assistant may draft for the model that these belong to, UnsupportedOption for a
    prompt that begins with embeddings."""
    if prompt.num_embeddings:
        raise UnsupportedOption("assistant_model drafts from token ids, and the prompt begins with embeddings")
    if not isinstance(assistant, Assistant):
        raise InvalidParam(
            f"assistant_model is {type(assistant).__name__}; expected an LM: load it with LM.from_pretrained"
        )
    if assistant.pool is prompt.pool:
        raise InvalidParam(
            "assistant_model is the model itself, which would only do its work twice; give a smaller one"
        )
    if assistant.spec.vocab_size != vocab_size:
        raise InvalidParam(
            f"assistant_model has a vocabulary of {assistant.spec.vocab_size} tokens, the model one of {vocab_size}; a "
            "draft model needs the same tokenizer"
        )
    theirs = assistant.tokenizer
    if (
        tokenizer is not None
        and theirs is not None
        and tokenizer is not theirs
        and tokenizer.fingerprint != theirs.fingerprint
    ):
        raise InvalidParam(
            "assistant_model has another tokenizer: some of its tokens have other ids; a draft model needs the same one"
        )


@dataclass(slots=True)
class ModelDrafter:
    """One request's sequence in the cache of the assistant, which lags behind the request's own."""

    assistant: Assistant
    params: GenerationParams
    prompt_length: int
    salt: str
    _agreed: int = field(init=False, default=0)  # of its first tokens, those that are the request's
    _sequence: Sequence = field(init=False)
    _rules: RequestRules = field(init=False)

    def __post_init__(self) -> None:
        # what the caller gave to be called is about the output, not about tokens that may come
        self.params = replace(
            self.params, logits_processor=(), prefix_allowed_tokens_fn=None, output_scores=True, output_logits=False,
            logprobs=None,
        )  # fmt: skip
        self._sequence = Sequence(self.assistant.pool)
        self._sequence.salt = self.salt
        self._rules = RequestRules(self.params, self.prompt_length)

    def most(self, num_tokens: int) -> int:
        """How many tokens it can draft after a text of so many."""
        return max(0, self.assistant.max_context - num_tokens)

    @property
    def num_pending(self) -> int:
        return self._sequence.num_pending

    def follow(self, token_ids: Seq[int]) -> None:
        """Go on from these."""
        own, start = self._sequence, min(self._agreed, len(token_ids))
        while start < min(len(own), len(token_ids)) and own.token_ids[start] == token_ids[start]:
            start += 1
        own.rewind(len(own) - start)
        own.token_ids += token_ids[start:]
        self._agreed = len(own)
        own.recompute_last()
        if not own.num_computed:
            own.adopt_prefix()

    def work(self, room: int) -> Work:
        """What runs next, at most `room` tokens. Raises OutOfPages."""
        own = self._sequence
        count = min(own.num_pending, room)
        own.grow(own.num_computed + count)
        return Work(own, count, "last" if count == own.num_pending else "none")

    def ran(self, work: Work) -> None:
        self._sequence.num_computed += work.num_tokens
        self._sequence.publish()

    def row(self) -> Row:
        return Row(self.params, self._sequence.token_ids, self.prompt_length, self._rules)

    def append(self, token_id: int) -> None:
        self._sequence.append(token_id)

    def close(self) -> None:
        self._sequence.free()


@dataclass(slots=True)
class Wanted:
    """At most `most` tokens that a drafter shall draft after these; they come to `drafted`.

    error: what went wrong in a hook on its assistant.
    """

    drafter: ModelDrafter
    token_ids: Seq[int]
    most: int
    drafted: list[int] = field(default_factory=list)
    error: HandloomError | None = None


def draft_by_model(assistant: Assistant, wanted: Seq[Wanted]) -> int:
    """Draft for requests that have this assistant, together; returns how many forward passes that took."""
    runner, passes, going = assistant.runner(), 0, [*wanted]
    for each in wanted:
        each.drafter.follow(each.token_ids)
    try:
        while going:
            going = [each for each, token in _next_tokens(runner, going) if _goes_on(each, token)]
            passes += 1
    except torch.OutOfMemoryError:
        logger.warning("no memory for a step of the assistant_model: %d drafts end early", len(going))
    return passes


def _forward(runner: Forward, wanted: Seq[Wanted]) -> tuple[list[Wanted], Tensor]:
    """Run pending tokens of as many drafters as there is room for, those with the fewest first. Returns those that have
    none left, and their rows of logits."""
    works: list[Work] = []
    running: list[Wanted] = []
    room = MAX_PASS_TOKENS
    for each in sorted(wanted, key=lambda each: each.drafter.num_pending):
        try:
            if room:
                works.append(each.drafter.work(room))
                running.append(each)
                room -= works[-1].num_tokens
        except OutOfPages:
            each.drafter.close()
    if not works:
        return [], torch.empty(0, dtype=torch.float32, device="cpu")
    logits, errors = runner.run(works)
    ready: list[Wanted] = []
    rows: list[int] = []
    row = 0
    for at, (each, work) in enumerate(zip(running, works, strict=True)):
        each.error = errors.get(at)
        if each.error is None:
            each.drafter.ran(work)
            ready += [each] * work.num_rows
            rows += [row] * work.num_rows
        row += work.num_rows
    return ready, logits if len(rows) == len(logits) else logits[rows]


def _next_tokens(runner: Forward, wanted: Seq[Wanted]) -> list[tuple[Wanted, tuple[int, float]]]:
    """The next token of each draft that goes on, and how likely it is."""
    ready, logits = _forward(runner, wanted)
    if not ready:
        return []
    choice = choose(logits, [each.drafter.row() for each in ready])
    found: list[tuple[Wanted, tuple[int, float]]] = []
    for at, each in enumerate(ready):
        scores = choice.scores[at]
        if choice.errors[at] is None and scores is not None:
            token = choice.token_ids[at]
            found.append((each, (token, float(scores.softmax(dim=-1)[token]))))
    return found


def _goes_on(each: Wanted, token: tuple[int, float]) -> bool:
    """Take a token into a draft; whether another may follow."""
    token_id, probability = token
    params = each.drafter.params
    each.drafted.append(token_id)
    if len(each.drafted) >= each.most or token_id in params.eos_token_id:
        return False
    if probability < params.assistant_confidence_threshold:
        return False
    each.drafter.append(token_id)
    return True
