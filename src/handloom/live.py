"""A sequence as an object: read its logits, append, rewind, fork, continue; and several of them in one step.

This module does not know requests or decoding modes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import PLACEHOLDER, Sequence
from handloom.cache.snapshot import restore_sequence, save_sequence
from handloom.engine.engine import MAX_LOGITS_BYTES, MAX_STEP_TOKENS
from handloom.errors import ContextOverflow, InvalidParam, InvalidPrompt, UnsupportedOption
from handloom.model.rope import rotary_at
from handloom.one_process import OneProcess
from handloom.ops import rotate
from handloom.prompts import check_embeddings, check_token_ids
from handloom.sampling.sampler import token_logprobs

MAX_FORKS = 65536

if TYPE_CHECKING:
    from handloom.lm import LM


class LiveSequence(OneProcess, Sequence, instead="save(path) and lm.restore(path), or fork()"):
    """A sequence of one model. `lm.generate(sequence)` continues it in place.

    Its pages go back to the pool when it is freed, closed as a context manager, or collected.
    """

    def __init__(self, lm: LM, source: Sequence) -> None:
        super().__init__(lm.pool, source.token_ids[source.num_embeddings :], source.embeddings)
        self.lm = lm
        self.num_computed, self.page_table, self.spilled = source.num_computed, source.page_table, source.spilled
        self.salt, self.private, self.evicted = source.salt, source.private, source.evicted
        self._logits: Tensor | None = None
        self._hooks_version = 0

    @property
    def logits(self) -> Tensor:
        """Next-token logits [vocab_size] float32 after the last token, the caller's to edit; computes what is pending.

        Raises InvalidPrompt for an empty sequence, OutOfPages.
        """
        return step(self.lm, [self])[0]

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of every token but the first, given those before it; computed anew at each reading.

        Costs a forward pass over the whole sequence on pages of its own: K and V held now are neither read nor changed,
        and evicted tokens are seen.
        Raises UnsupportedOption where it begins with embeddings, OutOfPages.
        """
        if self.num_embeddings:
            raise UnsupportedOption("the sequence begins with embeddings, which have no probability")
        runner, anew = self.lm.runner(), Sequence(self.pool, self.token_ids)
        at_once = max(1, min(MAX_STEP_TOKENS, MAX_LOGITS_BYTES // (4 * self.lm.spec.vocab_size)))
        logprobs: list[float] = []
        try:
            while anew.num_pending:
                count = min(anew.num_pending, at_once)
                logits = runner.forward([Work(anew, count, "all")], owners=[self])
                anew.num_computed += count
                targets = torch.tensor(anew.token_ids[anew.num_computed - count + 1 :][:count], device=logits.device)
                if len(targets):
                    logprobs += token_logprobs(logits[: len(targets)], targets, 0)[0]
        finally:
            anew.free()
        return logprobs

    @property
    def text(self) -> str:
        """The text of all its tokens, special ones spelled out. Raises InvalidPrompt without a tokenizer."""
        return self.lm.decode(self.token_ids[self.num_embeddings :])

    def append(self, token_ids: int | np.integer[Any] | Tensor | Seq[int]) -> None:
        """Add one token id (a tensor with one element, too) or several. Raises InvalidPrompt, ContextOverflow."""
        if isinstance(token_ids, Tensor) and token_ids.dim() == 0:
            token_ids = token_ids.unsqueeze(0)
        many = [token_ids] if isinstance(token_ids, int | np.integer) else token_ids
        ids = check_token_ids(many, self.lm.spec.vocab_size)
        self._check_room(len(ids))
        self.token_ids += ids
        self._logits = None

    def append_embeddings(self, values: Tensor) -> None:
        """Add embeddings [n, hidden_size] as the next n tokens; they can only stand before the first token id.

        Raises InvalidPrompt, ContextOverflow, UnsupportedOption after a token id.
        """
        if len(self) > self.num_embeddings:
            raise UnsupportedOption(
                "embeddings can only come before the first token id, and this sequence has token ids; start a new one "
                "with lm.sequence(embeddings), where the embeddings of ids may be among them"
            )
        values = check_embeddings(values, self.lm.spec.hidden_size).to(self.pool.device)
        self._check_room(len(values))
        self.embeddings = values if self.embeddings is None else torch.cat((self.embeddings, values))
        self.token_ids += [PLACEHOLDER] * len(values)
        self._logits = None

    def _check_room(self, num_tokens: int) -> None:
        if len(self) + num_tokens > self.lm.max_context:
            raise ContextOverflow(
                f"{len(self)} + {num_tokens} tokens exceed the context of {self.lm.max_context}; rewind, or start anew"
            )

    def rewind(self, num_tokens: int) -> None:
        """Take the last num_tokens tokens back. Raises InvalidParam."""
        super().rewind(num_tokens)
        self._logits = None

    def truncate_left(self, num_tokens: int) -> None:
        """Drop the first num_tokens tokens. What is left is a new sequence that begins at position 0.

        Its K and V held both the positions and the dropped tokens in them, so all of them are computed again when next
        needed, evicted ones too: it costs a forward pass over what is left. `remove` does not. Raises InvalidParam.
        """
        if not 0 <= num_tokens <= len(self):
            raise InvalidParam(f"cannot drop the first {num_tokens} tokens: the sequence has {len(self)}")
        if not num_tokens:
            return
        self.free()
        del self.token_ids[:num_tokens]
        if self.embeddings is not None:
            self.embeddings = self.embeddings[num_tokens:] if num_tokens < len(self.embeddings) else None
        self._logits = None

    @overload
    def fork(self) -> LiveSequence: ...

    @overload
    def fork(self, count: int) -> list[LiveSequence]: ...

    def fork(self, count: int | None = None) -> LiveSequence | list[LiveSequence]:
        """A second sequence with the same past, or a list of `count`; pages are shared until one of them writes there.

        Raises InvalidParam.
        """
        if count is None:
            child = LiveSequence(self.lm, super().fork())
            child._keep(self._known_logits)
            return child
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_FORKS:
            raise InvalidParam(f"cannot fork {count!r} times; expected an integer from 0 to {MAX_FORKS}")
        return [self.fork() for _ in range(count)]

    def kv(self, layer: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Copies of K (normed, rotated: as it is held) and V [stop - start, num_kv_heads, head_dim] of cached tokens.

        stop: num_computed if None. Raises InvalidParam, where one of them was evicted too.
        """
        stop = self.num_computed if stop is None else stop
        slots = self._slots(layer, start, stop)
        k, v = (pages.flatten(0, 1)[slots] for pages in self.pool.layers[layer])
        return k, v

    def set_kv(self, layer: int, start: int, k: Tensor | None = None, v: Tensor | None = None) -> None:
        """Put K, V or both [n, num_kv_heads, head_dim] in the place of those of tokens start..start + n.

        Tokens appended from now on attend to them; forks made before keep theirs. The last token is computed again when
        its logits are read, and what was set for it forgotten. A request that is preempted because the cache is full
        keeps what was set: see `Engine`. Raises InvalidParam, OutOfPages.
        """
        given = [values for values in (k, v) if values is not None]
        if not given:
            return
        stop = start + len(given[0])
        self._slots(layer, start, stop)
        pages = self.pool.layers[layer]
        for values in given:
            if tuple(values.shape) != (stop - start, *pages[0].shape[2:]):
                expected = [stop - start, *pages[0].shape[2:]]
                raise InvalidParam(f"K and V of layer {layer} have shape {list(values.shape)}; expected {expected}")
        first = self.cached_before(start)
        self.own(first, first + stop - start)
        self.private = True
        slots = self._slots(layer, start, stop)
        for into, new in zip(pages, (k, v), strict=True):
            if new is not None:
                into.view(-1, *into.shape[2:])[slots] = new.to(into)
        self._logits = None

    def evict(self, start: int, stop: int) -> None:
        """Take the K and V of computed tokens start..stop out of the cache. All tokens keep their positions.

        Whatever is computed from now on attends to what is left; pages that are left empty are freed. The tokens stay
        in token_ids and text, and `evicted` lists them. Forks share the gap, a saved sequence has it, `rewind` into
        it keeps what is before, `truncate_left` and `logprobs` compute all anew without it. The last token, which is
        computed again when its logits are read, is in the cache again then. Raises InvalidParam, OutOfPages,
        UnsupportedOption where a layer attends to a window, which is counted in the cache.
        """
        if any(layer.mixer.window is not None for layer in self.lm.spec.layers):
            raise UnsupportedOption(
                "this model has layers that attend to a window of the cache, which a gap would widen; "
                "take tokens out with their positions instead: sequence.remove(start, stop)"
            )
        super().evict(start, stop)
        self._logits = None

    def remove(self, start: int, stop: int) -> None:
        """Take computed tokens start..stop out of the sequence, so that those after them follow at once.

        Unlike `truncate_left` it computes nothing anew: K of the tokens after them is rotated back by stop - start
        positions, in float32 and rounded to the cache's dtype each time; V stays, and both still hold what these tokens
        saw. StreamingLLM (Xiao et al. 2023) is this, before each step. Raises InvalidParam, OutOfPages,
        UnsupportedOption for learned positions, which cannot be rotated.
        """
        model = self.lm.transformer
        if model.position_embedding is not None:
            raise UnsupportedOption(
                "this model adds learned positions to its hidden states, so K and V cannot move to others; "
                "sequence.truncate_left(n) computes them anew"
            )
        moved = self.num_cached - self.cached_before(stop) if 0 <= start < stop <= self.num_computed else 0
        super().remove(start, stop)
        self._logits = None
        if moved:
            slots = self.cached_slots(self.num_cached - moved, self.num_cached)
            back = torch.full((moved,), start - stop, device=self.pool.device)
            for layer, (k_pages, _) in zip(model.layers, self.pool.layers, strict=True):
                if layer.rope is not None:
                    k = k_pages.view(-1, *k_pages.shape[2:])
                    wide = k[slots].to(torch.promote_types(k.dtype, torch.float32))
                    k[slots] = rotate(wide, rotary_at(model.inv_freqs[layer.rope], back)).to(k)

    def _slots(self, layer: int, start: int, stop: int) -> Tensor:
        """Flat cache slots [stop - start] of computed tokens. Raises InvalidParam, OutOfPages."""
        if not 0 <= layer < len(self.pool.layers):
            raise InvalidParam(f"there is no layer {layer}; the model has {len(self.pool.layers)}, counted from 0")
        if not 0 <= start <= stop <= self.num_computed:
            raise InvalidParam(
                f"tokens {start} to {stop} have no K and V: {self.num_computed} of {len(self)} tokens are computed; "
                "reading logits computes the rest"
            )
        for first, end in self.evicted:
            if max(first, start) < min(end, stop):
                raise InvalidParam(f"tokens {first} to {end} were evicted and have no K and V; ask for others")
        self.bring_back()
        before = self.cached_before(start)
        return self.cached_slots(before, before + stop - start)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens, K and V to a safetensors file for `lm.restore(path)` of the same model. Raises OSError.

        What a preempted request has in host memory is brought back first, which raises OutOfPages where none is free.
        """
        self.bring_back()
        save_sequence(path, self, self.lm.transformer, name=self.lm.name, logits=self._known_logits)

    @property
    def _known_logits(self) -> Tensor | None:
        """Those after the last token, if they were computed, under the hooks that are open now."""
        return None if self.num_pending or self._hooks_version != self.lm.hooks.version else self._logits

    def _keep(self, logits: Tensor | None) -> None:
        self._logits, self._hooks_version = logits, self.lm.hooks.version

    def __repr__(self) -> str:
        return f"LiveSequence({len(self)} tokens, {self.num_computed} computed, of {self.lm!r})"

    def __enter__(self) -> LiveSequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __del__(self) -> None:
        if hasattr(self, "page_table"):
            self.free()


def restore(lm: LM, path: str | os.PathLike[str]) -> LiveSequence:
    """The sequence that was saved there; errors are those of `restore_sequence`."""
    source, logits = restore_sequence(path, lm.pool, lm.transformer, lm.max_context)
    sequence = LiveSequence(lm, source)
    sequence.private = True  # nobody else shall go on from what a file says
    sequence._keep(logits)
    return sequence


def logit_lens(lm: LM, sequence: LiveSequence) -> Tensor:
    """Logits [layers + 1, vocab_size] float32 that each layer's residual stream would give after the last token.

    The first row is that of the embeddings, the last the model's own; in between the final norm and the head are
    applied to a state they were not trained on (nostalgebraist 2020). Computes the last token again. Raises
    InvalidPrompt, OutOfPages.
    """
    points = ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"]
    with lm.capture(points, positions="last", sequence=sequence) as acts:
        step(lm, [sequence])
    model, seen = lm.transformer, acts.of(sequence)
    rows = torch.cat([seen[point] for point in seen])
    return model.ops.lm_head(rows, model.final_norm, model.head, model.spec.logits_softcap)


def step(lm: LM, sequences: Seq[LiveSequence]) -> Tensor:
    """Compute what is pending in all of them and return their next-token logits [n, vocab_size] float32.

    One forward pass, or several of at most MAX_STEP_TOKENS tokens. What other sequences or requests have computed of
    the same first tokens is taken over, unless hooks are open, which would not see it.

    Raises InvalidPrompt, OutOfPages.
    """
    _check(lm, sequences)
    for sequence in sequences:
        if sequence._known_logits is None:
            sequence.recompute_last()
        if sequence.num_pending > lm.pool.page_size and not lm.hooks:
            sequence.adopt_prefix()
    runner = lm.runner()
    while pending := [sequence for sequence in sequences if sequence.num_pending]:
        works: list[Work] = []
        budget = MAX_STEP_TOKENS
        for sequence in pending:
            count = min(sequence.num_pending, budget)
            works.append(Work(sequence, count, "last" if count == sequence.num_pending else "none"))
            budget -= count
            if not budget:
                break
        rows = iter(runner.forward(works))
        for sequence, work in zip(pending, works, strict=False):
            sequence.num_computed += work.num_tokens
            if not lm.hooks:
                sequence.publish()
            if work.num_rows:
                sequence._keep(next(rows).clone())
    return torch.stack(cast(list[Tensor], [sequence._logits for sequence in sequences]))


def _check(lm: LM, sequences: Seq[LiveSequence]) -> None:
    """Raises InvalidPrompt for what cannot step together."""
    if isinstance(sequences, LiveSequence) or not sequences:
        raise InvalidPrompt("step takes a list of one or more sequences of this model")
    for i, sequence in enumerate(sequences):
        if not isinstance(sequence, LiveSequence) or sequence.pool is not lm.pool:
            raise InvalidPrompt(f"item {i} is not a sequence of this model; make one with lm.sequence(...)")
        if not len(sequence):
            raise InvalidPrompt(f"sequence {i} is empty, so it has no logits; append a token to it first")
    if len({id(sequence) for sequence in sequences}) < len(sequences):
        raise InvalidPrompt("the same sequence is there twice; fork it")
