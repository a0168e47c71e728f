"""A device's queue for tests without a device: it does what it was given late, and in order.

How late is up to chance: each time the host comes by, some of what is queued has been done. Whoever reads before
waiting, or counts on what is not there yet, finds out.
"""

from __future__ import annotations

import random
from collections import deque

import torch
from torch import Tensor

from handloom.engine.stream import Step, Wait


class LateStream:
    """A `Stream` on the CPU. fails: so many of the next captures find no memory."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.queue: deque[Step] = deque()
        self.done = 0
        self.most_queued = 0
        self.num_launched = 0
        self.fails = 0

    def capture(self, step: Step) -> Step:
        self.catch_up()
        if self.fails:
            self.fails -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        step()

        def launch() -> None:
            self.num_launched += 1
            self._give(step)

        return launch

    def upload(self, values: Tensor, into: Tensor) -> None:
        self._give(lambda: into.copy_(values))

    def fetch(self, source: Tensor) -> Wait:
        values = torch.full_like(source, torch.nan)
        self._give(lambda: values.copy_(source))
        self.most_queued = max(self.most_queued, len(self.queue))
        end = self.done + len(self.queue)

        def wait() -> Tensor:
            self.catch_up(end)
            return values

        return wait

    def finish(self) -> None:
        self.catch_up()

    def give_memory_back(self) -> None:
        assert not self.queue, "what is captured must not be given up while it is queued"

    def catch_up(self, end: int | None = None) -> None:
        """Do what is queued, or all until so much has been done in all."""
        while self.queue and (end is None or self.done < end):
            self.queue.popleft()()
            self.done += 1

    def _give(self, step: Step) -> None:
        self.queue.append(step)
        self.catch_up(self.done + self.random.randint(0, len(self.queue)) * self.random.randint(0, 1))
