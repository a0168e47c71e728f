"""What a request asked to see of the model beside its tokens: hidden states, attention weights, K and V.

Built on the hooks of `handloom.model.hooks`; other requests of a step are not touched.

This module does not know how tokens are chosen, or in which layout a caller wants these.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.cache.sequence import Sequence
from handloom.decoding.by_value import ByValue
from handloom.model.hooks import PATTERN, Activations, Captured, Hook
from handloom.sampling.params import GenerationParams

KeysAndValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Seen(ByValue):
    """One step of one sequence, n tokens that were computed for it: those of the prompt at first, then one.

    hidden_states: what enters each layer, and what the head multiplies: layers + 1 tensors [n, hidden_size];
    attentions: of each layer [num_heads, n, context], zero for tokens that a window hides. In the model's dtype.
    """

    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    def zeros(self) -> Seen:
        """The same of a sequence where there is nothing to see."""
        parts = (self.hidden_states, self.attentions)
        return Seen(*(None if part is None else tuple(map(torch.zeros_like, part)) for part in parts))

    @staticmethod
    def stacked(each: Seq[Seen]) -> Seen:
        """Those of several sequences as one, each tensor with a first dimension for them."""

        def stack(parts: Seq[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
            present = [part for part in parts if part is not None]
            return tuple(torch.stack(column) for column in zip(*present, strict=True)) if present else None

        return Seen(stack([seen.hidden_states for seen in each]), stack([seen.attentions for seen in each]))


NOTHING = Seen(None, None)


class Internals:
    """The hook of a request's works, and what it saw since the last token was chosen."""

    def __init__(self, params: GenerationParams, prompt: Sequence) -> None:
        blocks = [f"blocks.{i}." for i in range(len(prompt.pool.layers))]
        self._states = [*(block + "hook_resid_pre" for block in blocks), "ln_final.hook_normalized"]
        self._patterns = [block + PATTERN for block in blocks]
        self._states = self._states if params.output_hidden_states else []
        self._patterns = self._patterns if params.output_attentions else []
        self._acts = Activations()
        self._start: int | None = None  # where the tokens of the next step begin; None before anything was planned

    def hook(self, sequence: Sequence) -> Hook | None:
        """For a work of this sequence; None where nothing was asked for."""
        if not self._states and not self._patterns:
            return None
        if self._start is None:
            self._start = sequence.num_computed
        return Hook(frozenset([*self._states, *self._patterns]), self._acts.add, False, None)

    def take(self, sequences: Seq[Sequence]) -> list[Seen]:
        """What was seen of each sequence's new tokens since the last call; of tokens computed twice, the later values.

        Where the owner of a sequence has rewound it or computed some of it meanwhile, that is what is left of them.
        """
        if self._start is None:
            return [NOTHING] * len(sequences)
        seen = [self._of(sequence, self._start) for sequence in sequences]
        self._acts, self._start = Activations("last"), len(sequences[0])
        return seen

    def _of(self, sequence: Sequence, start: int) -> Seen:
        captured = self._acts.of(sequence)
        new = range(min(start, len(sequence) - 1), len(sequence))

        def read(points: list[str], dim: int) -> tuple[Tensor, ...] | None:
            return tuple(_of_tokens(captured, point, new, dim) for point in points) if points else None

        return Seen(read(self._states, 0), read(self._patterns, 1))


def _of_tokens(captured: Captured, point: str, tokens: range, dim: int) -> Tensor:
    """The values of these tokens at a point, whatever else was computed."""
    values, last = captured[point], {at: row for row, at in enumerate(captured.positions(point).tolist())}
    rows = [last[at] for at in tokens if at in last]
    if rows == list(range(values.shape[dim])):
        return values
    return values.index_select(dim, torch.tensor(rows, device=values.device))


def keys_and_values(sequence: Sequence) -> KeysAndValues:
    """Copies of each layer's K (rotated, as it is held) and V [n, num_kv_heads, head_dim] of the cached tokens."""
    sequence.bring_back()
    count, page_size = sequence.num_cached, sequence.pool.page_size
    table = torch.tensor(sequence.page_table[: -(-count // page_size)], dtype=torch.int64, device=sequence.pool.device)
    return [
        (k_pages[table].flatten(0, 1)[:count], v_pages[table].flatten(0, 1)[:count])
        for k_pages, v_pages in sequence.pool.layers
    ]
