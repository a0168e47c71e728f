"""Token healing: the end of the prompt is cut into tokens anew, as the model would have gone on.

A prompt that ends in the middle of a word ends with a token that the model has rarely seen before what follows
("http" ":" before "//", which has a token "://"). So the last tokens are taken back, and the most likely one that has
their text, or begins with it, takes their place; the one that was there gets 1.0 on top of its score. What comes of it
is the prompt: whatever decodes then finds it as if it had been given, and `text` begins with what it added.

This is transformers' `heal_tokens` (by P. Mainali, after Guidance's), which takes one token back. Here it is as many as
some token covers and goes past, at most MAX_BACK; of these, the first may stay and the rest be healed. See
docs/generate.md for what else is different.

This module does not know which decoder comes after it, or how a tokenizer makes tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Decoder, Event, FinishedEvent, HealedEvent
from handloom.errors import NonFiniteLogits
from handloom.sampling.params import GenerationParams
from handloom.text.token_bytes import Extensions

MAX_BACK = 4
FAVOUR = 1.0


def count_to_heal(token_ids: Seq[int], extensions: Extensions, *, has_before: bool = False) -> int:
    """How many of the last of a prompt's token ids [n] some token covers and goes past, at most MAX_BACK; 0 for none.

    The first stays, unless there is something before it.
    """
    counts = range(min(MAX_BACK, len(token_ids) - (not has_before)), 0, -1)
    return next((count for count in counts if len(_candidates(token_ids[-count:], extensions)) > 1), 0)


class HealingDecoder:
    """Heals the last `count` tokens of a sequence, which it owns; then `make(params)` is the request's decoder."""

    def __init__(
        self,
        sequence: Sequence,
        params: GenerationParams,
        extensions: Extensions,
        count: int,
        make: Callable[[GenerationParams], Decoder],
    ) -> None:
        self.sequence, self.params, self.num_outputs = sequence, params, params.num_return_sequences
        self.max_length = len(sequence) + params.max_new_tokens
        self.healed: Decoder | None = None  # what decodes from now on
        self._extensions, self._make = extensions, make
        self._num_before = len(sequence)
        self._left = sequence.token_ids[-count:]  # taken back, and nothing in their place yet
        self._taken = extensions.text_of(self._left)
        sequence.rewind(count)
        self._start = len(sequence)

    @property
    def sequences(self) -> Seq[Sequence]:
        return (self.sequence,)

    def plan(self) -> Seq[Work]:
        self.sequence.recompute_last()
        return [Work(self.sequence, self.sequence.num_pending, "last")]

    def advance(self, logits: Tensor) -> list[Event]:
        """Put a token in the place of some that were taken back, given logits [1, vocab_size]."""
        candidates = [id_ for id_ in _candidates(self._left, self._extensions) if id_ < logits.shape[1]]
        scores = logits[-1, torch.tensor(candidates, device=logits.device)].float()
        scores[candidates.index(self._left[0])] += FAVOUR
        if not bool(scores.amax().isfinite()):
            error = NonFiniteLogits(
                f"the model's logits for the token at position {len(self.sequence)}, of those that could heal the "
                "prompt, contain NaN or infinity; check the weights and the dtype"
            )
            return [FinishedEvent("error", error=error)]
        chosen = candidates[int(scores.argmax())]
        self.sequence.append(chosen)
        self._left = self._left[1:] if chosen == self._left[0] else []
        while self._left and len(_candidates(self._left, self._extensions)) == 1:
            self.sequence.append(self._left.pop(0))
        return [] if self._left else [self._finish()]

    def close(self) -> None:
        if self.healed is None:
            self.sequence.free()
        else:
            self.healed.close()

    def _finish(self) -> HealedEvent:
        params, sequence = self.params, self.sequence
        shorter = self._num_before - len(sequence)
        if params.max_length is not None:
            params = replace(params, max_new_tokens=params.max_length - len(sequence))
        if params.min_new_tokens:
            params = replace(params, min_length=max(0, params.min_length - shorter))
        if params.output_hidden_states or params.output_attentions or params.penalty_alpha:
            sequence.free()  # what is looked at are all tokens of the prompt
        self.healed = self._make(replace(params, token_healing=False))
        text = self._extensions.text_of(sequence.token_ids[self._start :])
        return HealedEvent(sequence.token_ids.copy(), text[len(self._taken) :].decode())


def _candidates(taken: Seq[int], extensions: Extensions) -> list[int]:
    """What may come where these were taken back: a token that begins with their text, or the first of them again."""
    found = extensions.of(extensions.text_of(taken)) if extensions.are_text(taken) else []
    return found if taken[0] in found else [*found, taken[0]]
