"""Watermarks: which tokens a key favours, as a function of the tokens before.

Two schemes, with the numbers of transformers' processors, so that either side detects what the other wrote. The green
lists of `Watermark` come from torch's CPU generator on every device; transformers on a GPU draws others.

This module does not know requests, or how a watermark is found in a text (`handloom.sampling.watermark_detection`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

_TABLE_SIZE = 1_000_003
_CANDIDATES = 40  # with selfhash, so many of the likeliest tokens are tried
_MULTIPLIER = 6364136223846793005


@dataclass(frozen=True, slots=True)
class Watermark:
    """Green and red lists (Kirchenbauer et al., 2023, arXiv 2301.10226 and 2306.04634); fields as in transformers.

    A part `greenlist_ratio` of the vocabulary, drawn anew after each token, gets `bias` added to its scores.
    seeding_scheme: "lefthash" draws by the last token, "selfhash" by the last context_width tokens, the new one
    among them. Sequences of fewer than context_width tokens get no bias.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: Literal["lefthash", "selfhash"] = "lefthash"
    context_width: int = 1


@dataclass(frozen=True, slots=True)
class SynthID:
    """Tournament sampling (Dathathri et al., "Scalable watermarking", Nature 634, 2024); fields as in transformers.

    Each of the keys is one round, which favours the tokens that a table of coin flips gives a 1 for the hash of
    key, token and the ngram_len - 1 tokens before. A context met among the last context_history_size is left alone.
    """

    ngram_len: int
    keys: tuple[int, ...]
    context_history_size: int = 1024
    sampling_table_seed: int = 0
    sampling_table_size: int = 2**16
    skip_first_ngram_calls: bool = False
    debug_mode: bool = False


def green_tokens(watermark: Watermark, token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """The green list after `token_ids`, int64 [greenlist_ratio * vocab_size]; with selfhash the last one is tried."""
    if watermark.seeding_scheme == "selfhash":
        table = _fixed_table(watermark.hashing_key)
        context = torch.tensor(token_ids[-watermark.context_width :], device="cpu")
        hashes = table[context % _TABLE_SIZE] + 1
        seed = int((watermark.hashing_key * hashes * hashes[-1]).min())
    else:
        seed = watermark.hashing_key * token_ids[-1]
    generator = torch.Generator().manual_seed(seed % (2**64 - 1))
    return torch.randperm(vocab_size, generator=generator, device="cpu")[: int(vocab_size * watermark.greenlist_ratio)]


@lru_cache(maxsize=4)
def _fixed_table(key: int) -> Tensor:
    return torch.randperm(_TABLE_SIZE, generator=torch.Generator().manual_seed(key), device="cpu")


def favour_green(scores: Tensor, watermarks: Sequence[Watermark | None], token_ids: Sequence[Sequence[int]]) -> None:
    """Adds the bias to the green tokens of each row of `scores` [R, V] float32. Off: None."""
    for row, (watermark, sequence) in enumerate(zip(watermarks, token_ids, strict=True)):
        if watermark is None or len(sequence) < watermark.context_width:
            continue
        if watermark.seeding_scheme == "selfhash":
            green = torch.tensor(_green_candidates(watermark, sequence, scores[row]), dtype=torch.int64, device="cpu")
        else:
            green = green_tokens(watermark, sequence, scores.shape[1])
        scores[row, green.to(scores.device)] += watermark.bias


def _green_candidates(watermark: Watermark, token_ids: Sequence[int], scores: Tensor) -> list[int]:
    """Those of the likeliest tokens that are in the green list which they themselves lead to."""
    before = list(token_ids[len(token_ids) - watermark.context_width + 1 :])
    likeliest: list[int] = scores.sort(descending=True).indices[:_CANDIDATES].tolist()
    return [
        token for token in likeliest if bool((green_tokens(watermark, [*before, token], len(scores)) == token).any())
    ]


def apply_watermarks(
    scores: Tensor,
    configs: Sequence[Watermark | SynthID | None],
    contexts: Sequence[SynthIDContext | None],
    token_ids: Sequence[Sequence[int]],
) -> None:
    """Each row's watermark, of either scheme, into `scores` [R, V] float32. Off: None."""
    favour_green(scores, [each if isinstance(each, Watermark) else None for each in configs], token_ids)
    tournament(scores, contexts)


class SynthIDContext:
    """The hashed context of the next token, and the contexts before: a function of the new tokens read."""

    def __init__(self, config: SynthID) -> None:
        self.config = config
        self.coins = sampling_table(config)
        self._context = deque([0] * (config.ngram_len - 1), maxlen=config.ngram_len - 1)
        self._before = deque([0] * config.context_history_size, maxlen=config.context_history_size)
        self._count = 0

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in new tokens, one after another."""
        for token in token_ids:
            if not self.skipped:
                self._before.appendleft(self.hash)
            self._context.append(token)
            self._count += 1

    @property
    def skipped(self) -> bool:
        """Whether the next token is one of the first, which skip_first_ngram_calls leaves alone."""
        return self.config.skip_first_ngram_calls and self._count + 1 < self.config.ngram_len

    @property
    def hash(self) -> int:
        """The hash of the last ngram_len - 1 new tokens, zeros before the first, as a signed 64-bit integer."""
        return context_hash(self._context)

    @property
    def repeated(self) -> bool:
        return self.hash in self._before


def context_hash(token_ids: Sequence[int] | deque[int]) -> int:
    """A linear congruential hash of the tokens, wrapped to a signed 64-bit integer."""
    value = 1
    for token in token_ids:
        value = ((value + token) * _MULTIPLIER + 1) & (2**64 - 1)
    return value - 2**64 if value >= 2**63 else value


def sampling_table(config: SynthID) -> Tensor:
    """The coin flips, 0 or 1: int8 [sampling_table_size]."""
    generator = torch.Generator().manual_seed(config.sampling_table_seed)
    return torch.randint(0, 2, (config.sampling_table_size,), generator=generator, device="cpu").to(torch.int8)


def coin_flips(coins: Tensor, key: int, hashes: Tensor) -> Tensor:
    """What a key's round says of hashes int64 of (context, token): int8 0 or 1, same shape."""
    return coins[((hashes + key) * _MULTIPLIER + 1) % len(coins)]


def tournament(scores: Tensor, contexts: Sequence[SynthIDContext | None]) -> None:
    """Scores become log-probabilities after a round per key, in each row of `scores` [R, V] float32. Off: None.

    A row that is all -inf, or has a NaN, stays so: there is nothing to draw from, while transformers draws from all.
    """
    for row, context in enumerate(contexts):
        if context is None:
            continue
        if context.config.debug_mode:
            scores[row] = 1
        if not context.skipped and not context.repeated and bool(scores[row].amax() > -torch.inf):
            scores[row] = _rounds(scores[row : row + 1], context)[0]


def _rounds(scores: Tensor, context: SynthIDContext) -> Tensor:
    """Log-probabilities [1, V] after the rounds of all keys."""
    tokens = torch.arange(scores.shape[1], device=scores.device)
    hashes = (tokens + context.hash) * _MULTIPLIER + 1
    coins = context.coins.to(scores.device)
    probabilities = scores.softmax(dim=1)
    for key in context.config.keys:
        heads = coin_flips(coins, key, hashes).to(torch.float32)[None]
        mass = (heads * probabilities).sum(dim=1, keepdim=True)
        probabilities *= heads.add_(1).sub_(mass)
    logprobs = probabilities.log_()
    return torch.where(logprobs.isfinite(), logprobs, torch.finfo(logprobs.dtype).min)
