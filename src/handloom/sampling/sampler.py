"""From logits to chosen tokens, for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from handloom.errors import HandloomError
from handloom.sampling.params import GenerationParams


@dataclass(slots=True)
class Row:
    """What the sampler must know of one sequence."""

    params: GenerationParams
    token_ids: Sequence[int]  # prompt + generated so far
    prompt_length: int


@dataclass(slots=True)
class Choice:
    """What was chosen for R rows; every list has R entries."""

    token_ids: list[int]  # -1 where the row has an error
    logprobs: list[float | None]  # log-softmax of the raw logits at the chosen token, where asked for
    top_logprobs: list[list[tuple[int, float]] | None]  # the n most likely (token id, logprob), most likely first
    scores: list[torch.Tensor | None]  # processed scores [V] float32, where output_scores
    logits: list[torch.Tensor | None]  # raw logits [V] float32, where output_logits
    errors: list[HandloomError | None]  # that row's own failure


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> Choice:
    """Choose one token per row of `logits` [R, V] (any float dtype)."""
    raise NotImplementedError


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, top_n: int = 0
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Log-probabilities of `token_ids` [N] under `logits` [N, V], and the `top_n` most likely of each row."""
    raise NotImplementedError
