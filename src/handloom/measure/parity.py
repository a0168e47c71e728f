"""Whether handloom computes what transformers computes, on this checkpoint and these prompts.

The test of the tokens: greedy sequences are equal, or at the first mismatch both choices score the same within a
tolerance: two right answers. The test of the logits: both are fed the same tokens (prompt and transformers' output),
and the largest difference at any position is small beside the largest logit.

This module does not know how results are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.cache.batch import Work, build_batch
from handloom.lm import LM
from handloom.measure.peer import Transformers

MAX_POSITIONS = 512
CHUNK = 128


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    """The relative differences allowed: "tie" between two scores, "logits" between the logits.

    In float32 those of the project's parity tests. In bfloat16 and float16 rounding alone, of either engine, makes
    some percent over thirty layers: there only a gross error shows.
    """
    return {"tie": 1e-5, "logits": 1e-4} if dtype == torch.float32 else {"tie": 5e-2, "logits": 5e-2}


@dataclass(frozen=True, slots=True)
class PromptParity:
    """One prompt. mismatch: index of the first new token that differs, None where the outputs are equal.

    ours, theirs: the new tokens. tied: whether the two choices there score the same within the tolerance;
    score_gap: their relative distance. logits_difference: largest |difference| at any position over the
    largest |logit|; positions: how many were compared (the last ones). ok: tokens and logits pass.
    """

    prompt_tokens: int
    ours: list[int]
    theirs: list[int]
    mismatch: int | None
    tied: bool
    score_gap: float
    logits_difference: float
    positions: int
    ok: bool


def compare(lm: LM, peer: Transformers, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[PromptParity]:
    """Compare on every prompt: handloom runs them in one batch, transformers one by one.

    Both honour the model's generation_config.json, greedily. Raises what LM.generate raises.
    """
    outputs = lm.generate([list(prompt) for prompt in prompts], do_sample=False, max_new_tokens=max_new_tokens)
    found: list[PromptParity] = []
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.error is not None:
            raise output.error
        theirs, scores = peer.greedy(prompt, max_new_tokens)
        found.append(_judge(lm, peer, prompt, output.token_ids, theirs, scores))
    return found


def _judge(
    lm: LM, peer: Transformers, prompt: Sequence[int], ours: list[int], theirs: list[int], scores: Sequence[Tensor]
) -> PromptParity:
    allowed, at = tolerances(lm.dtype), first_mismatch(ours, theirs)
    gap = 0.0 if at is None else _score_gap(ours, theirs, at, scores)
    tied = gap <= allowed["tie"]
    ids = [*prompt, *theirs]
    positions = min(len(ids), MAX_POSITIONS)
    difference = logits_difference(our_last_logits(lm, ids, positions), peer.last_logits(ids, positions))
    ok = tied and difference <= allowed["logits"]
    return PromptParity(len(prompt), ours, theirs, at, tied, gap, difference, positions, ok)


def first_mismatch(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that differs or that only one of them has; None for equal sequences."""
    for at, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return at
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _score_gap(ours: Sequence[int], theirs: Sequence[int], at: int, scores: Sequence[Tensor]) -> float:
    """|difference| of the two choices' scores over the larger; infinite where one output ended before."""
    if at >= min(len(ours), len(theirs)):
        return float("inf")
    a, b = scores[at][0, ours[at]].item(), scores[at][0, theirs[at]].item()
    return abs(a - b) / max(abs(a), abs(b), torch.finfo(torch.float32).tiny)


def our_last_logits(lm: LM, ids: Sequence[int], count: int) -> Iterator[Tensor]:
    """handloom's logits at the last `count` positions of a sequence, in pieces [n, vocab_size] float32."""
    with lm.sequence(list(ids)) as sequence:
        while sequence.num_pending:
            skip = sequence.num_pending - count
            work = Work(sequence, min(skip, CHUNK), "none") if skip > 0 else None
            work = work or Work(sequence, min(sequence.num_pending, CHUNK), "all")
            logits = lm.transformer.forward(build_batch([work], lm.pool), lm.pool.layers)
            sequence.num_computed += work.num_tokens
            if work.num_rows:
                yield logits


def logits_difference(ours: Iterator[Tensor], theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs| over all positions and tokens; infinite if anything is not finite."""
    worst, at = 0.0, 0
    for piece in ours:
        worst = max(worst, (piece - theirs[at : at + len(piece)]).abs().max().nan_to_num(nan=torch.inf).item())
        at += len(piece)
    scale = theirs.abs().max().item()
    return worst / scale if scale > 0 and worst < float("inf") else float("inf")
