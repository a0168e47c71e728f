"""Contrastive search and DoLa: tokens and scores of the last transformers release that had them, which a file recorded
(tests/data/record_contrast.py), and of the published algorithms in float64 (tests/contrast_oracles.py)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import handloom as hl
from contrast_oracles import contrastive_search, dola
from engines import all_free, lm_in_float64, lm_with
from handloom.engine import Engine
from handloom.errors import InvalidParam, UnsupportedOption
from parity_checks import Pair
from parity_modes import PROPERTY
from tiny_models import TINY, random_ids, save

RECORD = json.loads((Path(__file__).parents[1] / "data" / "contrast.json").read_text())
MODELS = {model["name"]: model for model in RECORD["models"]}
RECORDED = [
    (name, mode)
    for name, model in MODELS.items()
    for mode in ("penalty_alpha", "dola_layers")
    if any(mode in case["options"] for case in model["cases"])
]
EOS = list(range(4, 331, 30))


@pytest.fixture(scope="module")
def lm_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name of a recorded model -> an LM of it."""

    @cache
    def load(name: str) -> hl.LM:
        model = TINY[MODELS[name]["family"]](0, **MODELS[name]["overrides"])
        return hl.LM.from_pretrained(save(model, tmp_path_factory.mktemp("model")))

    return load


@pytest.mark.parametrize(("name", "mode"), RECORDED)
def test_tokens_and_scores_are_those_that_transformers_recorded(
    lm_of: Any, name: str, mode: str, record_property: Any
) -> None:
    lm, seen = lm_of(name), 0
    for case in MODELS[name]["cases"]:
        options = case["options"]
        if mode not in options:
            continue
        layers = options.get("dola_layers")
        if isinstance(layers, list) and max(layers) >= len(lm.spec.layers):
            continue  # transformers left those out
        torch.manual_seed(11)
        rng = "torch" if options.get("do_sample") else "counter"
        output = lm.generate(random_ids(*case["prompt"]), output_scores=True, rng=rng, **options)
        assert output.token_ids == case["tokens"], options
        scores = [float(step[token]) for step, token in zip(output.scores, output.token_ids, strict=True)]
        assert scores == pytest.approx(case["scores"], rel=1e-4, abs=2e-4), options
        seen += 1
    assert seen >= 12
    record_property(PROPERTY, {"equal": seen})


@pytest.mark.parametrize("name", MODELS)
def test_the_recorded_models_are_these_models(lm_of: Any, name: str) -> None:
    prompts = [random_ids(seed, length) for seed, length in ((1, 12), (2, 1), (3, 25))]
    outputs = lm_of(name).generate(prompts, max_new_tokens=14, eos_token_id=EOS)
    assert [output.token_ids for output in outputs] == MODELS[name]["greedy"]


@pytest.mark.parametrize("family", TINY)
def test_tokens_are_those_of_the_published_algorithms_in_float64(tiny_pair: Any, family: str) -> None:
    pair: Pair = tiny_pair(family)
    model = TINY[family]()
    model.load_state_dict(pair.hf.state_dict())
    model = model.double()
    for seed, length in ((1, 9), (2, 3), (3, 20)):
        prompt = random_ids(seed, length)
        for alpha, k in ((0.6, 4), (0.2, 8), (1.0, 3)):
            ours = pair.lm().generate(prompt, penalty_alpha=alpha, top_k=k, max_new_tokens=8, eos_token_id=None)
            assert ours.token_ids == contrastive_search(model, prompt, alpha, k, 8)
        for layers in ([0, 1, 2], [1], [2, 0]):
            output = pair.lm().generate(prompt, dola_layers=layers, max_new_tokens=8, eos_token_id=None)
            assert output.token_ids == dola(model, prompt, layers, 8)


# What is asked for beside them ------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"penalty_alpha": 0.6, "top_k": 5}, {"dola_layers": "high"}], ids=str)
def test_logprobs_and_logits_are_the_models_own(pair: Pair, mode: dict[str, Any]) -> None:
    prompt = random_ids(4, 11)
    output = pair.lm().generate(prompt, max_new_tokens=9, eos_token_id=EOS, logprobs=2, output_logits=True, **mode)
    with torch.no_grad():
        logits = pair.hf(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-3)
    for row, token, logprob, top in zip(
        logits.log_softmax(-1), output.token_ids, output.logprobs, output.top_logprobs, strict=True
    ):
        assert logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [token for token, _ in top] == row.topk(2).indices.tolist()
    assert output.scores is None


def test_a_candidate_is_never_a_token_that_a_rule_forbids(pair: Pair) -> None:
    """transformers took forbidden ones where fewer than top_k were left."""
    allowed = [7, 70, 107]
    output = pair.lm().generate(
        random_ids(4, 11), penalty_alpha=0.9, top_k=50, max_new_tokens=12, eos_token_id=None,
        suppress_tokens=[id_ for id_ in range(331) if id_ not in allowed], forced_eos_token_id=107,
    )  # fmt: skip
    assert set(output.token_ids) <= set(allowed)
    assert output.token_ids[-1] == 107


def test_penalties_of_zero_and_one_candidate_change_nothing(pair: Pair) -> None:
    prompt = random_ids(4, 11)
    plain = pair.lm().generate(prompt, max_new_tokens=12, eos_token_id=EOS).token_ids
    for options in ({"penalty_alpha": 0.0}, {"penalty_alpha": None}, {"penalty_alpha": 0.6, "top_k": 1}):
        assert pair.lm().generate(prompt, max_new_tokens=12, eos_token_id=EOS, **options).token_ids == plain
    assert pair.lm().generate(prompt, max_new_tokens=12, eos_token_id=EOS, dola_layers=None).token_ids == plain


def test_candidates_share_the_pages_of_what_came_before() -> None:
    lm = lm_with(200, 4)
    engine = Engine(lm, prefix_cache=False)
    engine.add_request(random_ids(1, 41), penalty_alpha=0.6, top_k=6, max_new_tokens=3, eos_token_id=[])
    computed, used = [], []
    while engine.has_work:
        engine.step()
        computed.append(engine.stats().num_computed)
        used.append(lm.pool.num_pages - lm.pool.num_free)
    assert computed == [41, 47, 53, 59], "the prompt once, and then six candidates a step"
    assert max(used) <= 10 + 6 + 1, "ten full pages for all, and one of its own for each"
    assert all_free(lm)


def test_dola_takes_a_prompt_over_from_the_prefix_cache_and_contrastive_search_cannot() -> None:
    for options, shared in (({"dola_layers": "high"}, 28), ({"penalty_alpha": 0.6, "top_k": 3}, 0)):
        lm = lm_in_float64()
        engine = Engine(lm)
        for _ in range(2):
            before = engine.stats().num_computed
            engine.add_request(random_ids(1, 30), max_new_tokens=2, eos_token_id=[], **options)
            list(engine.run())
            computed = engine.stats().num_computed - before
        assert computed == (31 if "dola_layers" in options else 36) - shared


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"penalty_alpha": float("nan")}, InvalidParam, "penalty_alpha"),
    ({"penalty_alpha": -0.1}, InvalidParam, "penalty_alpha"),
    ({"penalty_alpha": 1.1}, InvalidParam, "penalty_alpha"),
    ({"penalty_alpha": "0.6"}, InvalidParam, "penalty_alpha"),
    ({"penalty_alpha": True}, InvalidParam, "penalty_alpha"),
    ({"penalty_alpha": 0.6, "top_k": 0}, InvalidParam, "penalty_alpha=0.6.*top_k=0"),
    ({"penalty_alpha": 0.6, "top_k": None}, InvalidParam, "penalty_alpha=0.6.*top_k=0"),
    ({"penalty_alpha": 0.6, "top_k": 1025}, InvalidParam, "penalty_alpha=0.6.*top_k=1025"),
    ({"penalty_alpha": 0.6, "do_sample": True}, InvalidParam, "penalty_alpha"),
    ({"penalty_alpha": 0.6, "temperature": 0.5}, InvalidParam, "penalty_alpha"),
    ({"penalty_alpha": 0.6, "do_sample": False, "top_p": 0.5}, InvalidParam, "top_p"),
    ({"penalty_alpha": 0.6, "num_beams": 2}, UnsupportedOption, "penalty_alpha=0.6"),
    ({"penalty_alpha": 0.6, "dola_layers": "low"}, UnsupportedOption, "dola_layers='low' beside penalty_alpha=0.6"),
    ({"penalty_alpha": 0.6, "guidance_scale": 2.0}, UnsupportedOption, "penalty_alpha=0.6 beside guidance_scale=2"),
    ({"penalty_alpha": 0.6, "prompt_logprobs": 0}, UnsupportedOption, "prompt_logprobs beside penalty_alpha"),
    ({"penalty_alpha": 0.6, "output_hidden_states": True}, UnsupportedOption, "output_hidden_states"),
    ({"penalty_alpha": 0.6, "output_attentions": True}, UnsupportedOption, "output_attentions"),
    ({"penalty_alpha": 0.6, "output_past_key_values": True}, UnsupportedOption, "output_past_key_values"),
    ({"dola_layers": "middle"}, InvalidParam, "dola_layers"),
    ({"dola_layers": []}, InvalidParam, "dola_layers"),
    ({"dola_layers": 1}, InvalidParam, "dola_layers"),
    ({"dola_layers": [True]}, InvalidParam, "dola_layers"),
    ({"dola_layers": [-1]}, InvalidParam, "dola_layers"),
    ({"dola_layers": [0.5]}, InvalidParam, "dola_layers"),
    ({"dola_layers": [99]}, InvalidParam, "dola_layers=.99.*layers"),
    ({"dola_layers": [0] * 5000}, InvalidParam, "dola_layers"),
    ({"dola_layers": "low", "num_beams": 2}, UnsupportedOption, "dola_layers='low'"),
    ({"dola_layers": "low", "do_sample": True, "num_return_sequences": 2}, UnsupportedOption, "dola_layers='low'"),
    ({"dola_layers": "low", "guidance_scale": 2.0}, UnsupportedOption, "dola_layers='low' beside guidance_scale=2"),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_makes_no_sense_is_refused_by_name(pair: Pair, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pair.lm().generate(random_ids(1, 5), max_new_tokens=4, **options)


def test_layers_that_a_model_lacks_are_refused_by_name(lm_of: Any) -> None:
    with pytest.raises(InvalidParam, match="dola_layers='low'"):
        lm_of("gpt2").generate(random_ids(1, 5), dola_layers="low")
    with pytest.raises(InvalidParam, match=r"dola_layers=\[1, 2\].*2 layers"):
        lm_of("gpt2, 2 layers").generate(random_ids(1, 5), dola_layers=[1, 2])


def test_a_sequence_goes_on_in_place_by_dola_and_not_by_contrastive_search(pair: Pair) -> None:
    prompt = random_ids(1, 5)
    expected = pair.lm().generate(prompt, dola_layers="high", max_new_tokens=6)
    with pair.lm().sequence(prompt) as sequence:
        assert pair.lm().generate(sequence, dola_layers="high", max_new_tokens=6).token_ids == expected.token_ids
        with pytest.raises(UnsupportedOption, match=r"penalty_alpha=0\.6"):
            pair.lm().generate(sequence, penalty_alpha=0.6)
