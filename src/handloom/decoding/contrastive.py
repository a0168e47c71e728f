"""Contrastive search: of the most likely tokens, the one that is likely and unlike what came before.

Each step runs the top_k most likely tokens as candidates, all in one batch, and takes the one with the highest

    (1 - penalty_alpha) * probability - penalty_alpha * similarity,

where similarity is the highest cosine between the candidate's last hidden state (after the final norm) and those of the
tokens before it, the prompt's among them. Su et al., "A contrastive framework for neural text generation", 2022 (arXiv
2202.06417), as transformers had it. There a token that a rule forbids can be a candidate where fewer than top_k are
left; here it cannot.

Candidates fork pages. The one that is taken has run already, so its logits say what the next candidates are.

This module does not know the scheduler or other modes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.branches import Branches
from handloom.decoding.decoder import Event
from handloom.decoding.sample import SampleDecoder
from handloom.errors import NonFiniteLogits
from handloom.model.hooks import At, Hook
from handloom.ops.torch_threads import one_thread
from handloom.sampling.params import GenerationParams
from handloom.sampling.sampler import Choice, choose, token_logprobs
from handloom.text.tokenizer import Tokenizer

LAST_HIDDEN = "ln_final.hook_normalized"


class ContrastiveDecoder:
    """Generates one output from a sequence, which it owns."""

    def __init__(self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None) -> None:
        self.sequence, self.params, self.num_outputs = sequence, params, 1
        self._branches = Branches(sequence)
        self._output = SampleDecoder(sequence, replace(params, output_scores=True, logprobs=None), tokenizer)
        self.max_length = self._output.max_length
        self._before = _Directions()  # of the tokens before the candidates
        self._seen: dict[Sequence, Tensor] = {}  # last hidden states [hidden_size] of the candidates
        self._choice: Choice | None = None  # all but which token; none before the prompt has run
        self._logits = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )  # those that the candidates are the best of [vocab_size]
        self._probabilities = torch.empty(0, dtype=torch.float32, device="cpu")  # of the candidates, highest first

    @property
    def sequences(self) -> Seq[Sequence]:
        return self._branches.sequences

    def plan(self) -> Seq[Work]:
        hook = Hook(frozenset({LAST_HIDDEN}), self._see, changes=False, sequence=None)
        return [work._replace(hook=hook) for work in self._branches.plan()]

    def close(self) -> None:
        self._branches.free()

    @one_thread()
    def advance(self, logits: Tensor) -> list[Event]:
        """Take a candidate once all have run, and look for the next ones."""
        rows = self._branches.take(logits)
        if rows is None:
            return []
        if self._choice is None:
            return self._look_on(rows[0], 0)
        best = self._best()
        events = self._take(self._choice, best)
        return events if self._output.finished else [*events, *self._look_on(rows[best], best)]

    def _see(self, values: Tensor, at: At) -> None:
        """The hook: last hidden states [n, hidden_size] of a sequence's next tokens."""
        sequence = at.sequence
        assert isinstance(sequence, Sequence)
        end = sequence.num_computed + len(values)
        if self._choice is not None:
            if end == len(sequence):
                self._seen[sequence] = values[-1].to(torch.float32, copy=True)
        elif end > len(self._before):
            self._before.add(values[len(self._before) - end :])

    def _best(self) -> int:
        """The candidate with the highest score."""
        states = torch.stack([self._seen[leaf] for leaf in self._branches.leaves])
        alpha, similarity = self.params.penalty_alpha, self._before.most_similar(states)
        return int(((1.0 - alpha) * self._probabilities - alpha * similarity).argmax())

    def _take(self, choice: Choice, best: int) -> list[Event]:
        """The events of the candidate as the output's next token."""
        leaf, params = self._branches.leaves[best], self.params
        token_id = leaf.token_ids.pop()  # the output appends it again
        choice.token_ids = [token_id]
        if params.logprobs is not None:
            ids = torch.tensor([token_id], device=leaf.pool.device)
            logprobs, top = token_logprobs(self._logits[None], ids, params.logprobs)
            choice.logprobs, choice.top_logprobs = [*logprobs], [*top]
        if not params.output_scores:
            choice.scores = [None]
        self._output.sequence = leaf
        self._before.add(self._seen[leaf][None])
        return self._output.accept(choice, 0)

    def _look_on(self, logits: Tensor, leaf: int) -> list[Event]:
        """Fork the leaf for the most likely tokens after it, by its logits [vocab_size]."""
        choice = choose(logits[None], [self._output.row()])
        scores = choice.scores[0]
        if scores is None:
            return self._output.accept(choice, 0)
        found = scores.softmax(dim=-1).topk(min(self.params.top_k, len(scores)))
        likely = found.values > 0
        if not bool(likely[0]):
            error = NonFiniteLogits("the processed scores contain +inf; check the logits processors")
            return self._output.accept(replace(choice, errors=[error]), 0)
        self._choice, self._logits, self._probabilities = choice, logits.clone(), found.values[likely]
        candidates: list[int] = found.indices[likely].tolist()
        self._branches.split([leaf] * len(candidates))
        self._seen = {}
        for own, token_id in zip(self._branches.leaves, candidates, strict=True):
            own.append(token_id)
        return []


class _Directions:
    """Vectors of length one, [n, hidden_size] float32, that grow in number."""

    def __init__(self) -> None:
        self._rows, self._count = torch.empty(0, dtype=torch.float32, device="cpu"), 0

    def __len__(self) -> int:
        return self._count

    def add(self, vectors: Tensor) -> None:
        """Add the directions of vectors [m, hidden_size]."""
        count = self._count + len(vectors)
        if count > len(self._rows):
            grown = vectors.new_empty(2 * count, vectors.shape[1], dtype=torch.float32)
            if self._count:
                grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        self._rows[self._count : count] = _directions(vectors.to(torch.float32))
        self._count = count

    def most_similar(self, vectors: Tensor) -> Tensor:
        """The highest cosine with any of these [m], for vectors [m, hidden_size]."""
        return (self._rows[: self._count] @ _directions(vectors).T).amax(dim=0)


def _directions(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / length
