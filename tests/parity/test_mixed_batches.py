"""A request gives the same tokens whichever others run beside it: random batches of every mode, every way of choosing
and every output, some of which fail, in caches large and small."""

from __future__ import annotations

import random
from dataclasses import dataclass
from string import ascii_letters, digits
from typing import Any

import pytest
import torch

from drafting import draft_freely
from engines import all_free, lm_with
from features import Own
from handloom.lm import LM
from handloom.output import Output
from tiny_models import random_ids

FEW, MANY = range(4), range(4, 44)
FAMILIES = ("llama", "gpt2", "gemma3_text")
SHARED = random_ids(70, 11)
EOS = list(range(4, 331, 30))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FAILS_AT = 3


def fails(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if input_ids.shape[1] % 4 == FAILS_AT:
        raise ZeroDivisionError("a processor's own mistake")
    return scores


def favours_threes(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores + 2.0 * (torch.arange(scores.shape[1]) % 3 == 0)


def ends_at_even(input_ids: torch.Tensor, scores: Any) -> bool:
    return bool(input_ids[0, -1] % 4 == 2)


def allowed(batch_id: int, ids: torch.Tensor) -> list[int]:
    return [(int(ids[-1]) * 7 + k) % 331 for k in range(0, 90, 3)]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "cut": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "cut otherwise": {"do_sample": True, "top_k": 0, "top_h": 0.7, "typical_p": 0.9, "eta_cutoff": 0.001},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3},
    "bans": {"bad_words_ids": [[9], [70, 71]], "suppress_tokens": [*range(40, 90)], "min_new_tokens": 4},
    "pushed": {"sequence_bias": {(95,): 3.0}, "exponential_decay_length_penalty": (2, 1.3), "forced_eos_token_id": 4},
    "allowed": {"prefix_allowed_tokens_fn": allowed},
    "watermark": {"watermarking_config": {"bias": 4.0}, "do_sample": True},
    "SynthID": {"watermarking_config": {"ngram_len": 3, "keys": [5, 6, 7]}, "do_sample": True},
    "processor": {"logits_processor": [favours_threes]},
    "criterion": {"stopping_criteria": [ends_at_even]},
    "fails": {"logits_processor": [fails]},
    "stop strings": {"stop_strings": [*ascii_letters, *digits], "include_stop_text": False},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "words": {"num_beams": 3, "force_words_ids": [[83, 81], [[91], [93, 95]]]},
    "guidance": {"guidance_scale": 1.6, "negative_prompt_ids": random_ids(8, 4)},
    "guided beams": {"guidance_scale": 1.6, "num_beams": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": [1]},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "suffix": {"speculation": "suffix", "do_sample": True},
    "draft model": {"num_assistant_tokens": 4},
    "healing": {"token_healing": True},
    "regex": {"regex": "[a-z ]*[0-9]{3}"},
    "schema": {"json_schema": SCHEMA, "do_sample": True},
    "choices": {"choices": ["yes", "no", "not at all"], "num_beams": 2},
    "own decoder": {"custom_decoder": Own},
    "scores": {"output_scores": True, "output_logits": True, "logprobs": 2},
    "internals": {"output_hidden_states": True, "output_attentions": True, "output_past_key_values": True},
    "prompt": {"prompt_logprobs": 1, "logprobs": 0},
}


@dataclass
class Asked:
    mode: str
    prompt: list[int]
    options: dict[str, Any]


def ask(draw: random.Random, mode: str, assistant: LM) -> Asked:
    """Prompts of 1 to 22 tokens, some of which begin alike."""
    prompt = SHARED[: draw.choice((0, 0, 5, 11))] + random_ids(draw.randrange(9), draw.randint(1, 11))
    options = {"max_new_tokens": draw.randint(2, 12), "eos_token_id": draw.choice((None, EOS)), **MODES[mode]}
    options["max_new_tokens"] = max(options["max_new_tokens"], options.get("min_new_tokens", 0))
    if mode == "pushed":
        options["eos_token_id"] = EOS
    if mode == "draft model":
        options["assistant_model"] = assistant
    if options.get("do_sample") or "temperature" in options:
        options["seed"] = draw.randrange(2**64)
    return Asked(mode, prompt, options)


def outputs_of(result: Output | list[Output]) -> list[Output]:
    return result if isinstance(result, list) else [result]


def told(output: Output) -> Any:
    """Everything that an output says and that is one of its tokens or of its scores."""
    beams = None if output.beams is None else (output.beams.score, output.beams.beam_indices)
    texts = (output.text, output.finish_reason, output.stop_string, repr(output.error))
    return output.prompt_token_ids, output.token_ids, texts, output.logprobs, output.top_logprobs, beams


def assert_same(ours: Output, expected: Output, what: Any) -> None:
    assert told(ours) == told(expected), what
    for name in ("scores", "logits"):
        for mine, theirs in zip(getattr(ours, name) or (), getattr(expected, name) or (), strict=True):
            assert torch.equal(mine, theirs), what
    assert len(ours.hidden_states or ()) == len(expected.hidden_states or ())


def check(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A random batch, of which each request is then asked for alone in an empty cache. Returns the modes it had."""
    draw = random.Random(f"{family} {seed}")
    if seed % 2:
        draft_freely(monkeypatch)
    assistant = lm_with(2000, family=family)
    asked = [ask(draw, mode, assistant) for mode in draw.choices(list(MODES), k=draw.randint(8, 20))]
    lm = lm_with(draw.choice((1000, 70)), family=family)
    together = lm.generate([one.prompt for one in asked], params=[one.options for one in asked])
    assert all_free(lm)
    rest = list(together)
    for one in asked:
        alone = outputs_of(lm_with(1000, family=family).generate([one.prompt], params=[one.options]))
        mine, rest = rest[: len(alone)], rest[len(alone) :]
        for ours, expected in zip(mine, alone, strict=True):
            assert_same(ours, expected, (one, [other.mode for other in asked]))
    assert not rest
    return {one.mode for one in asked}


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_requests_of_every_mode_beside_each_other_get_what_they_get_alone(
    family: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(family, seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_times_as_many_batches_have_every_mode(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set().union(*(check(family, seed, monkeypatch) for seed in MANY))
    assert seen == MODES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_modes_in_one_batch(family: str) -> None:
    draw, assistant = random.Random(family), lm_with(2000, family=family)
    asked = [ask(draw, mode, assistant) for mode in MODES]
    prompts, params = [one.prompt for one in asked], [one.options for one in asked]
    first = lm_with(1000, family=family).generate(prompts, params=params)
    order = draw.sample(range(len(asked)), len(asked))
    again = iter(
        lm_with(90, family=family).generate([prompts[at] for at in order], params=[params[at] for at in order])
    )
    counts = [asked[at].options.get("num_return_sequences", 1) for at in range(len(asked))]
    starts = [sum(counts[:at]) for at in range(len(asked))]
    for at in order:
        for expected in first[starts[at] : starts[at] + counts[at]]:
            assert_same(next(again), expected, asked[at])
    assert {output.finish_reason for output in first} >= {"length", "eos", "error", "criteria"}
