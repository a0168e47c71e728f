"""From logits to chosen tokens, for all rows of a step at once.

The rules that reshape the scores, and their order, are in `handloom.sampling.rules`.

Whatever goes wrong goes wrong for one row: logits that are not a number, nothing left to choose, a processor that
raises. Log-probabilities are those of the model itself, before any rule (as vLLM and OpenAI report them); what
the rules made of them is `scores`.

This module does not know sequences, pages, text, or what a chosen token leads to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.errors import HandloomError, NonFiniteLogits
from handloom.ops.torch_threads import one_thread
from handloom.sampling import rng
from handloom.sampling.rules import Row, apply_rules, nothing_left

CPU_BLOCK = 2**18  # scores shaped at a time on a CPU, so that they and what is made of them stay in its cache
LOGPROB_BLOCK = 2**23  # logits turned into log-probabilities at a time


@dataclass(slots=True)
class Choice:
    """What was chosen for R rows; every list has R entries."""

    token_ids: list[int]  # -1 where the row has an error
    logprobs: list[float | None]  # log-softmax of the raw logits at the chosen token, where asked for
    top_logprobs: list[list[tuple[int, float]] | None]  # the n most likely (token id, logprob), most likely first
    scores: list[Tensor | None]  # processed scores [V] float32, where output_scores
    logits: list[Tensor | None]  # raw logits [V] float32, where output_logits
    errors: list[HandloomError | None]  # that row's own failure


@dataclass(frozen=True, slots=True)
class Draws:
    """Rows of one request with several outputs: row i is output places[i] of `count`.

    With rng="torch" they are drawn by one call for all outputs, those that are over among them, as transformers does.
    """

    places: Sequence[int]
    count: int


def choose(logits: Tensor, rows: Sequence[Row], draws: Draws | None = None) -> Choice:
    """Choose one token per row of `logits` [R, V] (any float dtype; left as it is).

    Greedy rows take the highest score, the lowest id among equals. Sampled rows draw by
    (seed, number of tokens in the sequence); with rng="torch", by torch.multinomial on the global generator, in
    row order, or together where `draws` says so. Rows with NaN or +inf logits, without a finite score, or with a
    failing processor get an error.
    """
    best, ids = _highest(logits)  # one pass finds both the greedy tokens and every NaN and +inf
    nothing: list[None] = [None] * len(rows)
    choice = Choice(ids, [*nothing], [*nothing], [*nothing], [*nothing], [*nothing])
    for row, value in enumerate(best):
        if not math.isfinite(value) and not rows[row].params.remove_invalid_values:
            _fail(choice, row, _not_finite("the model's logits", value, rows[row]))
    well = [row for row, error in enumerate(choice.errors) if error is None]
    shaped = [row for row in well if rows[row].rules.shapes]
    if shaped:
        together = draws is not None or not logits.is_cpu
        size = len(rows) if together else max(1, CPU_BLOCK // logits.shape[1])
        for start in range(0, len(shaped), size):
            _choose_shaped(logits, rows, shaped[start : start + size], choice, draws)
    if any(rows[row].rules.reports for row in well):
        _report(logits, rows, choice)
    return choice


def token_logprobs(
    logits: Tensor, token_ids: Tensor, top_n: int = 0
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Log-probabilities of tokens: `token_ids` int64 [N] under `logits` [N, V], any float dtype.

    Returns ([N] logprobs, [N] lists of the `top_n` most likely (token id, logprob), most likely first and the
    lowest id first among equals). Log-softmax in float32; rows with NaN or +inf logits give NaN.
    """
    chosen: list[float] = []
    top: list[list[tuple[int, float]]] = []
    block = max(1, LOGPROB_BLOCK // logits.shape[1])
    for part, ids in zip(logits.split(block), token_ids.split(block), strict=True):
        logprobs = part.to(torch.float32).log_softmax(dim=-1)
        chosen += logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
        best = logprobs.topk(min(top_n, logits.shape[1]))
        pairs = (zip(i, v, strict=True) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        top += [sorted(row, key=lambda pair: (-pair[1], pair[0])) for row in pairs]
    return chosen, top


@one_thread()
def _choose_shaped(logits: Tensor, rows: Sequence[Row], shaped: list[int], choice: Choice, draws: Draws | None) -> None:
    """Apply the rules to the rows named in `shaped` and choose their tokens, into `choice`."""
    scores = _float32_copy(logits, shaped)
    group = [rows[row] for row in shaped]
    errors = apply_rules(scores, group)
    best, ids = _highest(scores)
    for at, row in enumerate(group):
        forced = best[at] == torch.inf and not row.params.do_sample  # +inf is a way to say: this token
        if errors[at] is None and not forced and not math.isfinite(best[at]):
            errors[at] = (
                nothing_left(row) if best[at] == -torch.inf else _not_finite("the processed scores", best[at], row)
            )
    places = None if draws is None else Draws([draws.places[row] for row in shaped], draws.count)
    for at, token_id in _draw(scores, group, errors, places).items():
        ids[at] = token_id
    for at, index in enumerate(shaped):
        error = errors[at]
        if error is not None:
            _fail(choice, index, error)
            continue
        choice.token_ids[index] = ids[at]
        if group[at].params.output_scores:
            choice.scores[index] = scores[at].clone()


def _draw(
    scores: Tensor, rows: Sequence[Row], errors: Sequence[HandloomError | None], draws: Draws | None
) -> dict[int, int]:
    """The token ids of the sampled rows, by index of the row."""
    sampled = [at for at, row in enumerate(rows) if row.params.do_sample and errors[at] is None]
    counted = [at for at in sampled if rows[at].params.rng == "counter"]
    drawn: dict[int, int] = {}
    if counted:
        part = scores if len(counted) == len(rows) else scores[counted]
        seeds = [rows[at].params.seed for at in counted]
        positions = [len(rows[at].token_ids) for at in counted]
        drawn.update(zip(counted, rng.sample(part, seeds, positions), strict=True))
    rest = [at for at in sampled if at not in drawn]
    if draws is not None and rest:
        probabilities = torch.ones(draws.count, scores.shape[1], dtype=torch.float32, device=scores.device)
        probabilities[[draws.places[at] for at in rest]] = scores[rest].softmax(dim=-1)
        ids = torch.multinomial(probabilities, num_samples=1).flatten().tolist()
        drawn.update((at, ids[draws.places[at]]) for at in rest)
        return drawn
    for at in rest:
        drawn[at] = int(torch.multinomial(scores[at : at + 1].softmax(dim=-1), num_samples=1))
    return drawn


@one_thread()
def _report(logits: Tensor, rows: Sequence[Row], choice: Choice) -> None:
    """Log-probabilities, raw logits, and the scores that no rule touched, where asked for, into `choice`."""
    well = [row for row, error in enumerate(choice.errors) if error is None]
    for row in well:
        if rows[row].params.output_logits:
            choice.logits[row] = logits[row].to(torch.float32, copy=True)
        if rows[row].params.output_scores and choice.scores[row] is None:
            choice.scores[row] = logits[row].to(torch.float32, copy=True)
    counts = {row: count for row in well if (count := rows[row].params.logprobs) is not None}
    if not counts:
        return
    asked = list(counts)
    chosen = torch.tensor([choice.token_ids[row] for row in asked], device=logits.device)
    logprobs, top = token_logprobs(logits[asked], chosen, max(counts.values()))
    for at, row in enumerate(asked):
        choice.logprobs[row], choice.top_logprobs[row] = logprobs[at], top[at][: counts[row]]


def _highest(scores: Tensor) -> tuple[list[float], list[int]]:
    """Of each row of [R, V] the highest value, and the lowest id that has it; a NaN, and its id, where there is one."""
    if not scores.is_cpu or scores.dtype == torch.bfloat16:
        with one_thread():
            values, ids = scores.max(dim=-1)
        return values.tolist(), ids.tolist()
    rows = (scores.detach() if scores.requires_grad else scores).numpy()  # torch's own search would wake its threads
    places: list[int] = rows.argmax(axis=1).tolist()
    return [rows.item(row, place) for row, place in enumerate(places)], places


def _float32_copy(logits: Tensor, rows: list[int]) -> Tensor:
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.detach().numpy()[rows if len(rows) < len(logits) else slice(None)].copy())
    if len(rows) == logits.shape[0]:
        return logits.to(torch.float32, copy=True)
    return logits[rows].to(torch.float32)


def _fail(choice: Choice, row: int, error: HandloomError) -> None:
    choice.errors[row], choice.token_ids[row] = error, -1


def _not_finite(what: str, best: float, row: Row) -> NonFiniteLogits:
    found = {torch.inf: "contain +inf", -torch.inf: "are all -inf: nothing is left to choose"}.get(best, "contain NaN")
    way_out = "check the weights and the dtype" if what == "the model's logits" else "check the logits processors"
    return NonFiniteLogits(f"{what} for the token at position {len(row.token_ids)} {found}; {way_out}")
