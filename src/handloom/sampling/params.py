"""What a request asks for, resolved once: every `None` filled, every range checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
StoppingCriterion = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """One request's parameters, resolved. Names and meanings are those of transformers' `GenerationConfig`."""

    max_new_tokens: int
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    include_stop_text: bool = True
    seed: int = 0
    rng: Literal["counter", "torch"] = "counter"
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processor: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    output_scores: bool = False
    output_logits: bool = False
    skip_special_tokens: bool = True
    max_time: float | None = None


def resolve_params(
    options: Mapping[str, Any],
    *,
    generation_config: Mapping[str, Any],
    prompt_length: int,
    max_context: int,
    vocab_size: int,
    eos_token_id: int | Sequence[int] | None = None,
) -> GenerationParams:
    """The caller's `options` over the model's `generation_config` over transformers' global defaults."""
    raise NotImplementedError
