"""The suite `throughput`: nano-vllm's benchmark (github.com/GeeeekExplorer/nano-vllm, bench.py), its 256 requests drawn
as it draws them; greedy here, for everybody."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import handloom as hl
from common import Results, add_use, check_same_tokens
from contenders import OURS, Handloom
from handloom.engine.graphs import BUCKETS, Way
from handloom.engine.stream import CudaStream, EagerStream
from handloom.loading import PAGE_SIZE
from handloom.measure import limits, peer_serving
from handloom.measure.peer import Transformers
from handloom.measure.workload import Asked
from random_llama import as_transformers, make
from throughput import add_comparison

if TYPE_CHECKING:
    from gpu import Session

STEP_TOKENS = 8192
"""Of one forward pass; nano-vllm's limit is 16384."""


def draw(count: int, most: int) -> list[Asked]:
    """Prompts of 100 to `most` tokens of the first 10000, and as many new ones."""
    source = random.Random(0)
    prompts = [[source.randint(0, 10000) for _ in range(source.randint(100, most))] for _ in range(count)]
    return [Asked(prompt, source.randint(100, most)) for prompt in prompts]


def measure(session: Session) -> None:
    """handloom alone, and then in turn with its peers: one that hangs does not take its numbers away."""
    arguments, on_gpu = session.arguments, session.device.type == "cuda"
    for shape in arguments.shapes:
        results = session.results("throughput", f"llama {shape}, random")
        requests = draw(256, 1024)
        if arguments.small:
            requests = [Asked([token % 512 for token in r.prompt[:9]], 3 + r.new_tokens % 4) for r in requests[:5]]
        name = f"{len(requests)} requests, {sum(r.new_tokens for r in requests)} new tokens"
        tokens = sum(len(request.prompt) + request.new_tokens + PAGE_SIZE for request in requests)
        lm = make(shape, session.dtype, session.device, arguments.backend, tokens)
        ours = Handloom(lm, CudaStream(lm.device) if on_gpu else EagerStream())
        lm.graphs = ours.graphs
        assert lm.graphs is not None
        if on_gpu:  # as nano-vllm does before it takes the time
            pages = -(-max(len(request.prompt) + request.new_tokens for request in requests) // PAGE_SIZE)
            for rows in BUCKETS:
                for width in {min(64, pages), pages}:
                    lm.graphs.ready(rows, width, Way(drawn=False, cut=False))
        session.case(results, name, partial(_serve, session, lm, requests, name, results, peers=False))
        if "continuous" in arguments.peers or arguments.batches:
            beside = f"{name}, in turn"
            session.case(results, beside, partial(_serve, session, lm, requests, beside, results, peers=True))


def _serve(session: Session, lm: hl.LM, requests: Sequence[Asked], name: str, results: Results, *, peers: bool) -> None:
    arguments = session.arguments

    def load_peer() -> Transformers:
        peer = Transformers(as_transformers(lm))
        check_same_tokens(lm, peer, requests[0].prompt, 8)
        return peer

    found = peer_serving.in_turn(
        lm,
        requests,
        lambda who, total: nullcontext(lambda done: None),
        max_step_tokens=STEP_TOKENS,
        load_peer=load_peer if peers else None,
        batch_sizes=arguments.batches,
        with_continuous="continuous" in arguments.peers,
    )
    for peer, why in found.failed.items():
        session.failures.add(name, peer, why)
        print(f"{name}: {peer}: {why}", file=sys.stderr)
    add_comparison(found, lm, requests, name, session.rates.bandwidth, session.rates.matmul, results)
    assert lm.graphs is not None
    results.add(OURS, name, "captured in", "s", [lm.graphs.warm_up_seconds])
    flops, moved = limits.serving_work(lm, lm.dtype, [(len(r.prompt), r.new_tokens) for r in requests])
    for peer, runs in {OURS: found.ours, **found.theirs}.items():
        add_use(results, peer, name, [run.seconds for run in runs], moved, flops, session.rates)
