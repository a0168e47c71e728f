"""A conversation whose KV cache is kept between turns.

Every turn renders all messages anew, keeps of the live sequence what the new ids begin with, and appends
the rest. Whatever a template does to old messages, and however an answer's own tokens are split when they
come back as text, the ids are therefore those of a fresh start; only the tokens that differ are computed.

This module does not know terminals, or what a chat template looks like.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from handloom.collect import Collector
from handloom.engine import Engine
from handloom.errors import ContextOverflow, UnsupportedOption
from handloom.live import LiveSequence
from handloom.lm import LM
from handloom.output import Output, Piece
from handloom.sampling.options import as_mapping

Message = dict[str, Any]


class Conversation:
    """Messages exchanged with one model.

    system: the system message; may be changed between turns. template_options: variables of the chat
    template (`enable_thinking=False`). output: the last answer; num_reused: how many tokens of its prompt
    were in the cache already.
    """

    def __init__(self, lm: LM, system: str | None = None, **template_options: Any) -> None:
        self.lm, self.system, self.template_options = lm, system, template_options
        self.output: Output | None = None
        self.num_reused = 0
        self._turns: list[Message] = []
        self._sequence: LiveSequence | None = None
        self._engine: _Stoppable | None = None
        self._answer: Generator[Piece] | None = None

    @property
    def messages(self) -> list[Message]:
        """All messages so far, the system message first; a copy."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *map(dict, self._turns)]

    @property
    def num_tokens(self) -> int:
        """Tokens in the live sequence, those of the last answer included."""
        return 0 if self._sequence is None else len(self._sequence)

    def check(self, /, **options: Any) -> None:
        """Raises what `send` would raise at once for a short message with these options."""
        ids = self.lm.render_chat([*self.messages, {"role": "user", "content": "Hi"}], **self.template_options)
        with self.lm.sequence(ids) as sequence:
            try:
                Engine(self.lm).prepare(sequence, self._with_limit(sequence, options))
            except UnsupportedOption as error:
                raise UnsupportedOption(f"a conversation keeps one sequence from turn to turn: {error}") from None

    def send(self, text: str, /, **options: Any) -> Iterator[Piece]:
        """Say something and stream the answer; `options` are those of `LM.generate`.

        The answer ends where the context does, if not earlier. Ended early, by `stop`, by leaving the loop
        or by the next `send`, what there is of it stays in the conversation; an answer that failed, or that
        was stopped before its first character, leaves no trace, nor does its question.

        Raises: ContextOverflow where the conversation leaves no room for an answer; ChatTemplateError,
        InvalidPrompt, InvalidParam, UnsupportedOption; while running what `LM.stream` raises.
        """
        self._end_answer()
        self._engine = _Stoppable(self.lm)
        collector = Collector(self._engine)
        question = {"role": "user", "content": text}
        sequence = self._continue(self.lm.render_chat([*self.messages, question], **self.template_options))
        collector.add(sequence, **self._with_limit(sequence, options))
        self._answer = self._pieces(question, collector)
        return self._answer

    def stop(self) -> None:
        """End the running answer after the step it is in. May be called from a signal handler or another thread."""
        if self._engine is not None:
            self._engine.stopping = True

    def reset(self) -> None:
        """Forget every turn and free the cache; the system message stays."""
        self._end_answer()
        self._turns.clear()
        self.output, self.num_reused = None, 0
        if self._sequence is not None:
            self._sequence.free()
            self._sequence = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()

    def _continue(self, ids: list[int]) -> LiveSequence:
        """The live sequence with exactly these ids, keeping the K and V of what they begin with."""
        if len(ids) >= self.lm.max_context:
            raise ContextOverflow(
                f"the conversation has {len(ids)} tokens and the context holds {self.lm.max_context}, the answer "
                "included; reset the conversation, or load the model with a larger max_context"
            )
        if self._sequence is None:
            self._sequence, self.num_reused = self.lm.sequence(ids), 0
            return self._sequence
        sequence = self._sequence
        kept = _common_prefix(sequence.token_ids, ids)
        sequence.rewind(len(sequence) - kept)
        sequence.append(ids[kept:])
        self.num_reused = min(sequence.num_computed, len(ids) - 1)  # the last one runs again, for its logits
        return sequence

    def _with_limit(self, sequence: LiveSequence, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with as many new tokens as there is room for where they say nothing, and no more."""
        pool = self.lm.pool  # the sequence can grow to the context, or to what the cache has free
        capacity = min(self.lm.max_context, (len(sequence.page_table) + pool.num_free) * pool.page_size)
        room, limit = max(1, capacity - len(sequence)), options.get("max_new_tokens")
        if type(limit) is int:
            return {**options, "max_new_tokens": min(limit, room)}
        said = {**as_mapping(options.get("generation_config")), **options}
        if any(said.get(name) is not None for name in ("max_new_tokens", "max_length")):
            return options
        return {**options, "max_new_tokens": room}

    def _pieces(self, question: Message, collector: Collector) -> Generator[Piece]:
        output = collector.outputs[0]
        try:
            for piece in collector.pieces():
                if piece.error is not None:
                    raise piece.error
                yield piece
        finally:
            collector.engine.close()
            self.output = output
            if output.error is None and (output.text or output.finish_reason != "aborted"):
                self._turns += [question, {"role": "assistant", "content": output.text}]

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


class _Stoppable(Engine):
    """An engine that can be told to run out of work."""

    stopping = False

    @property
    def has_work(self) -> bool:
        return not self.stopping and super().has_work


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of what two lists begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
