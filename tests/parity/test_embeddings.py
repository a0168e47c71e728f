"""Prompts given as embeddings continue as transformers' generate(inputs_embeds=...) does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import handloom as hl
from handloom.errors import UnsupportedOption
from parity_checks import Pair
from tiny_models import random_ids

EOS_SET = list(range(4, 331, 8))

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "max_length": {"max_new_tokens": None, "max_length": 30},
    "eos": {"eos_token_id": EOS_SET},
    "eos, min_length": {"eos_token_id": EOS_SET, "min_length": 25},
    "eos, min_new_tokens": {"eos_token_id": EOS_SET, "min_new_tokens": 10},
    "sampled": {"do_sample": True, "temperature": 1.3, "min_new_tokens": 8, "eos_token_id": EOS_SET},
}


def embeddings(pair: Pair, seed: int, length: int = 13) -> Tensor:
    """[length, hidden_size]: the embeddings of random ids, shaken so that they are those of no token."""
    with torch.no_grad():
        values: Tensor = pair.hf.get_input_embeddings()(torch.tensor(random_ids(seed, length)))
    return values + 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
@pytest.mark.parametrize("name", OPTIONS)
def test_generation_from_embeddings_equals_generate(pair: Pair, name: str) -> None:
    options = {"max_new_tokens": 20, **OPTIONS[name]}
    for seed in range(3):
        values = embeddings(pair, seed)
        torch.manual_seed(seed)
        source = {"rng": "torch"} if options.get("do_sample") else {}
        ours = pair.lm().generate(values, **options, **source).token_ids
        torch.manual_seed(seed)
        assert ours == pair.hf.generate(inputs_embeds=values[None], **options)[0].tolist()


def test_a_batch_of_embeddings_and_ids_equals_each_alone(pair: Pair) -> None:
    lm = pair.lm()
    prompts: list[Any] = [embeddings(pair, 1, 20), random_ids(1, 7), embeddings(pair, 2, 3)]
    engine = hl.Engine(lm, max_step_tokens=6)
    alone = [lm.generate(prompt, max_new_tokens=10).token_ids for prompt in prompts]
    assert alone[0] == pair.hf.generate(inputs_embeds=prompts[0][None], max_new_tokens=10)[0].tolist()
    tokens: dict[int, list[int]] = {engine.add_request(prompt, max_new_tokens=10): [] for prompt in prompts}
    for event in engine.run():
        if hasattr(event, "token_id"):
            tokens[event.request_id].append(event.token_id)
    assert list(tokens.values()) == alone


def test_the_embeddings_of_ids_are_the_ids(pair: Pair) -> None:
    """A scaled embedding (Gemma) is what the embedding layer gives, scale included, in both libraries."""
    lm, ids = pair.lm(), random_ids(4, 16)
    with torch.no_grad():
        values = pair.hf.get_input_embeddings()(torch.tensor(ids))
    assert lm.generate(values, max_new_tokens=12).token_ids == lm.generate(ids, max_new_tokens=12).token_ids


def test_log_probabilities_of_embedded_tokens_are_refused(pair: Pair) -> None:
    """An embedded position has no token id, hence no probability; silence would be a wrong answer."""
    with pytest.raises(UnsupportedOption, match="prompt_logprobs"):
        pair.lm().generate(embeddings(pair, 1), max_new_tokens=2, prompt_logprobs=0)
