"""Speculative decoding beside transformers' assisted generation: the same greedy tokens and scores. Sampled tokens are
those without speculation, so their distribution is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import handloom as hl
from drafting import draft_freely
from known_wrong import ASSISTS_WITH_WINDOWS
from parity_checks import Pair, assert_tokens_equal, load_pair
from tiny_models import TINY, random_ids, save

NEW_TOKENS = 30
PROMPTS = [[*random_ids(1, 9), *random_ids(1, 9)[:5]], random_ids(2, 4) * 3, random_ids(3, 17)]
RULES: dict[str, dict[str, Any]] = {
    "plain": {"eos_token_id": None},
    "eos": {"eos_token_id": list(range(4, 331, 9))},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "lengths": {"min_new_tokens": 12, "eos_token_id": list(range(4, 331, 5)), "forced_eos_token_id": 9},
    "bans": {"bad_words_ids": [[9], [30, 31]], "suppress_tokens": [*range(40, 90)], "sequence_bias": {(95,): 1.0}},
}


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)


@pytest.fixture(scope="module")
def assistant_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The tiny model of a family with its weights moved a little: its drafts are right now and then."""
    made: dict[str, Pair] = {}

    def make(family: str) -> Pair:
        if family not in made:
            model, generator = TINY[family](0), torch.Generator().manual_seed(5)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.01 * torch.randn(weight.shape, generator=generator)
            made[family] = load_pair(save(model, tmp_path_factory.mktemp("assistant")))
        return made[family]

    return make


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("size", [None, 3])
def test_prompt_lookup_gives_the_tokens_of_generate_with_it_and_without(pair: Pair, rules: str, size: int) -> None:
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": size}
    options = {"max_new_tokens": NEW_TOKENS, **RULES[rules]}
    outputs = pair.lm().generate(PROMPTS, **options, **lookup)
    for prompt, output, plain in zip(PROMPTS, outputs, pair.lm().generate(PROMPTS, **options), strict=True):
        assert output.token_ids == plain.token_ids
        assert_tokens_equal(pair.hf, prompt, output.token_ids, **options, **lookup)
    assert sum(output.drafts.drafted for output in outputs) > 0


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
@pytest.mark.parametrize("family", TINY)
def test_a_draft_model_gives_the_tokens_of_generate_with_it(
    tiny_pair: Callable[..., Pair], assistant_of: Callable[[str], Pair], family: str, schedule: str, rules: str
) -> None:
    pair, assistant = tiny_pair(family), assistant_of(family)
    how = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": schedule, "assistant_confidence_threshold": 0.1}
    assistant.hf.generation_config.update(**how)  # where transformers reads them
    options = {"max_new_tokens": NEW_TOKENS, **RULES[rules]}
    outputs = pair.lm().generate(PROMPTS, assistant_model=assistant.lm(), **options, **how)
    assisted = {"assistant_model": assistant.hf} if ASSISTS_WITH_WINDOWS or family != "gemma3_text" else {}
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert_tokens_equal(pair.hf, prompt, output.token_ids, **assisted, **options)
    accepted, drafted = (sum(getattr(o.drafts, name) for o in outputs) for name in ("accepted", "drafted"))
    assert 0 < accepted < drafted, "right and wrong drafts"


@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 4}, {"speculation": "suffix"}], ids=str)
def test_scores_and_logits_of_every_step_are_those_of_assisted_generation(pair: Pair, drafts: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.1, "eos_token_id": None, "output_scores": True,
        "output_logits": True,
    }  # fmt: skip
    output = pair.lm().generate(PROMPTS[1], **options, **drafts)
    theirs = pair.hf.generate(
        torch.tensor([PROMPTS[1]]), do_sample=False, return_dict_in_generate=True, prompt_lookup_num_tokens=4, **options
    )
    assert output.token_ids == theirs.sequences[0, len(PROMPTS[1]) :].tolist()
    for name in ("scores", "logits"):
        ours, expected = torch.stack(getattr(output, name)), torch.cat(getattr(theirs, name))
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_several_outputs_are_refused_here_and_there(pair: Pair) -> None:
    options: dict[str, Any] = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 5}
    with pytest.raises(ValueError):
        pair.hf.generate(torch.tensor([PROMPTS[0]]), prompt_lookup_num_tokens=3, **options)
    with pytest.raises(hl.errors.UnsupportedOption, match="num_return_sequences"):
        pair.lm().generate(PROMPTS[0], prompt_lookup_num_tokens=3, **options)
