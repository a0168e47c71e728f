"""An Output as transformers' own class: the fields of generate's, and good for compute_transition_scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import GenerateDecoderOnlyOutput

from parity_checks import Pair
from tiny_models import random_ids

PROMPT = random_ids(2, 9)
OPTIONS: list[dict[str, Any]] = [
    {"eos_token_id": None},
    {"eos_token_id": list(range(4, 331, 20)), "repetition_penalty": 1.3},
    {"do_sample": True, "top_k": 40, "temperature": 0.8, "eos_token_id": list(range(4, 331, 30))},
]


@pytest.mark.parametrize("normalize_logits", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transition_scores_are_those_of_generates_own_output(pair: Pair, options: Any, normalize_logits: bool) -> None:
    asked = {"max_new_tokens": 15, "output_scores": True, "output_logits": True, **options}
    torch.manual_seed(5)
    ours = pair.lm().generate(PROMPT, rng="torch", **asked).to_transformers()
    torch.manual_seed(5)
    theirs = pair.hf.generate(torch.tensor([PROMPT]), return_dict_in_generate=True, **{"do_sample": False, **asked})
    assert type(ours) is type(theirs) is GenerateDecoderOnlyOutput
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, wanted in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
        assert type(mine) is type(wanted) is tuple
        torch.testing.assert_close(torch.cat(mine), torch.cat(wanted), rtol=2e-5, atol=2e-4)
    transitions = [
        pair.hf.compute_transition_scores(out.sequences, out.scores, normalize_logits=normalize_logits)
        for out in (ours, theirs)
    ]
    torch.testing.assert_close(*transitions, rtol=2e-5, atol=2e-4)


def test_normalised_transition_scores_of_plain_greedy_are_the_logprobs(pair: Pair) -> None:
    output = pair.lm().generate(PROMPT, max_new_tokens=8, output_scores=True, logprobs=0, eos_token_id=None)
    out = output.to_transformers()
    transitions = pair.hf.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert transitions[0].tolist() == pytest.approx(output.logprobs, abs=1e-4)


def test_what_was_not_asked_for_is_none_and_embeddings_have_no_ids(pair: Pair) -> None:
    output = pair.lm().generate(PROMPT, max_new_tokens=3).to_transformers()
    assert (output.scores, output.logits, output.past_key_values) == (None, None, None)
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(PROMPT)).detach()
    of_embeddings = pair.lm().generate(embeddings, max_new_tokens=3, eos_token_id=None)
    assert of_embeddings.to_transformers().sequences.tolist() == [of_embeddings.token_ids]
