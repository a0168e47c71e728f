"""Beam search and beam sampling: the best of many outputs by the sum of their log-probabilities.

Every step takes the log-probabilities of `num_beams` running sequences, reshapes them by the rules, adds what each
sequence has so far, and looks at the best (or, sampling, at as many drawn) of all continuations together. Those that
end compete for `num_beams` places by score / length^length_penalty; the best of the others run on. early_stopping: True
ends once all places are taken; False, where the best that runs would not make it at its length now; "never", where it
would not at any length. This follows transformers' `_beam_search` to the order of operations, so ties fall alike.
Sampling without replacement is Gumbel-top-k (Kool et al., "Stochastic beams and where to find them", 2019), unless
rng="torch".

This module does not know the scheduler or other modes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.cache.sequence import Sequence
from handloom.decoding.beams import NOWHERE, Beams, Ended, Link, starting_totals
from handloom.decoding.branches import Branches
from handloom.decoding.decoder import FinishReason
from handloom.decoding.sample import criteria_met, output_text
from handloom.sampling.params import GenerationParams
from handloom.sampling.rng import sample_without_replacement
from handloom.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Candidates:
    """The continuations of one step, k of them: sums of log-probabilities [k], and for each its link, the leaf it goes
    on from, and why it ends, if it does."""

    totals: Tensor
    links: list[Link]
    leaves: list[int]
    reasons: list[FinishReason | None]


class BeamDecoder(Beams):
    """Searches params.num_return_sequences outputs for a sequence, which it owns."""

    def __init__(
        self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None, branches: Branches
    ) -> None:
        super().__init__(sequence, params, tokenizer, branches)
        count, device = params.num_beams, sequence.pool.device
        self._totals = starting_totals(count, device)
        self._ended: list[Ended | None] = [None] * count
        self._ended_scores = torch.full((count,), NOWHERE, dtype=torch.float32, device=device)
        self._can_improve = True

    def _step(self, rows: Tensor) -> bool:
        scores = self._shaped(rows, range(len(rows))).expand(self.params.num_beams, -1)
        self._keep(scores, rows)
        found = self._candidates(rows, scores)
        totals = self._go_on(found)
        self._take_in(found)
        self._length += 1
        return self._can_go_on(totals, found)

    def _best(self) -> list[Ended | None]:
        scores: list[float] = self._ended_scores.tolist()
        last = scores[self.num_outputs - 1]
        return [
            ended and Ended(score, ended.last, ended.reason)
            for score, ended in zip(scores, self._ended, strict=True)
            if score >= last
        ]

    def _candidates(self, rows: Tensor, scores: Tensor) -> _Candidates:
        """The continuations that are looked at: enough for num_beams to run on, whatever ends."""
        totals = scores + self._totals[:, None]
        self._check_left(totals)
        best, beams, tokens = self._drawn(totals) if self.params.do_sample else self._likeliest(totals)
        leaves = beams if len(rows) > 1 else [0] * len(beams)
        return _Candidates(
            best, self._linked(rows, leaves, beams, tokens), leaves, self._reasons(leaves, tokens.tolist())
        )

    def _drawn(self, totals: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """As `_likeliest`, but drawn."""
        params, (num_beams, vocab_size) = self.params, totals.shape
        count, row = self._num_looked_at(num_beams), totals.reshape(1, -1)
        if params.rng == "torch":
            index = torch.multinomial(row.softmax(dim=-1), num_samples=count)[0]
        else:
            index = sample_without_replacement(row[0], params.seed, self._position, count)
        return row[0, index], (index // vocab_size).tolist(), index % vocab_size

    def _go_on(self, found: _Candidates) -> Tensor:
        """Keep the best that do not end as the beams of the next step; returns their totals, the best first."""
        ends = _column([reason is not None for reason in found.reasons], found.totals)
        totals = found.totals + ends * NOWHERE
        chosen: list[int] = totals.topk(self.params.num_beams).indices.tolist()
        self._run_on([found.leaves[at] for at in chosen], [found.links[at] for at in chosen])
        self._totals = totals[chosen]
        return self._totals

    def _take_in(self, found: _Candidates) -> None:
        """Let those that ended compete for the places among the outputs."""
        params, reasons = self.params, found.reasons
        count = params.num_beams
        competes = [at < count and reason is not None for at, reason in enumerate(reasons)]
        scores = found.totals / (self._length + 1) ** params.length_penalty
        if params.early_stopping is True and all(self._ended):
            scores = scores + NOWHERE
        if not self._can_improve:
            scores = scores + NOWHERE
        scores = scores + (1 - _column(competes, scores)) * NOWHERE
        merged = torch.cat((self._ended_scores, scores))
        best: list[int] = merged.topk(count).indices.tolist()
        everyone = [
            *self._ended,
            *(
                Ended(0.0, link, reason) if reason is not None and is_in else None
                for link, reason, is_in in zip(found.links, reasons, competes, strict=True)
            ),
        ]
        self._ended, self._ended_scores = [everyone[at] for at in best], merged[best]

    def _can_go_on(self, totals: Tensor, found: _Candidates) -> bool:
        """Whether a beam that runs could still get a place."""
        params, full = self.params, all(self._ended)
        length = self._length
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = params.max_new_tokens
        possible = float(totals[0] / length**params.length_penalty)
        worst = float(self._ended_scores.min()) if full else NOWHERE
        self._can_improve = self._can_improve and possible > worst
        return self._can_improve and not (full and params.early_stopping is True) and None in found.reasons

    # Stopping ----------------------------------------------------------------------------------

    def _reasons(self, leaves: list[int], tokens: list[int]) -> list[FinishReason | None]:
        """Why each continuation ends, or None. Raises RequestFailed where a criterion of the caller's raises."""
        params = self.params
        before = self._ids
        reasons: list[FinishReason | None] = [None] * len(tokens)
        if params.stopping_criteria:
            ids = torch.tensor(
                [[*before[leaf], token] for leaf, token in zip(leaves, tokens, strict=True)], device="cpu"
            )
            met = criteria_met(params, ids, self._scores_so_far)
            reasons = ["criteria" if own else None for own in met]
        late = self._is_late
        for at, (leaf, token) in enumerate(zip(leaves, tokens, strict=True)):
            if token in params.eos_token_id:
                reasons[at] = "eos"
            elif params.stop_strings and self._completes_stop(before[leaf], token):
                reasons[at] = "stop_string"
            elif self._length + 1 >= params.max_new_tokens:
                reasons[at] = "length"
            elif late:
                reasons[at] = "time"
        return reasons

    def _completes_stop(self, before: Seq[int], token: int) -> bool:
        text = output_text(self._tokenizer, self.params, before)
        if text is None:
            return False
        text.push(token)
        return text.stopped_by is not None


def _column(flags: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(flags, dtype=torch.float32, device=like.device)
