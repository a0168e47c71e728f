"""From logits to a chosen token: the rules that reshape scores, and the draw.

The order of the rules is that of transformers' `generate`: repetition penalty, frequency and presence penalties, bias,
bans and grammar, then for sampled rows temperature, top-k, top-p, min-p.

This module does not know requests, grammars, or what a chosen token leads to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_UNIFORM = 1 - 2**-24  # the largest float32 below 1


class TokenState(NamedTuple):
    """Which tokens S sequences hold, for penalties.

    seen: [S, ceil(vocab_size / 32)] int32; bit i % 32 of word i // 32 is set if token i is in the prompt or was
    generated. counts: [S, vocab_size] int32, how often a token was generated; None where no penalty needs it.
    """

    seen: Tensor
    counts: Tensor | None = None


class Penalties(NamedTuple):
    """One float32 per row, [R] each; None is off for all rows.

    repetition: scores of seen tokens, once each: s < 0 ? s * r : s / r (Keskar et al. 2019, both signs as
    transformers); frequency: s - count * f; presence: s - p if count > 0 (OpenAI). Off: 1, 0, 0.
    """

    repetition: Tensor | None = None
    frequency: Tensor | None = None
    presence: Tensor | None = None


class Cuts(NamedTuple):
    """Where a row's scores (after temperature) are cut: those below scores [R] float32 go, and of those equal to it the
    ones with a token id above token_ids [R] int32."""

    scores: Tensor
    token_ids: Tensor


class Choice(NamedTuple):
    """token_ids [R] int64, -1 where nothing could be chosen; logprobs [R] float32 (NaN there);
    top_ids, top_logprobs [R, top_n], most likely first, lowest id first among equals."""

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """[..., W] int32 to [..., count] bool: entry i is bit i % 32 of word i // 32."""
    bits = words[..., None] >> torch.arange(32, device=words.device, dtype=torch.int32) & 1
    return bits.flatten(-2)[..., :count] != 0


def count_tokens(state: TokenState, rows: Tensor, token_ids: Tensor, generated: bool = True) -> None:
    """Note that sequence rows[i] holds token_ids[i] (int [N] both), in place; ids that the vocabulary lacks, and
    negative rows or ids, are passed over. Not `generated` (a prompt): only `seen` changes."""
    seen, counts = state
    for row, token_id in zip(rows.tolist(), token_ids.tolist()):
        if row >= 0 and 0 <= token_id < (seen.shape[1] * 32 if counts is None else counts.shape[1]):
            bit = 1 << token_id % 32
            seen[row, token_id // 32] |= bit - 2**32 if bit == 2**31 else bit
            if generated and counts is not None:
                counts[row, token_id] += 1


def adjust_logits(
    logits: Tensor,
    state: TokenState | None = None,
    penalties: Penalties | None = None,
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    ban_ids: Tensor | None = None,
    allowed: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Every rule that comes before temperature, in order; each one that is None is off.

    Args: logits [R, V]; state, penalties; bias_ids [R, M] int and bias [R, M] float32: values added to scores, ids
    distinct within a row; ban_ids [R, M] int: to -inf; in both a negative id, or one past V, says nothing; allowed
    [R, ceil(V / 32)] int32: a grammar's bitmask, 0 is forbidden; rows [R] int: which sequence of `state` each row is
    (None: its own number). A score of -inf stays -inf. Returns scores [R, V], float32 (float64 for float64).
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    count, vocab_size = scores.shape
    if state is not None and penalties is not None:
        at = torch.arange(count, device=scores.device) if rows is None else rows.long()
        seen = unpack_bits(state.seen[at], vocab_size)
        if penalties.repetition is not None:
            r = penalties.repetition[:, None]
            scores = torch.where(seen, torch.where(scores < 0, scores * r, scores / r), scores)
        if state.counts is not None:
            counts = state.counts[at]
            if penalties.frequency is not None:
                scores = scores - counts * penalties.frequency[:, None]
            if penalties.presence is not None:
                scores = scores - (counts > 0) * penalties.presence[:, None]
    if bias_ids is not None and bias is not None:
        row, column = ((bias_ids >= 0) & (bias_ids < vocab_size)).nonzero(as_tuple=True)
        ids = bias_ids[row, column].long()
        old = scores[row, ids]
        scores[row, ids] = torch.where(old == -torch.inf, old, old + bias[row, column].to(scores.dtype))
    if ban_ids is not None:
        row, column = ((ban_ids >= 0) & (ban_ids < vocab_size)).nonzero(as_tuple=True)
        scores[row, ban_ids[row, column].long()] = -torch.inf
    if allowed is not None:
        scores = scores.masked_fill(~unpack_bits(allowed, vocab_size), -torch.inf)
    return scores


def select(
    scores: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Scores divided by the temperature; everything but what top-k, then top-p, then min-p leave goes to -inf.

    Args: scores [R, V]; each rule one value per row, [R], None is off for all: temperature float32 (0: the row is
    greedy and stays as it is); top_k int32, off at 0: scores below the k-th highest go, ties with it stay; top_p
    float32, off at 1: a token stays if the tokens before it have less than p of the mass (Holtzman et al. 2020), in
    the order of falling score and, among equals, rising token id; the first always stays; min_p float32, off at 0:
    tokens less likely than min_p times the most likely one go (Nguyen et al. 2024). A row without a finite score, or
    with NaN or +inf, is only divided. Probabilities are float64. Returns [R, V], float32 (float64 for float64).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)
    for row, each in enumerate(scores):
        t = None if temperature is None else temperature[row]
        if t is not None and t == 0:
            continue
        if t is not None:
            each /= t
        if each.isfinite().any() and not (each.isnan() | (each == torch.inf)).any():
            k = 0 if top_k is None else int(top_k[row])
            p = 1.0 if top_p is None else float(top_p[row])
            least = 0.0 if min_p is None else float(min_p[row])
            each[~_kept(each.double(), k, p, least)] = -torch.inf
    return scores


def _kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which of scores [V] float64 stay."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < len(scores):
        kept &= scores >= scores.topk(top_k).values[-1]
    if top_p < 1.0:
        falling, token_ids = scores.masked_fill(~kept, -torch.inf).sort(descending=True, stable=True)
        probabilities = falling.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        enough = before >= top_p
        enough[0] = False
        kept[token_ids[enough]] = False
    if min_p > 0.0:
        kept &= (scores - scores.max()).exp() >= min_p
    return kept


def find_cuts(
    scores: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Cuts:
    """What `select` cuts, without the scores it leaves: the lowest score kept (float32) and the highest token id kept
    among its equals (2^31 - 1 where all stay). Rows that are left whole: -inf."""
    kept = select(scores, temperature, top_k, top_p, min_p)
    shaped = select(scores, temperature)
    lowest = torch.where(kept > -torch.inf, kept, torch.inf).amin(-1)
    whole = (kept == shaped).all(-1) | kept.isnan().any(-1)
    lowest = torch.where(whole, -torch.inf, lowest)
    token_ids = torch.arange(scores.shape[1], device=scores.device)
    last = torch.where(kept == lowest[:, None], token_ids, -1).amax(-1)
    all_stay = ((kept == lowest[:, None]) == (shaped == lowest[:, None])).all(-1)
    return Cuts(lowest.float(), torch.where(all_stay | whole, 2**31 - 1, last).to(torch.int32))


def philox_4x32_10(counter: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """The first random 32-bit word of Philox-4x32-10 (Salmon et al., SC 2011) at the counter words (c0, c1, 0, 0):
    int64 tensors with values in [0, 2^32) in and out, broadcast against each other."""
    (c0, c1), (k0, k1) = counter, key
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        first, second = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c1 = (first >> 32 ^ c1 ^ k0) & 0xFFFFFFFF, first & 0xFFFFFFFF
        c2, c3 = (second >> 32 ^ c3 ^ k1) & 0xFFFFFFFF, second & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of int64 tensors that broadcast: seeds (read as unsigned), positions, token ids.

    With u the random word: U = min((u + 0.5) / 2^32, 1 - 2^-24), noise = -log(-log1p(-U)).
    """
    word = philox_4x32_10((token_ids, positions), (seeds & 0xFFFFFFFF, seeds >> 32 & 0xFFFFFFFF))
    uniform = ((word.float() + 0.5) * 2.0**-32).clamp(max=_LARGEST_UNIFORM)
    return -torch.log(-torch.log1p(-uniform))


def draw(
    scores: Tensor,
    seeds: Tensor | None,
    positions: Tensor | None,
    temperature: Tensor | None = None,
    greedy: Tensor | None = None,
    logits: Tensor | None = None,
    cuts: Cuts | None = None,
    top_n: int = 0,
) -> Choice:
    """Choose one token per row: argmax(scores) for greedy rows, else argmax(scores + Gumbel noise), which has the
    distribution softmax(scores); the lowest token id among equals.

    Args: scores [R, V]; seeds, positions [R] int64 (None: every row is greedy), positions counting the prompt;
    temperature [R] float32 divides the scores, 0 is greedy; greedy [R] bool; logits [R, V]: what log-probabilities are
    of, before any rule, if not `scores`; cuts: tokens to leave out; top_n: how many of the most likely to report.
    """
    raw = (scores if logits is None else logits).to(torch.promote_types(scores.dtype, torch.float32))
    shaped = scores.to(raw.dtype)
    best = torch.zeros(len(scores), dtype=torch.bool, device=scores.device) if greedy is None else greedy
    if temperature is not None:
        best = best | (temperature == 0)
        shaped = shaped / torch.where(best, 1.0, temperature)[:, None]
    token_ids = torch.arange(scores.shape[1], device=scores.device)
    if cuts is not None:
        lowest, last = cuts.scores[:, None], cuts.token_ids[:, None]
        gone = (shaped < lowest) | ((shaped == lowest) & (token_ids > last))
        shaped = shaped.masked_fill(gone, -torch.inf)
    if seeds is not None and positions is not None:
        noise = gumbel_noise(seeds[:, None], positions[:, None], token_ids)
        totals = torch.where(best[:, None], shaped, shaped + noise)
    else:
        best, totals = torch.ones_like(best), shaped
    chosen = totals.argmax(-1)
    logprobs = raw.log_softmax(-1)
    highest = shaped.amax(-1)
    well = logprobs.isnan().logical_not().all(-1) & (highest.isfinite() | (best & (highest == torch.inf)))
    top = logprobs.sort(dim=-1, descending=True, stable=True)
    return Choice(
        torch.where(well, chosen, -1),
        torch.where(well, logprobs.gather(1, chosen[:, None])[:, 0], torch.nan).float(),
        torch.where(well[:, None], top.indices[:, :top_n], -1),
        torch.where(well[:, None], top.values[:, :top_n], torch.nan).float(),
    )
