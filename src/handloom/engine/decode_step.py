"""One decode step as a function of tensors that stay where they are: a token of each sequence in, the next one out.

    ids, positions, context lengths, draw counters ──> model ──> choice ──> token ids out
         ^                                                         │
         └──────────────── the next step's ────────────────────────┘

What the host says for a step is one number per row: the page that the row's K and V go to, -1 where the row is over or
was never there. It writes nothing then and its token means nothing. So the host may queue a step before it has read the
tokens of the one before.

This module does not know requests, graphs, or when tokens are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.cache.pages import PagePool
from handloom.model.batch import ForwardBatch
from handloom.model.transformer import Transformer
from handloom.sampling.on_device import signed

NOWHERE = -1


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A sequence with one pending token, at the beginning of a run of decode steps.

    seed: in [0, 2^64); counter: what the draw of the next token is keyed by; temperature: 0 for a row that takes the
    most likely token; top_k 0, top_p 1 and min_p 0 are off.
    """

    token_id: int
    position: int
    page_table: Sequence[int]
    context_len: int
    seed: int
    counter: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


class DecodeStep:
    """The tensors of `rows` sequences with up to `width` pages each, and the step over them.

    Between steps `integers` [5, rows] int64 are token ids, positions, context lengths (this token included), draw
    counters and seeds; `floats` [3, rows] float32 are temperatures, top_p and min_p. `pages` [rows] int64 is the host's
    for the step that comes. After it `out` [2, rows] float64 holds the token ids, -1 where there is none to choose, and
    their log-probabilities under the model's own distribution (both are exact in float64).
    """

    def __init__(self, transformer: Transformer, pool: PagePool, rows: int, width: int) -> None:
        self.transformer, self.pool, self.rows, self.width = transformer, pool, rows, width
        device = pool.device
        self.integers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.floats = torch.zeros(3, rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.pages = torch.full((rows,), NOWHERE, dtype=torch.int64, device=device)
        self.out = torch.zeros(2, rows, dtype=torch.float64, device=device)
        self._places = torch.arange(rows + 1, device=device)

    @property
    def nbytes(self) -> int:
        tensors = (self.integers, self.floats, self.top_k, self.page_table, self.pages, self.out, self._places)
        return sum(tensor.nbytes for tensor in tensors)

    def beginning(self, rows: Sequence[DecodeRow]) -> list[tuple[Tensor, Tensor]]:
        """(values in host memory, tensor they go to) that let these sequences, at most self.rows, begin."""
        integers = torch.zeros(5, self.rows, dtype=torch.int64, device="cpu")
        columns = [(r.token_id, r.position, r.context_len, r.counter, signed(r.seed)) for r in rows]
        integers[:, : len(rows)] = torch.tensor(columns, dtype=torch.int64, device="cpu").T
        integers[2, len(rows) :] = 1
        floats = torch.zeros(3, self.rows, dtype=torch.float32, device="cpu")
        floats[:, : len(rows)] = torch.tensor(
            [(r.temperature, r.top_p, r.min_p) for r in rows], dtype=torch.float32, device="cpu"
        ).T
        top_k = torch.zeros(self.rows, dtype=torch.int32, device="cpu")
        top_k[: len(rows)] = torch.tensor([r.top_k for r in rows], device="cpu")
        tables = torch.zeros(self.rows, self.width, dtype=torch.int64, device="cpu")
        for table, row in zip(tables[: len(rows)], rows, strict=True):
            pages = row.page_table[: self.width]  # those that were taken ahead may be more
            table[: len(pages)] = torch.tensor(pages, device="cpu")
        return [(integers, self.integers), (floats, self.floats), (top_k, self.top_k), (tables, self.page_table)]

    @torch.no_grad()
    def run(self, *, drawn: bool, cut: bool) -> None:
        """The step. drawn: whether any row draws its token; cut: whether any row has top-k, top-p or min-p on."""
        token_ids, positions, context_lens, counters, seeds = self.integers
        temperature, top_p, min_p = self.floats
        alive = self.pages >= 0
        context_lens.copy_(torch.where(alive, context_lens, 1))
        at, page_size = context_lens - 1, self.pool.page_size
        self.page_table.scatter_(1, (at // page_size)[:, None], self.pages.clamp(min=0)[:, None])
        batch = ForwardBatch(
            input_ids=token_ids,
            positions=positions,
            cu_seqlens=self._places,
            context_lens=context_lens,
            page_table=self.page_table,
            slot_mapping=torch.where(alive, self.pages * page_size + at % page_size, NOWHERE),
            logits_rows=self._places[:-1],
            query_lens=(1,) * self.rows,
        )
        logits = self.transformer.forward(batch, self.pool.layers)
        chooser = self.transformer.backend.chooser
        choice = chooser.draw(
            logits,
            seeds if drawn else None,
            counters if drawn else None,
            temperature if drawn else None,
            cuts=chooser.find_cuts(logits, temperature, self.top_k, top_p, min_p) if cut else None,
        )
        self.out[0].copy_(choice.token_ids)
        self.out[1].copy_(choice.logprobs)
        token_ids.copy_(choice.token_ids.clamp_(min=0))  # one that is not there must not be looked up
        self.integers[1:4].add_(alive)  # `+=` would copy it onto itself
