"""Constrained beam search: outputs that contain what force_words_ids asks for.

Beside the most likely continuations, each beam proposes the tokens that would bring it forward in a phrase. All are
sorted into banks, by how much they have of what is asked for, and the beams are filled from the banks in turn: the best
of each, the second best of each, and so on. Anderson et al., "Guided open vocabulary image captioning with constrained
beam search", 2017 (arXiv 1612.00576); Post and Vilar, "Fast lexically constrained decoding with dynamic beam
allocation", 2018 (arXiv 1804.06609). Tokens and scores are those of the last transformers that had it, 4.56.

Only what has everything may end early. What the length ends without it is an output where nothing better is left, and
says so: `BeamTrace.fulfilled`.

This module does not know the scheduler, groups of beams, or how a phrase advances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from handloom.cache.sequence import Sequence
from handloom.decoding.beams import Beams, Ended, Link, starting_totals
from handloom.decoding.branches import Branches
from handloom.decoding.hypotheses import Hypotheses, best_of
from handloom.sampling.forced_words import ForcedWords
from handloom.sampling.params import GenerationParams
from handloom.text.tokenizer import Tokenizer

BANK = 100  # how far banks lie apart in the order of continuations


class ConstrainedBeamDecoder(Beams):
    """Searches params.num_return_sequences outputs for a sequence, which it owns."""

    def __init__(
        self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None, branches: Branches
    ) -> None:
        super().__init__(sequence, params, tokenizer, branches)
        self._totals = starting_totals(params.num_beams, sequence.pool.device)
        self._words = ForcedWords(params.force_words_ids)
        start = self._words.start
        for token_id in self._prompt_ids:  # as in transformers, what the prompt has counts
            start = self._words.after(start, token_id)
        self._progress = [start] * params.num_beams  # of each beam
        self._hypotheses = Hypotheses(params.num_beams, params)

    def _step(self, rows: Tensor) -> bool:
        params = self.params
        scores = self._shaped(rows, range(len(rows)))
        self._keep(scores, rows)
        totals = scores.expand(params.num_beams, -1) + self._totals[:, None]
        if self._hypotheses.ended and bool(totals.amax().isneginf()):
            return False  # what was found is all there is
        self._check_left(totals)
        best, beams, token_ids = self._likeliest(totals)
        leaves = beams if len(rows) > 1 else [0] * len(beams)
        links = self._linked(rows, leaves, beams, token_ids)
        going_on: list[int] = []
        for rank, (link, total) in enumerate(zip(links, best.tolist(), strict=True)):
            if link.token_id not in params.eos_token_id:
                going_on.append(rank)
            elif rank < params.num_beams and self._progress[link.beam].is_complete:
                self._hypotheses.add(total, self._length + 1, link, "eos", fulfilled=True)
        del going_on[params.num_beams :]
        over = self._hypotheses.cannot_improve(float(best[0]), self._length + 1)
        self._length += 1
        if over:
            return False
        self._choose(rows, totals, best[going_on], [links[rank] for rank in going_on])
        return not self._ends()

    def _choose(self, rows: Tensor, totals: Tensor, likeliest: Tensor, links: list[Link]) -> None:
        """Run on with the best of all banks. totals [num_beams, vocab_size]; likeliest [num_beams], and their links."""
        proposed, banks = self._proposals([(link.beam, link.token_id) for link in links])
        after = [self._words.after(self._progress[link.beam], link.token_id) for link in links]
        if proposed:
            beams, token_ids = torch.tensor(proposed, device=totals.device).unbind(1)
            likeliest = torch.cat((likeliest, totals[beams, token_ids]))
            places = [beam if len(rows) > 1 else 0 for beam, _ in proposed]
            links = links + self._linked(rows, places, beams.tolist(), token_ids)
            after += [self._words.after(self._progress[beam], token_id) for beam, token_id in proposed]
            all_banks = torch.tensor([*map(self._words.bank, after[: len(self._progress)]), *banks], device="cpu")
            order = (all_banks.to(likeliest.device) * BANK + likeliest).sort(descending=True).indices.tolist()
            chosen = _by_turns(order, all_banks.tolist())[: len(self._progress)]
            likeliest = likeliest[chosen]
            links, after = [links[at] for at in chosen], [after[at] for at in chosen]
        self._totals, self._progress = likeliest, after
        self._run_on([link.beam if len(rows) > 1 else 0 for link in links], links)

    def _proposals(self, likeliest: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
        """What would bring each beam forward and is not among the likeliest: (beam, token id)s, and their banks."""
        ids = [tuple(leaf) for leaf in self._ids]
        first = {own: at for at, own in reversed(list(enumerate(ids)))}  # beams that are equal count as one
        same = [first[own] for own in ids] if len(ids) > 1 else [0] * len(self._progress)
        seen = {(same[beam], token_id) for beam, token_id in likeliest}
        proposed: list[tuple[int, int]] = []
        banks: list[int] = []
        for beam, progress in enumerate(self._progress):
            for token_id, bank in self._words.proposals(progress):
                if (same[beam], token_id) not in seen:
                    seen.add((same[beam], token_id))
                    proposed.append((beam, token_id))
                    banks.append(bank)
        return proposed, banks

    def _ends(self) -> bool:
        """Whether all ends here; then what runs competes, and what lacks a word only where there are too few others."""
        reason = self._reason_for_all()
        if reason is None:
            return False
        totals: list[float] = self._totals.tolist()
        complete = [at for at, progress in enumerate(self._progress) if progress.is_complete]
        lacking = [at for at in range(len(totals)) if at not in complete]
        for at in [*complete, *(lacking if len(complete) < self.num_outputs else ())]:
            link = self._links[at]
            assert link is not None
            self._hypotheses.add(totals[at], self._length, link, reason, fulfilled=at in complete)
        return True

    def _best(self) -> list[Ended | None]:
        return best_of(self._hypotheses.ended, self.num_outputs)


def _by_turns(order: list[int], banks: list[int]) -> list[int]:
    """`order`, sorted by banks, with the best of each bank first, then the second best of each, and so on."""
    turns: list[int] = []
    for at, own in enumerate(order):
        goes_on = at > 0 and banks[own] == banks[order[at - 1]]
        turns.append(turns[-1] + 1 if goes_on else 0)
    return [order[at] for at in sorted(range(len(order)), key=turns.__getitem__)]
