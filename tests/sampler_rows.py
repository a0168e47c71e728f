"""Rows to choose tokens for, and logits to choose them from."""

from __future__ import annotations

from typing import Any

import torch

from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import Row


def row(tokens: list[int] | None = None, prompt_length: int = 3, **params: Any) -> Row:
    return Row(GenerationParams(max_new_tokens=50, **params), tokens or [5, 6, 7, 8], prompt_length)


def random_logits(rows: int, vocab_size: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


SAMPLED = {"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8}
MIXED = [
    row(),
    row(seed=3, **SAMPLED),
    row(repetition_penalty=1.4, output_scores=True, output_logits=True, logprobs=2),
    row(seed=9, do_sample=True, top_k=0, eos_token_id=(1,), min_length=9),
    row([1, 2, 3], seed=3, **SAMPLED),
    row(do_sample=True, seed=2**64 - 1, top_k=1),
]
