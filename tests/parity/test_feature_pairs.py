"""SAFETY row 20: every pair of options works, and what each promises holds beside the other; or it is refused by name.

Where transformers has both options, the tokens are those of its generate. In any case a request gives the same alone,
beside another request, and streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from drafting import draft_freely
from features import BESIDE, FEATURES, HEALED, KNOBS, PROMPT, merged, prompt_of
from grammar_masks import OwnMask
from handloom.errors import InvalidParam, UnsupportedOption
from handloom.lm import LM
from handloom.output import Output
from handloom.sampling.params import GenerationParams
from handloom.sampling.surface import WHY_NOT
from known_wrong import WRONG_ON_INFINITIES
from parity_checks import Pair, hf_generate
from tiny_models import tiny_tokenizer

SPECULATION = {"prompt_lookup_num_tokens", "speculation", "assistant_model"}
NOT_BESIDE_DRAFTS = {
    "guidance": "guidance_scale",
    "contrastive": "penalty_alpha",
    "DoLa": "dola_layers",
    "custom_decoder": "custom_decoder",
}
# Pairs that contradict each other or are not there, and the words of the refusal.
CONTRADICT = {
    frozenset({"stop_strings", "include_stop_text"}): "stop and stop_strings",
    **{frozenset(pair): "one is enough" for pair in combinations(SPECULATION, 2)},
    **{
        frozenset({drafter, name}): f"{drafter} beside {option}"
        for drafter in SPECULATION
        for name, option in NOT_BESIDE_DRAFTS.items()
    },
    frozenset({"token_healing", "custom_decoder"}): "token_healing beside custom_decoder",
    frozenset({"watermark", "SynthID"}): None,  # two values of one option
    frozenset({"structure", "token_healing"}): "token_healing beside regex",
    frozenset({"guidance", "prompt_logprobs"}): "prompt_logprobs beside guidance_scale",
    frozenset({"guidance", "contrastive"}): "penalty_alpha=0.6 beside guidance_scale=1.7",
    frozenset({"guidance", "DoLa"}): "dola_layers='high' beside guidance_scale=1.7",
    frozenset({"structure", "DoLa"}): "regex beside dola_layers",
    frozenset({"contrastive", "DoLa"}): "dola_layers='high' beside penalty_alpha=0.6",
    frozenset({"contrastive", "prompt_logprobs"}): "prompt_logprobs beside penalty_alpha=0.6",
    frozenset({"contrastive", "internals"}): "output_hidden_states beside penalty_alpha=0.6",
    **{frozenset({"contrastive", knob}): "penalty_alpha=0.6 does not draw" for knob in KNOBS - {"top_k"}},
}
# Modes that transformers no longer has; test_contrastive_and_dola.py compares them with what it recorded.
NO_LONGER_THERE = {"contrastive", "DoLa"}
# What takes more than one sequence, which a decoder of the caller's that has one leaves out.
LEFT_OUT = {"contrastive", "DoLa", "guidance"}
# Fields of GenerationParams that are no feature here, and where each is put beside every feature.
ELSEWHERE = {
    "max_length": "test_options.py, test_token_healing.py",
    **dict.fromkeys(("do_sample", "seed", "rng"), "test_feature_pairs.py, with every rule of sampling"),
    **dict.fromkeys(("json_schema", "grammar", "choices"), "test_structure_pairs.py"),
    **dict.fromkeys(
        (
            "num_beams", "num_return_sequences", "length_penalty", "early_stopping", "num_beam_groups",
            "diversity_penalty", "force_words_ids",
        ),
        "test_beam_pairs.py",
    ),
}  # fmt: skip
# Features of more than the sequence to go on, which is therefore not continued in place.
NOT_IN_PLACE = {
    "token_healing": "token_healing",
    "guidance": "guidance_scale",
    "contrastive": "penalty_alpha",
    "custom_decoder": "custom_decoder",
}
REFUSED_OVER_EMBEDDINGS = {
    "token_healing", "prompt_logprobs", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "assistant_model",
}  # fmt: skip
PAIRS = [frozenset(pair) for pair in combinations(FEATURES, 2)]


def theirs(
    pair: Pair, shared: dict[str, Any], own: dict[str, Any], embeddings: torch.Tensor | None = None
) -> list[int]:
    """The new tokens of generate, after the prompt or after embeddings [n, hidden_size] that stand for it."""
    options = {"do_sample": False, **shared}
    if "stop" in own:
        options["stop_strings"] = own["stop"]
    if "regex" in own:
        mask = OwnMask(0 if embeddings is not None else len(PROMPT), "regex", own["regex"], options["eos_token_id"])
        options["logits_processor"] = LogitsProcessorList([*options.get("logits_processor", []), mask])
    if "negative_prompt_ids" in options:
        options["negative_prompt_ids"] = torch.tensor([options["negative_prompt_ids"]])
    if "stop_strings" in options:
        options["tokenizer"] = tiny_tokenizer()
    torch.manual_seed(9)
    if embeddings is None:
        return hf_generate(pair.hf, HEALED if "token_healing" in own else PROMPT, **options)
    out = pair.hf.generate(inputs_embeds=embeddings[None], **options)
    return (out if isinstance(out, torch.Tensor) else out.sequences)[0].tolist()


@pytest.fixture(autouse=True)
def drafts_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)


@pytest.fixture
def pair(tiny_pair: Callable[..., Pair]) -> Pair:
    return tiny_pair("llama")


def test_safety_20_no_option_is_forgotten() -> None:
    here = {name for feature in FEATURES.values() for name in (*feature.options, *feature.ours)}
    assert {field.name for field in fields(GenerationParams)} <= here | ELSEWHERE.keys()
    assert not here & ELSEWHERE.keys()


@pytest.mark.parametrize("name", FEATURES)
def test_safety_20_every_pair_works_as_in_generate_and_each_keeps_its_promise(pair: Pair, name: str) -> None:
    lm = pair.lm()
    for names in [frozenset({name}), *(names for names in PAIRS if min(names) == name)]:
        shared, own = merged(names)
        if names in CONTRADICT:
            words = CONTRADICT[names]
            if words is not None:
                with pytest.raises((InvalidParam, UnsupportedOption), match=words):
                    lm.generate(prompt_of(own), **shared, **own)
            continue
        sampled = bool(shared.get("do_sample"))
        if sampled and names & SPECULATION:
            output = sampled_with_drafts(lm, shared, own)
            for each in names:
                FEATURES[each].holds(output, shared)
            continue
        torch.manual_seed(9)
        output = lm.generate(prompt_of(own), **shared, **own, rng="torch" if sampled else "counter")
        if "custom_decoder" in names and names & LEFT_OUT:
            assert output.token_ids == lm.generate(PROMPT, **merged(frozenset())[0]).token_ids
        elif not names & NO_LONGER_THERE and (len(names) == 1 or not names & WRONG_ON_INFINITIES):
            assert output.token_ids == theirs(pair, shared, own), names
        for each in names:
            FEATURES[each].holds(output, shared)


def sampled_with_drafts(lm: LM, shared: dict[str, Any], own: dict[str, Any]) -> Output:
    """Its tokens are those without drafts; torch's generator, whose state drafts would change, is refused."""
    with pytest.raises(UnsupportedOption, match="rng='torch'"):
        lm.generate(prompt_of(own), **shared, **own, rng="torch")
    drafting = {option for drafter in SPECULATION for option in FEATURES[drafter].ours}
    without = {name: value for name, value in own.items() if name not in drafting}
    output: Output = lm.generate(prompt_of(own), **shared, **own, seed=9)
    assert output.token_ids == lm.generate(prompt_of(own), **shared, **without, seed=9).token_ids
    return output


@pytest.mark.parametrize("name", FEATURES)
def test_safety_20_every_pair_gives_the_same_alone_beside_another_and_streamed(pair: Pair, name: str) -> None:
    lm = pair.lm()
    for names in (names for names in PAIRS if min(names) == name and names not in CONTRADICT):
        shared, own = merged(names)
        options = {**shared, **own, **({"seed": 5} if shared.get("do_sample") else {})}
        alone = lm.generate(prompt_of(own), **options)
        beside, plain = lm.generate([prompt_of(own), BESIDE], params=[options, {"max_new_tokens": 3}])
        assert (beside.token_ids, beside.text, beside.finish_reason) == (
            alone.token_ids, alone.text, alone.finish_reason
        ), names  # fmt: skip
        assert beside.logprobs == alone.logprobs
        assert len(plain.token_ids) == 3
        pieces = list(lm.stream(prompt_of(own), **options))
        assert [piece.token_id for piece in pieces if piece.token_id is not None] == alone.token_ids
        assert "".join(piece.text for piece in pieces) == alone.text
        for each in names:
            FEATURES[each].holds(alone, shared)


UNSUPPORTED = {name: [5] for name in WHY_NOT}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_safety_20_an_option_that_is_not_supported_is_refused_by_name_beside_every_other(pair: Pair, name: str) -> None:
    for each in FEATURES:
        shared, own = merged(frozenset({each}))
        with pytest.raises(UnsupportedOption, match=rf"^{name}="):
            pair.lm().generate(PROMPT, **shared, **own, **{name: UNSUPPORTED[name]})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1, "rng": "torch"}, "seed"),
    ({"do_sample": True, "temperature": 0}, "temperature"),
    ({"eos_token_id": None, "exponential_decay_length_penalty": (1, 2.0)}, "exponential_decay_length_penalty"),
    ({"forced_eos_token_id": 5, "suppress_tokens": [5]}, "forced_eos_token_id"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
    ({"min_length": 40, "max_length": 30}, "min_length"),
    ({"bad_words_ids": [[17]], "eos_token_id": 17}, "bad_words_ids"),
    *(({"do_sample": False, name: FEATURES[name].options[name]}, name) for name in sorted(KNOBS)),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=lambda value: str(value)[:50])
def test_safety_20_options_that_contradict_each_other_are_refused_by_name(pair: Pair, options: Any, named: str) -> None:
    with pytest.raises(InvalidParam, match=named):
        pair.lm().generate(PROMPT, **options)


@pytest.mark.parametrize("name", FEATURES)
def test_every_option_over_a_sequence_to_continue_works_as_over_its_ids(pair: Pair, name: str) -> None:
    lm, (shared, own) = pair.lm(), merged(frozenset({name}))
    options = {**shared, **own, **({"seed": 5} if shared.get("do_sample") else {})}
    expected = lm.generate(prompt_of(own), **options)
    with lm.sequence(PROMPT) as sequence:
        if name in NOT_IN_PLACE:
            with pytest.raises(UnsupportedOption, match=NOT_IN_PLACE[name]):
                lm.generate(sequence, **options)
            return
        continued = lm.generate(sequence, **options)
    assert (continued.token_ids, continued.text) == (expected.token_ids, expected.text)


@pytest.mark.parametrize("name", FEATURES)
def test_every_option_over_embeddings_works_as_in_generate_or_is_refused_by_name(pair: Pair, name: str) -> None:
    lm, (shared, own) = pair.lm(), merged(frozenset({name}))
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(PROMPT)).detach()
    torch.manual_seed(9)
    options = {**shared, **own, "rng": "torch" if shared.get("do_sample") else "counter"}
    if name in REFUSED_OVER_EMBEDDINGS:
        with pytest.raises(UnsupportedOption, match=name):
            lm.generate(embeddings, **options)
        return
    if name in NO_LONGER_THERE:
        assert lm.generate(embeddings, **options).token_ids == lm.generate(PROMPT, **options).token_ids
        return
    assert lm.generate(embeddings, **options).token_ids == theirs(pair, shared, own, embeddings)
