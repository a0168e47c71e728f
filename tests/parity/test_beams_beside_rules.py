"""Beams beside the pairs of options that only show among several beams: what one beam has seen is not another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import WatermarkingConfig

from parity_checks import Pair
from tiny_models import random_ids

RULES: dict[str, dict[str, Any]] = {
    "penalty and ngrams": {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
    "prompt's ngrams": {"encoder_no_repeat_ngram_size": 1, "no_repeat_ngram_size": 1},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "watermark, selfhash": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
    "begin": {"begin_suppress_tokens": list(range(200)), "min_new_tokens": 3},
    "forced bos": {"forced_bos_token_id": 9},
}


@pytest.mark.parametrize("length", [1, 10])
@pytest.mark.parametrize("name", RULES)
def test_rules_that_remember_go_by_each_beams_own_tokens(
    tiny_pair: Callable[..., Pair], name: str, length: int
) -> None:
    pair, prompt = tiny_pair("llama"), random_ids(length, length)
    options = {"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": 14, "eos_token_id": [4, 77, 200]}
    ids = torch.tensor([prompt])
    result = pair.hf.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=330, do_sample=False, **options, **RULES[name]
    )
    for output, row in zip(pair.lm().generate(prompt, **options, **RULES[name]), result.tolist(), strict=True):
        tokens = row[len(prompt) :]
        assert output.token_ids == tokens[: len(output.token_ids)]
        assert set(tokens[len(output.token_ids) :]) <= {330}
