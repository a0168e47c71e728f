"""Beam search and beam sampling: the best of many outputs by the sum of their log-probabilities.

Every step takes the log-probabilities of `num_beams` running sequences, reshapes them by the rules, adds what each
sequence has so far, and looks at the best (or, sampling, at as many drawn) of all continuations together. Those that
end compete for `num_beams` places by score / length^length_penalty; the best of the others run on. early_stopping: True
ends once all places are taken; False, where the best that runs would not make it at its length now; "never", where it
would not at any length. This follows transformers' `_beam_search` to the order of operations, so ties fall alike.
Sampling without replacement is Gumbel-top-k (Kool et al., "Stochastic beams and where to find them", 2019), unless
rng="torch".

A beam that splits is forked: no K and V move but those on the one page that both will write to.

This module does not know the scheduler or other modes.
"""

from __future__ import annotations

import time
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
from handloom.decoding.sample import criteria_met, output_text
from handloom.errors import HandloomError, NonFiniteLogits
from handloom.sampling.params import GenerationParams
from handloom.sampling.rng import sample_without_replacement
from handloom.sampling.rules import RequestRules, Row, apply_rules
from handloom.sampling.sampler import token_logprobs
from handloom.text.tokenizer import Tokenizer

NOWHERE = -1e9  # the score of a beam that is not there


@dataclass(frozen=True, slots=True)
class _Link:
    """A chosen token, and the one before it."""

    before: _Link | None
    token_id: int
    beam: int
    logprob: float | None
    top_logprobs: TopLogprobs | None


@dataclass(frozen=True, slots=True)
class _Ended:
    last: _Link
    reason: FinishReason


@dataclass(slots=True)
class _Candidates:
    """The continuations of one step, k of them: sums of log-probabilities [k], and for each its link, the leaf it goes
    on from, and why it ends, if it does."""

    totals: Tensor
    links: list[_Link]
    leaves: list[int]
    reasons: list[FinishReason | None]


class BeamDecoder:
    """Searches params.num_return_sequences outputs for a sequence, which it owns."""

    def __init__(
        self,
        sequence: Sequence,
        params: GenerationParams,
        tokenizer: Tokenizer | None,
        branches: Branches | None = None,
    ) -> None:
        self.sequence, self.params, self.num_outputs = sequence, params, params.num_return_sequences
        self._branches = branches or Branches(sequence)
        self.max_length = self._branches.longest + params.max_new_tokens
        # the rules see no ids for embedded positions, and count no length for them
        self._hidden = sequence.num_embeddings
        self._prompt_ids = sequence.token_ids[self._hidden :]
        self._params = replace(params, min_length=max(0, params.min_length - self._hidden))
        self._tokenizer, self._started = tokenizer, time.monotonic()
        self._rules = [RequestRules(self._params, len(self._prompt_ids))]  # of each leaf
        self._links: list[_Link | None] = [None]  # the last token of each leaf
        count, device = params.num_beams, sequence.pool.device
        self._totals = torch.full((count,), NOWHERE, device=device)
        self._totals[0] = 0.0
        self._ended: list[_Ended | None] = [None] * count
        self._ended_scores = torch.full((count,), NOWHERE, device=device)
        self._can_improve = True
        self._length = 0  # tokens generated
        self._scores: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._texts = [output_text(tokenizer, params, self._prompt_ids) for _ in range(self.num_outputs)]
        self._told = 0  # tokens that all outputs have in common, and that were emitted

    @property
    def sequences(self) -> Seq[Sequence]:
        return self._branches.sequences

    def plan(self) -> Seq[Work]:
        return self._branches.plan()

    def close(self) -> None:
        self._branches.free()

    def advance(self, logits: Tensor) -> list[Event]:
        """Go on by one token on every beam, once the logits of all are there."""
        rows = self._branches.take(logits)
        if rows is None:
            return []
        try:
            found = self._candidates(rows, self._shaped(rows))
        except HandloomError as error:
            return [FinishedEvent("error", error=error)]
        totals = self._run_on(found)
        self._take_in(found)
        self._length += 1
        if self._goes_on(totals, found):
            return self._tell_common()
        return self._finish()

    @property
    def _position(self) -> int:
        """Of the token to be chosen, among the ids of a sequence."""
        return len(self._prompt_ids) + self._length

    # One step ----------------------------------------------------------------------------------

    def _shaped(self, rows: Tensor) -> Tensor:
        """Log-probabilities [num_beams, vocab_size] after the rules; at first, all are those of the prompt.

        Raises NonFiniteLogits, and what goes wrong in a processor of the caller's.
        """
        params = self.params
        if not params.remove_invalid_values and not bool(rows.amax(dim=-1).isfinite().all()):
            raise NonFiniteLogits(
                f"the model's logits for the token at position {self._position} contain NaN or infinity, or are all "
                "-inf; check the weights and the dtype"
            )
        scores = rows.to(torch.float32).log_softmax(dim=-1)
        ids = [leaf.token_ids[self._hidden :] for leaf in self._branches.leaves]
        table = [Row(self._params, own, len(self._prompt_ids), r) for own, r in zip(ids, self._rules, strict=True)]
        if self._branches.unconditional is not None:
            for row, unconditional in zip(table, self._branches.unconditional, strict=True):
                row.unconditional = unconditional
        for error in apply_rules(scores, table):
            if error is not None:
                raise error
        shape = params.num_beams, -1
        if params.output_scores:
            self._scores.append(scores.expand(shape))
        if params.output_logits:
            self._logits.append(rows.to(torch.float32, copy=True).expand(shape))
        return scores.expand(shape)

    def _candidates(self, rows: Tensor, scores: Tensor) -> _Candidates:
        """The continuations that are looked at: enough for num_beams to run on, whatever ends."""
        params, vocab_size = self.params, rows.shape[1]
        count = max(2, 1 + len(params.eos_token_id)) * params.num_beams
        totals = (scores + self._totals[:, None]).reshape(1, -1)
        if not bool(totals.amax().isfinite()):
            raise NonFiniteLogits(
                f"the processed scores for the token at position {self._position} contain NaN or +inf, or are all "
                "-inf: nothing is left to choose; check the logits processors"
            )
        if not params.do_sample:
            best, index = (part[0] for part in totals.topk(count))
        else:
            if params.rng == "torch":
                index = torch.multinomial(totals.softmax(dim=-1), num_samples=count)[0]
            else:
                index = sample_without_replacement(totals[0], params.seed, self._position, count)
            best = totals[0, index]
        beams: list[int] = (index // vocab_size).tolist()
        tokens: list[int] = (index % vocab_size).tolist()
        leaves = beams if len(rows) > 1 else [0] * count
        logprobs: Seq[float | None] = [None] * count
        top: Seq[TopLogprobs | None] = [None] * count
        if params.logprobs is not None:
            logprobs, top = token_logprobs(rows[leaves], index % vocab_size, params.logprobs)
        links = [
            _Link(self._links[leaf], token, beam, logprob, likely)
            for leaf, token, beam, logprob, likely in zip(leaves, tokens, beams, logprobs, top, strict=True)
        ]
        return _Candidates(best, links, leaves, self._reasons(leaves, tokens))

    def _run_on(self, found: _Candidates) -> Tensor:
        """Keep the best that do not end as the beams of the next step; returns their totals, the best first."""
        ends = _column([reason is not None for reason in found.reasons], found.totals)
        totals = found.totals + ends * NOWHERE
        chosen: list[int] = totals.topk(self.params.num_beams).indices.tolist()
        parents = [found.leaves[at] for at in chosen]
        self._branches.split(parents)
        first = {parent: at for at, parent in reversed(list(enumerate(parents)))}
        before = self._rules
        self._rules = [
            before[parent] if first[parent] == at else before[parent].fork() for at, parent in enumerate(parents)
        ]
        self._links = [found.links[at] for at in chosen]
        for leaf, at in zip(self._branches.leaves, chosen, strict=True):
            leaf.append(found.links[at].token_id)
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
                _Ended(link, reason) if reason is not None and is_in else None
                for link, reason, is_in in zip(found.links, reasons, competes, strict=True)
            ),
        ]
        self._ended, self._ended_scores = [everyone[at] for at in best], merged[best]

    def _goes_on(self, totals: Tensor, found: _Candidates) -> bool:
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
        before = [leaf.token_ids[self._hidden :] for leaf in self._branches.leaves]
        reasons: list[FinishReason | None] = [None] * len(tokens)
        if params.stopping_criteria:
            ids = torch.tensor([[*before[leaf], token] for leaf, token in zip(leaves, tokens, strict=True)])
            met = criteria_met(params, ids, tuple(self._scores) if params.output_scores else None)
            reasons = ["criteria" if own else None for own in met]
        late = params.max_time is not None and time.monotonic() - self._started > params.max_time
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

    # Events ------------------------------------------------------------------------------------

    def _tell_common(self) -> list[Event]:
        """The tokens that became common to all that may still be an output."""
        start = self._hidden + len(self._prompt_ids)
        possible = [leaf.token_ids[start:] for leaf in self._branches.leaves]
        possible += [[link.token_id for link in _chain(own.last)] for own in self._ended if own is not None]
        end = self._told
        while all(len(own) > end and own[end] == possible[0][end] for own in possible):
            end += 1
        if end == self._told:
            return []
        common = _chain(self._links[0])[self._told : end]
        self._told = end
        return [self._event(link, sample) for link in common for sample in range(self.num_outputs)]

    def _event(self, link: _Link, sample: int) -> TokenEvent:
        text = self._texts[sample]
        piece = "" if text is None else text.push(link.token_id)
        return TokenEvent(link.token_id, piece, link.logprob, link.top_logprobs, sample=sample)

    def _finish(self) -> list[Event]:
        events: list[Event] = []
        scores: list[float] = self._ended_scores.tolist()
        for sample in range(self.num_outputs):
            ended, text = self._ended[sample], self._texts[sample]
            if ended is None:
                error = NonFiniteLogits(
                    f"there is no output number {sample}: no other has a score above {NOWHERE:g}; ask for fewer "
                    "num_return_sequences, ban less, or take a length_penalty nearer to 0"
                )
                events.append(SampleFinishedEvent(sample, "error", error=error))
                continue
            links = _chain(ended.last)
            events += [self._event(link, sample) for link in links[self._told :]]
            trace = BeamTrace(
                scores[sample],
                [link.beam for link in links],
                self._scores if self.params.output_scores else None,
                self._logits if self.params.output_logits else None,
            )
            rest, stop = ("", None) if text is None else (text.finish(), text.stopped_by)
            events.append(SampleFinishedEvent(sample, ended.reason, rest, stop, search=trace))
        first = self._ended[0]
        return [*events, FinishedEvent("error" if first is None else first.reason)]


def _chain(last: _Link | None) -> list[_Link]:
    """All links up to `last`, in order."""
    links: list[_Link] = []
    while last is not None:
        links.append(last)
        last = last.before
    return links[::-1]


def _column(flags: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(flags, dtype=torch.float32, device=like.device)
