"""The whole way of a token, for one sequence: the shortest honest version of what the engine does.

Read this first. The engine does the same for many sequences at once; tests hold the two equal.
This module does not know batches of requests, stop strings, streaming or errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from handloom.cache.batch import Work, build_batch
from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence as Cached
from handloom.model.transformer import Transformer
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import RequestRules, Row
from handloom.sampling.sampler import choose


def generate(model: Transformer, pool: PagePool, prompt: Sequence[int], params: GenerationParams) -> Iterator[int]:
    """Yield the token ids that follow `prompt`, up to and including an eos or max_new_tokens of them."""
    sequence, rules = Cached(pool, prompt), RequestRules(params, len(prompt))
    try:
        for _ in range(params.max_new_tokens):
            batch = build_batch([Work(sequence, sequence.num_pending, "last")], pool)
            logits = model.forward(batch, pool.layers)
            sequence.num_computed = len(sequence)
            token_id = choose(logits, [Row(params, sequence.token_ids, len(prompt), rules)]).token_ids[0]
            sequence.append(token_id)
            yield token_id
            if token_id in params.eos_token_id:
                return
    finally:
        sequence.free()
