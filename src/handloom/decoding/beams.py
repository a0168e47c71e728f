"""What every search with beams is made of: sequences that run on together, the tokens that led to each, and the text
that is told as soon as it cannot change any more.

A beam that splits is forked: no K and V move but those on the one page that both will write to.

This module does not know which continuations run on, which compete for the outputs, or when a search ends.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.branches import Branches
from handloom.decoding.decoder import (
    BeamTrace,
    Event,
    FinishedEvent,
    FinishReason,
    SampleFinishedEvent,
    TokenEvent,
    TopLogprobs,
)
from handloom.decoding.internals import Internals, Seen, keys_and_values
from handloom.decoding.sample import criteria_met, output_text
from handloom.errors import HandloomError, NonFiniteLogits
from handloom.ops.torch_threads import one_thread
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import RequestRules, Row, apply_rules, nothing_left
from handloom.sampling.sampler import token_logprobs
from handloom.text.tokenizer import Tokenizer

NOWHERE = -1e9  # the score of a beam that is not there


@dataclass(frozen=True, slots=True)
class Link:
    """A chosen token, and the one before it. length: of both and all before; beam: which of num_beams it continued."""

    before: Link | None
    length: int
    token_id: int
    beam: int
    logprob: float | None
    top_logprobs: TopLogprobs | None


@dataclass(frozen=True, slots=True)
class Ended:
    """What is over and may be an output. score: the sum of its log-probabilities over length^length_penalty.

    found: False for one that stands for a beam that was not there. fulfilled: whether it has all forced words, if any.
    """

    score: float
    last: Link
    reason: FinishReason
    found: bool = True
    fulfilled: bool | None = None


class Beams(ABC):
    """A search for params.num_return_sequences outputs of a sequence, which it owns."""

    def __init__(
        self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None, branches: Branches
    ) -> None:
        self.sequence, self.params, self.num_outputs = sequence, params, params.num_return_sequences
        self._branches = branches
        self._internals = self._branches.internals = Internals(params, sequence)
        self.max_length = self._branches.longest + params.max_new_tokens
        # the rules see no ids for embedded positions, and count no length for them
        self._hidden = sequence.num_embeddings
        self._prompt_ids = sequence.token_ids[self._hidden :]
        self._params = replace(params, min_length=max(0, params.min_length - self._hidden))
        self._tokenizer, self._started = tokenizer, time.monotonic()
        self._rules = [RequestRules(self._params, len(self._prompt_ids))]  # of each leaf
        self._links: list[Link | None] = [None]  # the last token of each leaf
        self._length = 0  # tokens generated
        self._scores: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._seen: list[Seen] = []
        self._texts = [output_text(tokenizer, params, self._prompt_ids) for _ in range(self.num_outputs)]
        self._told = 0  # tokens that all outputs have in common, and that were emitted
        self._apart: Link | None = None  # of what is over, one that goes on from these otherwise than all leaves

    @property
    def sequences(self) -> Seq[Sequence]:
        return self._branches.sequences

    def plan(self) -> Seq[Work]:
        return self._branches.plan()

    def close(self) -> None:
        self._branches.free()

    @one_thread()
    def advance(self, logits: Tensor) -> list[Event]:
        """Go on by one token on every beam, once the logits of all are there."""
        rows = self._branches.take(logits)
        if rows is None:
            return []
        self._look()
        try:
            goes_on = self._step(rows)
        except HandloomError as error:
            return [FinishedEvent("error", error=error)]
        return self._tell_common() if goes_on else self._finish()

    @abstractmethod
    def _step(self, rows: Tensor) -> bool:
        """Go on by one token, given the logits [leaves, vocab_size], at first [1, vocab_size]; whether it goes on.

        Raises NonFiniteLogits, and RequestFailed where a function of the caller's raises.
        """

    @abstractmethod
    def _best(self) -> list[Ended | None]:
        """The best num_outputs of what is over by now, the best first, and those as good as the last of them. None
        stands for one that is missing."""

    # Parts of a step ---------------------------------------------------------------------------

    @property
    def _position(self) -> int:
        """Of the token to be chosen, among the ids of a sequence."""
        return len(self._prompt_ids) + self._length

    @property
    def _ids(self) -> list[list[int]]:
        """The token ids of every leaf, without what stands for embeddings."""
        return [leaf.token_ids[self._hidden :] for leaf in self._branches.leaves]

    def _shaped(self, rows: Tensor, leaves: Seq[int], taken: Seq[int] = ()) -> Tensor:
        """Log-probabilities [n, vocab_size] of n leaves after the rules, given their logits.

        taken: the tokens that other groups of beams have chosen at this step.
        Raises NonFiniteLogits, and what goes wrong in a processor of the caller's.
        """
        if not self.params.remove_invalid_values and not bool(rows.amax(dim=-1).isfinite().all()):
            raise NonFiniteLogits(
                f"the model's logits for the token at position {self._position} contain NaN or infinity, or are all "
                "-inf; check the weights and the dtype"
            )
        scores = rows.float().log_softmax(dim=-1)
        ids, length = self._ids, len(self._prompt_ids)
        table = [Row(self._params, ids[leaf], length, self._rules[leaf]) for leaf in leaves]
        for row, leaf in zip(table, leaves, strict=True):
            row.taken = taken
            if self._branches.unconditional is not None:
                row.unconditional = self._branches.unconditional[leaf]
        for error in apply_rules(scores, table):
            if error is not None:
                raise error
        return scores

    def _check_left(self, totals: Tensor) -> None:
        """Raises NonFiniteLogits where no continuation has a finite score, GrammarError where a grammar is why."""
        best = totals.amax()
        if self.params.structure is not None and bool(best.isneginf()):
            ids, length = self._ids, len(self._prompt_ids)
            rows = [Row(self._params, own, length, rules) for own, rules in zip(ids, self._rules, strict=True)]
            raise nothing_left(max(rows, key=lambda row: row.rules.fits_grammar))
        if not bool(best.isfinite()):
            raise NonFiniteLogits(
                f"the processed scores for the token at position {self._position} contain NaN or +inf, or are all "
                "-inf: nothing is left to choose; check the logits processors"
            )

    def _likeliest(self, totals: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """The best continuations of n beams by their totals [n, vocab_size], enough for n to run on, whatever ends.

        Returns, the best first, their totals [k], the beams that they continue, and their token ids [k].
        """
        best, index = (part[0] for part in totals.reshape(1, -1).topk(self._num_looked_at(len(totals))))
        return best, (index // totals.shape[1]).tolist(), index % totals.shape[1]

    def _num_looked_at(self, num_beams: int) -> int:
        return max(2, 1 + len(self.params.eos_token_id)) * num_beams

    def _linked(self, rows: Tensor, leaves: Seq[int], beams: Seq[int], token_ids: Tensor) -> list[Link]:
        """Links for token_ids [n], which go on from these leaves; rows [leaves, vocab_size] are the leaves' logits."""
        count, wanted = len(leaves), self.params.logprobs
        logprobs: Seq[float | None] = [None] * count
        top: Seq[TopLogprobs | None] = [None] * count
        if wanted is not None:
            logprobs, top = token_logprobs(rows[list(leaves)], token_ids, wanted)
        columns = zip([self._links[leaf] for leaf in leaves], token_ids.tolist(), beams, logprobs, top, strict=True)
        return [
            Link(before, 1 if before is None else before.length + 1, token, beam, own, likely)
            for before, token, beam, own, likely in columns
        ]

    def _run_on(self, parents: Seq[int], links: Seq[Link]) -> None:
        """From now on leaf i is what leaf parents[i] was, and the token of links[i]."""
        self._branches.split(parents)
        first = {parent: at for at, parent in reversed(list(enumerate(parents)))}
        before = self._rules
        self._rules = [
            before[parent] if first[parent] == at else before[parent].fork() for at, parent in enumerate(parents)
        ]
        self._links = list(links)
        for leaf, link in zip(self._branches.leaves, links, strict=True):
            leaf.append(link.token_id)

    def _keep(self, scores: Tensor | None, rows: Tensor | None) -> None:
        """Keep a step's scores and logits [num_beams or 1, vocab_size], where they were asked for."""
        if self.params.output_scores and scores is not None:
            self._scores.append(scores.expand(self.params.num_beams, -1))
        if self.params.output_logits and rows is not None:
            self._logits.append(rows.to(torch.float32, copy=True).expand(self.params.num_beams, -1))

    def _look(self) -> None:
        """Keep what was seen of every beam; at first, all are the prompt."""
        if self.params.output_hidden_states or self.params.output_attentions:
            seen = self._internals.take(self._branches.leaves)
            nothing = seen[0].zeros()
            self._seen.append(Seen.stacked([nothing if at is None else seen[at] for at in self._leaf_of_each_beam()]))

    def _leaf_of_each_beam(self) -> Seq[int | None]:
        """The leaf that each of num_beams runs on; None for one that is over."""
        return range(self.params.num_beams) if self._length else [0] * self.params.num_beams

    @property
    def _scores_so_far(self) -> tuple[Tensor, ...] | None:
        return tuple(self._scores) if self.params.output_scores else None

    @property
    def _is_late(self) -> bool:
        limit = self.params.max_time
        return limit is not None and time.monotonic() - self._started > limit

    def _reason_for_all(self) -> FinishReason | None:
        """Why a search ends with all that runs, or None: its length, its time, or that the caller's criteria all say
        so of every beam. Raises RequestFailed where one of them raises."""
        if self._length >= self.params.max_new_tokens:
            return "length"
        if self._is_late:
            return "time"
        criteria = self.params.stopping_criteria
        met = criteria and all(criteria_met(self.params, torch.tensor(self._ids, device="cpu"), self._scores_so_far))
        return "criteria" if met else None

    # Events ------------------------------------------------------------------------------------

    def _tell_common(self) -> list[Event]:
        """The tokens that became common to all that may still be an output; of each it is looked at few times."""
        at = self._hidden + len(self._prompt_ids) + self._told
        leaves = [leaf.token_ids for leaf in self._branches.leaves]
        if any(len(own) <= at or own[at] != leaves[0][at] for own in leaves):
            return []
        over = [own.last for own in self._best() if own is not None]
        if any(last is self._apart for last in over):
            return []
        common = after(self._links[0], self._told)
        for own in leaves[1:]:
            del common[_alike(common, own[at:]) :]
        for last in over:
            del common[_alike(common, [link.token_id for link in after(last, self._told)]) :]
            if not common:
                self._apart = last
                return []
        self._told += len(common)
        return [self._event(link, sample) for link in common for sample in range(self.num_outputs)]

    def _event(self, link: Link, sample: int) -> TokenEvent:
        text = self._texts[sample]
        piece = "" if text is None else text.push(link.token_id)
        return TokenEvent(link.token_id, piece, link.logprob, link.top_logprobs, sample=sample)

    def _finish(self) -> list[Event]:
        events: list[Event] = []
        best = self._best()[: self.num_outputs]
        past = None
        if self.params.output_past_key_values:
            past = [keys_and_values(leaf) for leaf in self._branches.leaves]
        for sample, ended in enumerate(best):
            text = self._texts[sample]
            if ended is None:
                error = NonFiniteLogits(
                    f"there is no output number {sample}: no other has a score above {NOWHERE:g}; ask for fewer "
                    "num_return_sequences, ban less, or take a length_penalty nearer to 0"
                )
                events.append(SampleFinishedEvent(sample, "error", error=error))
                continue
            links = chain(ended.last)
            events += [self._event(link, sample) for link in links[self._told :]]
            trace = BeamTrace(
                ended.score,
                [link.beam for link in links],
                self._scores if self.params.output_scores else None,
                self._logits if self.params.output_logits else None,
                self._seen or None,
                past,
                ended.fulfilled,
            )
            rest, stop = ("", None) if text is None else (text.finish(), text.stopped_by)
            events.append(SampleFinishedEvent(sample, ended.reason, rest, stop, search=trace))
        return [*events, FinishedEvent("error" if best[0] is None else best[0].reason)]


def starting_totals(count: int, device: torch.device) -> Tensor:
    """Sums of log-probabilities [count] before the first token: all beams go on from the prompt, so only one counts."""
    totals = torch.full((count,), NOWHERE, dtype=torch.float32, device=device)
    totals[0] = 0.0
    return totals


def chain(last: Link | None) -> list[Link]:
    """All links up to `last`, in order."""
    return after(last, 0)


def after(last: Link | None, count: int) -> list[Link]:
    """The links up to `last` but the first `count`, in order."""
    links: list[Link] = []
    while last is not None and last.length > count:
        links.append(last)
        last = last.before
    return links[::-1]


def _alike(links: Seq[Link], token_ids: Seq[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(links, token_ids, strict=False))
    return next((at for at, (link, token) in pairs if link.token_id != token), min(len(links), len(token_ids)))
