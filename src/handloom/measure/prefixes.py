"""What the prefix cache brings where requests begin alike, and costs where none do.

This module does not know how results are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handloom.lm import LM
from handloom.measure.serving import ServingRun, serve
from handloom.measure.speed import check_room, random_ids
from handloom.measure.stats import interleave
from handloom.measure.workload import Asked


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Runs by round. off, on: requests that share nothing, all at once, without the cache and with it; cold, warm: the
    same questions after one system prompt, one request after another, without the cache and with it."""

    off: list[ServingRun]
    on: list[ServingRun]
    cold: list[list[ServingRun]]
    warm: list[list[ServingRun]]

    @property
    def costs(self) -> list[float]:
        """Of each round, the share of time that the cache adds where it finds nothing."""
        return [on.seconds / off.seconds - 1 for on, off in zip(self.on, self.off, strict=True)]

    @property
    def hit_rate(self) -> float:
        """Share of the warm prompts' tokens that were cached."""
        rates = [run.hit_rate for runs in self.warm for run in runs]
        return sum(rates) / len(rates)


def measure(
    lm: LM,
    *,
    count: int,
    shared: int,
    own: int,
    new_tokens: int,
    rounds: int,
    seed: int = 0,
) -> Prefixes:
    """`count` requests of `shared` + `own` prompt tokens, in `rounds` rounds after one to warm up.

    Raises ContextOverflow before anything runs, and what `serve` raises.
    """
    check_room(lm, shared + own, new_tokens)
    vocab_size = lm.spec.vocab_size
    system = random_ids(vocab_size, shared, seed)
    different = [Asked(random_ids(vocab_size, shared + own, seed + 1 + i), new_tokens) for i in range(count)]
    alike = [Asked(system + random_ids(vocab_size, own, seed + 1 + i), new_tokens) for i in range(count)]

    taken = interleave(
        {
            "off": lambda: [serve(lm, different, prefix_cache=False)],
            "on": lambda: [serve(lm, different)],
            "cold": lambda: one_by_one(lm, alike, prefix_cache=False),
            "warm": lambda: one_by_one(lm, alike, prefix_cache=True)[1:],
        },
        rounds=rounds,
    )
    lm.pool.forget_cached()
    single = {name: [runs[0] for runs in taken[name]] for name in ("off", "on")}
    return Prefixes(single["off"], single["on"], taken["cold"], taken["warm"])


def one_by_one(lm: LM, requests: Sequence[Asked], *, prefix_cache: bool) -> list[ServingRun]:
    """Each request alone; what they cache stays until the last."""
    lm.pool.forget_cached()
    return [serve(lm, [request], prefix_cache=prefix_cache, keep_cached=True) for request in requests]
