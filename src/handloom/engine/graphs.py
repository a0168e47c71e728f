"""Captured decode steps: one for each number of rows, width of page tables and way to choose, made when first needed.

This module does not know requests, or what the rows of a step are about.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import NamedTuple

import torch

from handloom.cache.pages import PagePool
from handloom.engine.decode_step import NOWHERE, DecodeStep
from handloom.engine.memory import memory_report
from handloom.engine.stream import Step, Stream
from handloom.model.transformer import Transformer

logger = logging.getLogger("handloom")

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MIN_WIDTH = 64  # pages


class Way(NamedTuple):
    """How tokens are chosen; see `DecodeStep.run`."""

    drawn: bool
    cut: bool


def bucket_of(rows: int) -> int:
    """The smallest number of rows that steps are made for and these fit in; 0 where there is none."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), 0)


class DecodeGraphs:
    """A model's captured decode steps over one pool of pages, and the tensors they read and write.

    Those who queue steps take turns (`take`, `give_back`): between two steps their rows' state is in these tensors.
    warm_up_seconds: spent on capturing so far; num_captured: how often.
    """

    def __init__(
        self,
        transformer: Transformer,
        pool: PagePool,
        stream: Stream,
        *,
        max_rows: int = BUCKETS[-1],
        min_width: int = MIN_WIDTH,
    ) -> None:
        self.transformer, self.pool, self.stream = transformer, pool, stream
        self.max_rows, self.min_width = max_rows, min_width
        self.warm_up_seconds, self.num_captured = 0.0, 0
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        self._captured: dict[tuple[int, int, Way], Step] = {}
        self._turn = threading.Lock()
        self._holder: weakref.ref[object] | None = None

    @property
    def nbytes(self) -> int:
        """Of the tensors that steps share with the host; not of what is inside captured ones."""
        return sum(step.nbytes for step in self._steps.values())

    def take(self, holder: object) -> bool:
        """Try to take the turn, from now on; False while another holder that still exists has it."""
        with self._turn:
            if self._holder is not None and self._holder() not in (None, holder):
                return False
            self._holder = weakref.ref(holder)
            return True

    def give_back(self) -> None:
        """End the turn: for its holder, when all that it queued is done."""
        with self._turn:
            self._holder = None

    def ready(self, rows: int, pages: int, way: Way) -> tuple[DecodeStep, Step] | None:
        """Tensors for so many rows with so many pages each, and what queues their step. None: there is no memory.

        Where there is none for a step, larger ones are given up, and never tried again.
        """
        bucket, width = bucket_of(rows), self.min_width
        while width < pages:
            width *= 2
        if not 0 < bucket <= self.max_rows:
            return None
        key = bucket, width, way
        if key not in self._captured:
            try:
                self._capture(*key)
            except torch.OutOfMemoryError as error:
                self._shrink(bucket, error)
                return None
        return self._steps[bucket, width], self._captured[key]

    def _capture(self, rows: int, width: int, way: Way) -> None:
        started = time.perf_counter()
        step = self._steps.get((rows, width)) or DecodeStep(self.transformer, self.pool, rows, width)
        step.pages.fill_(NOWHERE)  # capturing runs it
        self._captured[rows, width, way] = self.stream.capture(lambda: step.run(drawn=way.drawn, cut=way.cut))
        self._steps[rows, width] = step
        seconds = time.perf_counter() - started
        self.warm_up_seconds, self.num_captured = self.warm_up_seconds + seconds, self.num_captured + 1
        ways = "top-k, top-p, min-p" if way.cut else "draws" if way.drawn else "most likely tokens"
        logger.info("decode step captured in %.2f s: %d rows, %d pages each, %s", seconds, rows, width, ways)

    def _shrink(self, failed: int, error: torch.OutOfMemoryError) -> None:
        """Let steps for `failed` rows and more go; the next smaller ones are the largest from now on."""
        self.max_rows = max((bucket for bucket in BUCKETS if bucket < failed), default=0)
        self.drop(self.max_rows + 1)
        logger.warning(
            "no memory to capture a decode step of %d rows; those of more than %d run kernel by kernel now. %s. %s",
            failed,
            self.max_rows,
            memory_report(self.transformer, self.pool, self.nbytes),
            str(error).partition("\n")[0][:200],
        )

    def drop(self, at_least: int = 0) -> None:
        """Give up what was captured for so many rows or more, and its memory, once what is queued is done."""
        self.stream.finish()
        for key in [key for key in self._captured if key[0] >= at_least]:
            del self._captured[key]
        for rows, width in [key for key in self._steps if key[0] >= at_least]:
            del self._steps[rows, width]
        self.stream.give_memory_back()
