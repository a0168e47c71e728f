"""Sequences that grew out of one prompt and go on together: each step has a row of logits for every one of them.

The prompt is computed once. A sequence that goes on in several ways is forked, so what is common lies on shared pages.
When the scheduler has taken all pages, what the sequences have in common is again computed once, and shared.

This module does not know how tokens are chosen, or which sequences should go on.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import takewhile

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.internals import Internals
from handloom.model.hooks import Hook


class Branches:
    """`leaves` are the sequences that go on. Their rows of logits may come in over several steps.

    unconditional: logits [r, vocab_size] beside the r rows that `take` gave last, where guidance asks for them.
    internals: who looks into the model at all leaves.
    """

    unconditional: Tensor | None = None
    internals: Internals | None = None

    def __init__(self, prompt: Sequence) -> None:
        self.leaves = [prompt]
        self._rows: dict[Sequence, Tensor] = {}  # logits [vocab_size] after the last token, of those that have them

    @property
    def sequences(self) -> list[Sequence]:
        """The leaves that hold pages, and always the first, which is computed before others take over its pages."""
        return [leaf for leaf in self.leaves if leaf is self.leaves[0] or leaf.page_table]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.leaves))

    @property
    def came(self) -> list[Sequence]:
        """The leaves whose rows a step has computed that `take` has not seen yet."""
        return [leaf for leaf in self.leaves if leaf not in self._rows and not leaf.num_pending]

    def plan(self) -> list[Work]:
        """What must run before every leaf has its row."""
        self._rows = {leaf: row for leaf, row in self._rows.items() if not leaf.num_pending}
        bare = [leaf for leaf in self.leaves[1:] if not leaf.num_computed]
        if bare:
            first, common = self.leaves[0], _common_length(self.leaves)
            if first.num_computed < common:
                return [Work(first, common - first.num_computed, "none", self._hook(first))]
            for leaf in bare:
                leaf.adopt(first, common)
        missing = [leaf for leaf in self.leaves if leaf not in self._rows]
        return [Work(leaf, leaf.num_pending, "last", self._hook(leaf)) for leaf in missing]

    def _hook(self, leaf: Sequence) -> Hook | None:
        return None if self.internals is None else self.internals.hook(leaf)

    def take(self, logits: Tensor) -> Tensor | None:
        """Keep the rows that came, [r, vocab_size]; all of them [len(leaves), vocab_size] once none is missing."""
        came = self.came
        if len(came) == len(self.leaves):
            return logits
        self._rows.update(zip(came, logits.clone(), strict=True))
        if len(self._rows) < len(self.leaves):
            return None
        return torch.stack([self._rows[leaf] for leaf in self.leaves])

    def split(self, parents: Seq[int]) -> None:
        """Leaf i from now on is what leaf parents[i] was; those that are the parent of none are freed."""
        before, taken = self.leaves, set[int]()
        self.leaves = []
        for parent in parents:
            self.leaves.append(before[parent].fork() if parent in taken else before[parent])
            taken.add(parent)
        for at, leaf in enumerate(before):
            if at not in taken:
                leaf.free()
        self._rows = {}

    def free(self) -> None:
        for leaf in self.leaves:
            leaf.free()


def _common_length(leaves: Seq[Sequence]) -> int:
    """How many tokens all begin with; the last of each is left out, since its logits are wanted."""
    columns = zip(*(leaf.token_ids[:-1] for leaf in leaves), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
