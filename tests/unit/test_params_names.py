"""Every name that transformers knows works or is refused by name; nothing is ignored."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
import torch
from transformers import GenerationConfig, TextStreamer
from transformers.generation.utils import GenerationMixin

from handloom.errors import HandloomError, InvalidParam, UnsupportedOption
from handloom.sampling import options as names
from handloom.sampling.params import GenerationParams
from handloom.sampling.surface import ELSEWHERE
from option_checks import resolve

FIELDS = sorted(vars(GenerationConfig()))
OURS = set(GenerationParams.__dataclass_fields__) | {"max_length", "constraints"}
LACKING = [name for name in FIELDS if name not in OURS | names.BOOKKEEPING and not name.startswith("_")]


@pytest.mark.parametrize("name", LACKING)
def test_every_other_field_of_generation_config_is_refused_by_name_unless_it_does_nothing(name):
    for value in (3, "something", [[1]]):
        with pytest.raises(UnsupportedOption, match=f"^{name}=.*leave it out"):
            resolve({name: value})
        with pytest.raises(UnsupportedOption, match=f"^{name}="):
            resolve({name: value}, {name: names.INERT.get(name)})
        if name not in names.NO_EFFECT_IN_A_FILE:
            with pytest.raises(UnsupportedOption, match=f"^{name}=.*generation_config.json.*pass {name}="):
                resolve({}, {name: value})
            with pytest.raises(UnsupportedOption, match=f"^{name}=.*generation_config passed"):
                resolve({"generation_config": {name: value}})
    inert = names.INERT.get(name)
    reference = resolve({"seed": 1})
    assert resolve({"seed": 1, name: inert}) == reference
    assert resolve({"seed": 1, name: None}) == reference
    assert resolve({"seed": 1, name: inert}, {name: 3}) == reference
    assert resolve({"seed": 1}, {name: inert}) == reference


@pytest.mark.parametrize("name", sorted(names.NO_EFFECT_IN_A_FILE))
def test_what_only_steers_transformers_own_computing_is_no_request_in_a_file(name):
    assert resolve({"seed": 1}, {name: "hybrid"}) == resolve({"seed": 1})


@pytest.mark.parametrize(
    "name", sorted(set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"})
)
def test_every_argument_of_generate_works_or_is_refused_by_name(name):
    if name in ("generation_config", "logits_processor", "stopping_criteria"):
        resolve({name: {} if name == "generation_config" else [print]})
        return
    if name == "prefix_allowed_tokens_fn":
        assert resolve({name: print}).prefix_allowed_tokens_fn is print
        return
    if name == "negative_prompt_ids":
        assert resolve({name: [3, 4], "guidance_scale": 2.0}).negative_prompt_ids == (3, 4)
        return
    if name == "assistant_model":  # what it may be is checked beside the model: test_speculative.py
        assert resolve({name: print}).assistant_model is print
        return
    with pytest.raises(UnsupportedOption, match=f"^{name}="):
        resolve({name: TextStreamer})
    assert resolve({name: None, "seed": 1}) == resolve({"seed": 1})


@pytest.mark.parametrize("name", ["tokenizer", "trust_remote_code", "input_ids", "attention_mask", "past_key_values"])
def test_what_generate_hands_on_is_refused_by_name(name):
    with pytest.raises(UnsupportedOption, match=f"^{name}="):
        resolve({name: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("max_tokens", "max_new_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("stopstrings", "stop_strings"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest_known_one(typo, meant):
    with pytest.raises(InvalidParam, match=f"'{typo}' .from the caller. .*did you mean {meant}"):
        resolve({typo: 3})
    with pytest.raises(InvalidParam, match=r"generation_config\.json"):
        resolve({}, {typo: 3})


@pytest.mark.parametrize(("name", "here"), ELSEWHERE.items())
def test_a_name_of_another_library_is_refused_with_what_it_is_here(name, here):
    with pytest.raises(
        InvalidParam, match=re.escape(f"'{name}' (from the caller) is no generation option; did you mean {here}?")
    ):
        resolve({name: 1})
    first = re.match(r"\w+", here)[0]
    field_names = {field.name for field in fields(GenerationParams)} | names.OURS
    assert first in field_names or here.startswith(("lm.", "the first argument", "an argument", "prompt + output.text"))


@pytest.mark.parametrize("name", sorted(names.OURS))
def test_options_of_ours_do_not_belong_in_a_generation_config(name):
    with pytest.raises(InvalidParam, match=name):
        resolve({}, {name: 1})


def test_bookkeeping_is_accepted_with_any_value():
    values = {"transformers_version": "4.40.1", "_from_model_config": True, "pad_token_id": -1, "bos_token_id": 10**9}
    assert resolve({"seed": 1, "return_dict_in_generate": True}, values) == resolve({"seed": 1})


def test_an_error_message_stays_short_whatever_the_value():
    for options in ({"top_k": "x" * 10**6}, {"x" * 10**6: 1}, {"num_beams": list(range(10**5))}, {"seed": 10**5000}):
        with pytest.raises(HandloomError) as error:
            resolve(options)
        assert len(str(error.value)) < 400
