"""Classifier-free guidance: the logits after a prompt, weighed against those after a negative prompt.

Beside each output runs a twin: the negative prompt, and after it the tokens of the output. The scores are
u + guidance_scale * (c - u), where c and u are the log-probabilities after the one and after the other. A scale above 1
leads towards the prompt and away from the negative prompt, which without ids is the prompt's last token. Sanchez et
al., "Stay on topic with classifier-free guidance", 2023 (arXiv 2306.17806), as transformers has it. Both run in one
step.

This module does not know how tokens are chosen: samples and beams branch as without guidance.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.branches import Branches
from handloom.sampling.params import GenerationParams


class GuidedBranches(Branches):
    """Branches with a twin of each leaf. The twins run first, so that no leaf has its row before all of them do."""

    def __init__(self, prompt: Sequence, params: GenerationParams) -> None:
        super().__init__(prompt)
        twin = Sequence(prompt.pool, params.negative_prompt_ids or prompt.token_ids[-1:])
        twin.salt = prompt.salt
        self._twins = Branches(twin)
        self._starts = len(prompt), len(twin)
        self._twin_rows: Tensor | None = None  # of all twins, for the token to be chosen next

    @property
    def sequences(self) -> list[Sequence]:
        return [*self._twins.sequences, *super().sequences]

    @property
    def longest(self) -> int:
        return max(super().longest, self._twins.longest)

    def plan(self) -> list[Work]:
        start, twin_start = self._starts
        for leaf, twin in zip(self.leaves, self._twins.leaves, strict=True):
            twin.token_ids += leaf.token_ids[start + len(twin) - twin_start :]
        works = self._twins.plan() if self._twin_rows is None else []
        if any(work.logits == "none" for work in works):  # what twins have in common comes first, alone
            return works
        return [*works, *super().plan()]

    def take(self, logits: Tensor) -> Tensor | None:
        if self._twin_rows is None:
            count = len(self._twins.came)
            self._twin_rows, logits = self._twins.take(logits[:count]), logits[count:]
        rows = super().take(logits)
        if rows is not None:
            self.unconditional, self._twin_rows = self._twin_rows, None
        return rows

    def split(self, parents: Seq[int]) -> None:
        super().split(parents)
        self._twins.split(parents)

    def free(self) -> None:
        super().free()
        self._twins.free()
