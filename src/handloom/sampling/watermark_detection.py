"""Whether a text carries a watermark: green tokens counted, and the coin flips of SynthID.

The counts and scores are those of transformers' `WatermarkDetector` and `SynthIDTextWatermarkDetector` for the same
configuration, which is the secret: whoever does not have it sees nothing.

This module does not know models, tokenizers, or how the text came about.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.errors import InvalidPrompt
from handloom.sampling.watermark import SynthID, Watermark, coin_flips, context_hash, green_tokens, sampling_table


@dataclass(frozen=True, slots=True)
class WatermarkScore:
    """How far `fraction` (of green tokens, or of heads) lies above what chance gives, in standard deviations.

    p_value: how often a text without the watermark would score as high; below 1e-3 at z_score 3.1.
    """

    num_tokens_scored: int
    fraction: float
    z_score: float

    @property
    def p_value(self) -> float:
        return 0.5 * math.erfc(self.z_score / math.sqrt(2))


def detect_watermark(
    token_ids: Sequence[int],
    watermark: Watermark,
    vocab_size: int,
    *,
    bos_token_id: int | None = None,
    ignore_repeated_ngrams: bool = False,
) -> WatermarkScore:
    """Count the green tokens of a text; a leading bos_token_id is not part of it.

    vocab_size: that of the model that wrote it, padding rows included. ignore_repeated_ngrams: count each context and
    token once, or a text that repeats itself scores itself up. Raises InvalidPrompt where nothing is left to score.
    """
    ids = list(token_ids[1:] if token_ids and token_ids[0] == bos_token_id else token_ids)
    width = watermark.context_width + (watermark.seeding_scheme == "lefthash")
    if len(ids) <= watermark.context_width:
        raise InvalidPrompt(f"{len(ids)} tokens; a context_width of {watermark.context_width} needs one more at least")
    ngrams = Counter(tuple(ids[end - width : end]) for end in range(width, len(ids) + 1))
    if ignore_repeated_ngrams:
        ngrams = Counter(ngrams.keys())
    total = ngrams.total()
    green = sum(count for ngram, count in ngrams.items() if _is_green(ngram, watermark, vocab_size))
    return _score(green, total, watermark.greenlist_ratio, total)


def _is_green(ngram: tuple[int, ...], watermark: Watermark, vocab_size: int) -> bool:
    context = ngram if watermark.seeding_scheme == "selfhash" else ngram[:-1]
    return bool((green_tokens(watermark, context, vocab_size) == ngram[-1]).any())


def detect_synthid(token_ids: Sequence[int], config: SynthID, *, eos_token_id: int | None = None) -> WatermarkScore:
    """Count the heads of a text's coin flips, over all tokens and keys, up to the first eos_token_id.

    Repeated contexts, which the watermark leaves alone, are not counted. Needs no training; a trained
    `synthid_posterior` tells more from the same flips. Raises InvalidPrompt where nothing is left to score.
    """
    mask = synthid_mask(token_ids, config, eos_token_id=eos_token_id)
    flips = synthid_flips(token_ids, config)[mask]
    if not len(flips):
        raise InvalidPrompt(
            f"no token to score; an ngram_len of {config.ngram_len} needs as many tokens before the end"
        )
    return _score(int(flips.sum()), flips.numel(), float(sampling_table(config).double().mean()), len(flips))


def synthid_flips(token_ids: Sequence[int], config: SynthID) -> Tensor:
    """The coin flip of each token under each key, 0 or 1: int8 [n - ngram_len + 1, keys]; the first have none."""
    ends = range(config.ngram_len, len(token_ids) + 1)
    hashes = torch.tensor(
        [context_hash(token_ids[end - config.ngram_len : end]) for end in ends], dtype=torch.int64, device="cpu"
    )
    coins = sampling_table(config)
    return torch.stack([coin_flips(coins, key, hashes) for key in config.keys], dim=1)


def synthid_mask(token_ids: Sequence[int], config: SynthID, *, eos_token_id: int | None = None) -> Tensor:
    """Which tokens count, bool [n - ngram_len + 1]: those before the first eos, in a context not met lately."""
    met = deque([0] * config.context_history_size, maxlen=config.context_history_size)
    ended = token_ids.index(eos_token_id) if eos_token_id is not None and eos_token_id in token_ids else len(token_ids)
    counts = []
    for at in range(config.ngram_len - 1, len(token_ids)):
        context = context_hash(token_ids[at - config.ngram_len + 1 : at])
        counts.append(context not in met and at < ended)
        met.append(context)
    return torch.tensor(counts, dtype=torch.bool, device="cpu")


def synthid_posterior(flips: Tensor, mask: Tensor, *, beta: Tensor, delta: Tensor, prior: float) -> float:
    """The probability that a text is watermarked, by Bayes, with the parameters of a trained detector.

    flips [n, keys] of `synthid_flips`, mask [n] of `synthid_mask`; beta [keys] and delta [keys, keys] are the
    parameters `likelihood_model_watermarked.beta` and `.delta` of transformers' BayesianDetectorModel without their
    leading dimensions of 1, prior its `prior`. Dathathri et al., Nature 634, 2024, supplement.
    """
    heads = flips.to(delta.dtype)
    two_unique = (heads @ delta.tril(-1).T + beta).sigmoid()
    watermarked = 0.5 * ((heads + 0.5) * two_unique + (1 - two_unique))
    odds = (watermarked.clamp(min=1e-30).log() - math.log(0.5)) * mask[:, None]
    prior = min(max(prior, 1e-5), 1 - 1e-5)
    return float((odds.sum() + math.log(prior) - math.log(1 - prior)).sigmoid())


def _score(hits: int, trials: int, chance: float, tokens: int) -> WatermarkScore:
    deviation = math.sqrt(trials * chance * (1 - chance))
    return WatermarkScore(tokens, hits / trials, (hits - chance * trials) / deviation if deviation else 0.0)
