"""Options resolved for a prompt and a model of known sizes."""

from __future__ import annotations

from typing import Any

from handloom.sampling.params import GenerationParams, resolve_params

CONTEXT, VOCAB = 64, 100


def resolve(
    options: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **facts: Any
) -> GenerationParams:
    given = {"prompt_length": 10, "max_context": CONTEXT, "vocab_size": VOCAB, **facts}
    return resolve_params(options or {}, generation_config=model or {}, **given)
