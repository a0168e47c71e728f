"""Diverse beam search: groups of beams, one after the other in each step, that keep away from each other's tokens.

Vijayakumar et al., "Diverse beam search: decoding diverse solutions from neural sequence models", 2016 (arXiv
1610.02424), with their Hamming diversity: what groups before have chosen at this step loses diversity_penalty for each
beam that chose it. Every group is a beam search of its own, over num_beams / num_beam_groups beams. The outputs are the
best of all groups. Tokens and scores are those of the last transformers that had it, 4.56.

A group that is over gives its pages back. As there, it still counts as choosing pad_token_id at every step.

This module does not know the scheduler, constraints, or how a search in one group goes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from handloom.cache.sequence import Sequence
from handloom.decoding.beams import Beams, Ended, Link, starting_totals
from handloom.decoding.branches import Branches
from handloom.decoding.hypotheses import Hypotheses, best_of
from handloom.sampling.params import GenerationParams
from handloom.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Group:
    """totals [size]: the sums of its beams' log-probabilities. parents, links: what its beams go on from, and with."""

    hypotheses: Hypotheses
    totals: Tensor
    parents: list[int] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    over: bool = False


class GroupBeamDecoder(Beams):
    """Searches params.num_return_sequences outputs for a sequence, which it owns."""

    def __init__(
        self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None, branches: Branches
    ) -> None:
        super().__init__(sequence, params, tokenizer, branches)
        self._size = params.num_beams // params.num_beam_groups
        totals = starting_totals(self._size, sequence.pool.device)
        self._groups = [_Group(Hypotheses(self._size, params), totals) for _ in range(params.num_beam_groups)]

    def _step(self, rows: Tensor) -> bool:
        params, size, first = self.params, self._size, 0
        kept = rows.new_zeros(params.num_beams, rows.shape[1], dtype=torch.float32) if params.output_scores else None
        raw = rows.new_zeros(params.num_beams, rows.shape[1]) if params.output_logits else None
        taken: list[int] = []
        for number, group in enumerate(self._groups):
            if group.over:
                taken += [] if params.pad_token_id is None else [params.pad_token_id] * size
                continue
            leaves = [0] if self._length == 0 else list(range(first, first + size))
            first += size
            scores = self._shaped(rows[leaves], leaves, taken)
            beams = slice(number * size, (number + 1) * size)
            if kept is not None:
                kept[beams] = scores
            if raw is not None:
                raw[beams] = rows[leaves]
            self._search(group, number, rows, leaves, scores)
            taken += [link.token_id for link in group.links]
        self._keep(kept, raw)
        self._length += 1
        running = [group for group in self._groups if not group.over]
        if not running:
            return False
        self._run_on(
            [parent for group in running for parent in group.parents],
            [link for group in running for link in group.links],
        )
        return not self._ends(running)

    def _leaf_of_each_beam(self) -> Seq[int | None]:
        leaves = itertools.count()
        alive = [not group.over for group in self._groups for _ in range(self._size)]
        return [(next(leaves) if self._length else 0) if runs else None for runs in alive]

    def _search(self, group: _Group, number: int, rows: Tensor, leaves: list[int], scores: Tensor) -> None:
        """One step of one group, given the scores [size or 1, vocab_size] of its leaves after the rules."""
        eos, size = self.params.eos_token_id, self._size
        totals = scores.expand(size, -1) + group.totals[:, None]
        if group.hypotheses.ended and bool(totals.amax().isneginf()):
            group.over, group.parents, group.links = True, [], []  # what was found is all there is
            return
        self._check_left(totals)
        best, beams, token_ids = self._likeliest(totals)
        parents = [leaves[beam] if len(leaves) > 1 else leaves[0] for beam in beams]
        links = self._linked(rows, parents, [number * size + beam for beam in beams], token_ids)
        going_on: list[int] = []
        for rank, (link, total) in enumerate(zip(links, best.tolist(), strict=True)):
            if link.token_id not in eos:
                going_on.append(rank)
            elif rank < size:
                group.hypotheses.add(total, self._length + 1, link, "eos")
        del going_on[size:]
        group.totals = best[going_on]
        group.parents, group.links = [parents[rank] for rank in going_on], [links[rank] for rank in going_on]
        group.over = group.hypotheses.cannot_improve(float(best[0]), self._length + 1)

    def _ends(self, running: list[_Group]) -> bool:
        """Whether all ends here; then what runs competes as it is."""
        reason = self._reason_for_all()
        if reason is not None:
            for group in running:
                for link, total in zip(group.links, group.totals.tolist(), strict=True):
                    group.hypotheses.add(total, self._length, link, reason)
        return reason is not None

    def _best(self) -> list[Ended | None]:
        return best_of([own for group in self._groups for own in group.hypotheses.ended], self.num_outputs)
