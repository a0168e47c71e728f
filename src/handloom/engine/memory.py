"""Who holds a device's memory, in bytes, and how much smaller a step gets where there is too little.

This module does not know requests, or what a step computes.
"""

from __future__ import annotations

import logging

import torch

from handloom.cache.pages import PagePool
from handloom.errors import OutOfMemory
from handloom.model.transformer import Transformer

logger = logging.getLogger("handloom")

GOOD_STEPS, MOST_GOOD_STEPS = 256, 2**16
"""After so many steps without a shortage a larger one is tried, at first and at most."""


def memory_report(transformer: Transformer, pool: PagePool, decode_steps: int) -> str:
    """Bytes by owner in one line: "bytes on cuda:0: weights 2471645184, KV cache 5368709120, …".

    decode_steps: of their tensors. On a GPU also what else torch holds (graphs, activations, unused), what is not this
    process's torch, and what is free.
    """
    owners = {
        "weights": sum(transformer.weights.nbytes().values()),
        "KV cache": pool.num_pages * pool.page_bytes,
        "decode steps": decode_steps,
    }
    if pool.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(pool.device)
        held = torch.cuda.memory_reserved(pool.device)
        owners["graphs and activations"] = max(0, held - sum(owners.values()))
        owners["others"] = max(0, total - free - held)
        owners["free"] = free
    return f"bytes on {pool.device}: " + ", ".join(f"{owner} {size}" for owner, size in owners.items())


class StepSize:
    """The most tokens of a step, `now`: half of one that found no memory, twice as many after many good ones.

    It never goes past what was asked for, and waits twice as long after each shortage.
    """

    def __init__(self, asked: int) -> None:
        self._asked = self.now = asked
        self._good, self._wait = 0, GOOD_STEPS // 2

    def shrink(self, num_tokens: int, report: str, error: torch.OutOfMemoryError) -> None:
        """There was no memory for a step of num_tokens. Raises OutOfMemory where that is one."""
        self.now = smaller_step(num_tokens, report, error)
        self._good, self._wait = 0, min(2 * self._wait, MOST_GOOD_STEPS)

    def ran(self) -> None:
        """A step was good."""
        if self.now == self._asked:
            return
        self._good += 1
        if self._good == self._wait:
            self.now, self._good = min(2 * self.now, self._asked), 0


def smaller_step(num_tokens: int, report: str, error: torch.OutOfMemoryError) -> int:
    """Of how many tokens a step may be, where there was no memory for one of num_tokens. Raises OutOfMemory for one."""
    if num_tokens == 1:
        raise OutOfMemory(
            f"no memory for a step of one token; load the model with a smaller KV cache. {report}"
        ) from error
    fewer = num_tokens // 2
    logger.warning("no memory for a step of %d tokens; they have at most %d now. %s", num_tokens, fewer, report)
    return fewer
