"""Every rule as an option of lm.generate gives the tokens and scores of model.generate, whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

from handloom.engine import Engine
from handloom.errors import UnsupportedOption
from parity_checks import Pair, hf_generate
from tiny_models import ragged_prompts, random_ids

LENGTH, COUNT = 12, 16
BASE: dict[str, Any] = {"max_new_tokens": COUNT, "eos_token_id": [17, 200]}


def walk(batch_id: int, ids: torch.Tensor) -> list[int]:
    """Other tokens for each prompt of the call."""
    return [int(ids[-1]) * 7 % 331, 5 + batch_id, 90 - batch_id, 120 + 3 * batch_id]


OPTIONS: dict[str, dict[str, Any]] = {
    "sequence_bias": {"sequence_bias": {**{(id_,): -6.0 for id_ in range(100)}, (200, 7): 9.0, (150, 151, 7): -3.5}},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[id_] for id_ in range(0, 331, 2)] + [[51, 53]]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": walk},
    "forced_eos_token_id": {"forced_eos_token_id": [17, 9]},
    "remove_invalid_values": {"remove_invalid_values": True, "suppress_tokens": list(range(200))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.6)},
    "suppress_tokens": {"suppress_tokens": list(range(0, 331, 3))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(300))},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.2},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=6.0, greenlist_ratio=0.4)},
    "watermark, selfhash": {
        "watermarking_config": WatermarkingConfig(bias=6.0, seeding_scheme="selfhash", context_width=3)
    },
    "SynthID": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836, 123, 340])},
    "top_h": {"top_h": 0.3},
    "typical_p": {"typical_p": 0.3},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.2},
    "several": {
        "sequence_bias": [[[id_], 2.5] for id_ in range(100, 200)],
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[id_] for id_ in range(1, 331, 5)],
        "min_new_tokens": 6,
        "exponential_decay_length_penalty": (7, 1.3),
        "begin_suppress_tokens": [4, 5, 6],
        "typical_p": 0.9,
        "top_k": 30,
        "eta_cutoff": 0.001,
        "watermarking_config": WatermarkingConfig(),
        "renormalize_logits": True,
    },
}
WARPERS = {"top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_k"}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_the_tokens_and_scores_of_generate(pair: Pair, name: str) -> None:
    """Greedy where that has a use for it, and drawn."""
    options, prompt = {**BASE, **OPTIONS[name]}, random_ids(4, LENGTH)
    keep = {"output_scores": True}
    changed = False
    for sample in (False, True) if not WARPERS & options.keys() else (True,):
        drawn = {"do_sample": True, "top_k": 0, "temperature": 1.5, **options} if sample else options
        torch.manual_seed(1)
        ours = pair.lm().generate(prompt, rng="torch" if sample else "counter", **drawn, **keep)
        torch.manual_seed(1)
        theirs = pair.hf.generate(
            torch.tensor([prompt]), **{"do_sample": False, **drawn}, **keep, return_dict_in_generate=True
        )
        assert ours.token_ids == theirs.sequences[0, LENGTH:].tolist()
        for mine, wanted in zip(ours.scores, theirs.scores, strict=True):
            torch.testing.assert_close(mine, wanted[0], rtol=2e-5, atol=2e-4)
        plain = {**drawn, **dict.fromkeys(OPTIONS[name])}
        torch.manual_seed(1)
        without = pair.lm().generate(prompt, rng="torch" if sample else "counter", **plain, **keep)
        differ = [not torch.equal(a, b) for a, b in zip(ours.scores, without.scores, strict=False)]
        changed |= ours.token_ids != without.token_ids or any(differ)
    assert changed, "this option must matter here"


@pytest.mark.parametrize("new_tokens", [1, 4])
def test_a_forced_bos_follows_a_prompt_of_one_token_and_suppression_begins_after_it(
    pair: Pair, new_tokens: int
) -> None:
    suppressed = list(range(0, 331, 2))
    options = {"forced_bos_token_id": 8, "begin_suppress_tokens": suppressed, "max_new_tokens": new_tokens}
    ours = pair.lm().generate([77], **options).token_ids
    assert ours == hf_generate(pair.hf, [77], do_sample=False, **options)
    assert ours[0] == 8
    assert not set(ours[1:2]) & set(suppressed)


def test_each_request_of_a_batch_has_rules_of_its_own(pair: Pair) -> None:
    """The same tokens alone and beside others, every rule on in one of them."""
    lm, prompts = pair.lm(), ragged_prompts(7, [3 + i for i in range(len(OPTIONS))])
    params = [dict(own) for own in OPTIONS.values()]
    for at, own in enumerate(params):
        if "prefix_allowed_tokens_fn" in own:
            own["prefix_allowed_tokens_fn"] = lambda _, ids: walk(3, ids)
        if WARPERS & own.keys():
            own |= {"do_sample": True, "seed": at}
    together = lm.generate(prompts, params=params, **BASE)
    for prompt, own, output in zip(prompts, params, together, strict=True):
        assert lm.generate(prompt, **BASE, **own).token_ids == output.token_ids


def test_a_constraint_is_told_which_prompt_of_the_call_it_is_about(pair: Pair) -> None:
    prompts = ragged_prompts(8, (LENGTH, LENGTH, LENGTH))
    outputs = pair.lm().generate(prompts, prefix_allowed_tokens_fn=walk, **BASE)
    theirs = pair.hf.generate(torch.tensor(prompts), do_sample=False, prefix_allowed_tokens_fn=walk, **BASE)
    for output, wanted in zip(outputs, theirs[:, LENGTH:].tolist(), strict=True):
        assert output.token_ids == wanted[: len(output.token_ids)]


def test_rules_that_remember_survive_preemption(pair: Pair) -> None:
    """A request whose pages are taken away in the middle goes on as if nothing had happened."""
    lm, prompts = pair.lm(kv_cache_tokens=256), ragged_prompts(9, [60] * 5)
    options = {
        "max_new_tokens": 40, "eos_token_id": None, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3,
        "repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2,
        "watermarking_config": {"ngram_len": 3, "keys": [5, 6, 7]},
    }  # fmt: skip
    alone = [lm.generate(prompt, **options).token_ids for prompt in prompts]
    engine = Engine(lm, prefix_cache=False)
    ids = [engine.add_request(prompt, **options) for prompt in prompts]
    tokens: dict[int, list[int]] = {id_: [] for id_ in ids}
    for event in engine.run():
        if (token := getattr(event, "token_id", None)) is not None:
            tokens[event.request_id].append(token)
    assert engine.stats().num_preempted > 0
    assert [tokens[id_] for id_ in ids] == alone


@pytest.mark.parametrize("name", ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size"])
def test_a_rule_about_the_prompts_tokens_is_refused_where_it_has_embeddings(pair: Pair, name: str) -> None:
    """transformers warns and goes on without it."""
    embeddings = torch.zeros(3, pair.lm().spec.hidden_size)
    with pytest.raises(UnsupportedOption, match=name):
        pair.lm().generate(embeddings, **{name: 2})
