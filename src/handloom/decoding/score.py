"""Scoring: how likely the model finds a given sequence; nothing is generated.

This module does not know text, sampling or the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Event, FinishedEvent, PromptLogprobsEvent
from handloom.errors import NonFiniteLogits
from handloom.sampling.sampler import token_logprobs


class ScoreDecoder:
    """Emits the log-probability of every token of a sequence but the first, then finishes."""

    def __init__(self, sequence: Sequence, top_n: int = 0) -> None:
        self.sequence, self.top_n = sequence, top_n
        self._scored = 1

    @property
    def max_length(self) -> int:
        return len(self.sequence)

    @property
    def sequences(self) -> Seq[Sequence]:
        return (self.sequence,)

    def plan(self) -> Seq[Work]:
        return [Work(self.sequence, self.sequence.num_pending, "all")]

    def advance(self, logits: Tensor) -> list[Event]:
        logits = logits[self._scored - 1 - (self.sequence.num_computed - len(logits)) :]  # the rest was scored before
        targets = self.sequence.token_ids[self._scored : self._scored + len(logits)]
        first, self._scored = self._scored, self._scored + len(targets)
        events: list[Event] = []
        if targets:
            rows = logits[: len(targets)]
            if not bool(torch.isfinite(rows.logsumexp(-1)).all()):
                where = f"the model produced NaN or infinite logits between positions {first} and {self._scored}"
                return [FinishedEvent("error", error=NonFiniteLogits(f"{where}; check the weights and the dtype"))]
            ids = torch.tensor(targets, device=logits.device)
            events.append(PromptLogprobsEvent(first, *token_logprobs(rows, ids, self.top_n)))
        if self.sequence.num_pending == 0:
            events.append(FinishedEvent("length"))
        return events

    def close(self) -> None:
        self.sequence.free()
