"""The model's generation_config.json counts as in transformers: under the caller's options, over the defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import handloom as hl
from handloom.errors import HandloomError, InvalidParam
from parity_checks import Pair, load_pair
from tiny_models import EOS, edit_json, random_ids, save, tiny_llama

EOS_SET = list(range(4, 331, 30))

FILES: dict[str, dict[str, Any] | None] = {
    "no file": None,
    "eos set": {"eos_token_id": EOS_SET},
    "no eos": {"bos_token_id": 1, "transformers_version": "4.40.0"},
    "max_new_tokens": {"max_new_tokens": 7, "eos_token_id": None},
    "max_length": {"max_length": 40, "eos_token_id": None},
    "max_length past the context": {"max_length": 4096, "eos_token_id": EOS_SET},
    "min_length": {"min_length": 30, "eos_token_id": EOS_SET, "max_length": 60},
    "sampling": {"do_sample": True, "temperature": 0.6, "top_k": 10, "top_p": 0.9, "eos_token_id": 0},
    "sampling with the default top_k": {"do_sample": True},
    "sampling without top_k": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "knobs without do_sample": {"temperature": 0.6, "top_p": 0.9},
    "penalty": {"repetition_penalty": 1.5, "max_new_tokens": 25},
    "what only says how to compute": {"use_cache": False, "cache_implementation": None, "_from_model_config": True},
    "as it is published": {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": [0, 7],
        "pad_token_id": 2,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "transformers_version": "4.55.4",
    },
}

ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "eos": {"eos_token_id": list(range(5, 331, 6))},
    "no eos": {"eos_token_id": None, "max_new_tokens": 22},
    "max_new_tokens": {"max_new_tokens": 3},
    "max_length": {"max_length": 15},
    "knobs": {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.99},
    "knobs off": {"do_sample": True, "top_k": None, "top_p": None, "temperature": None},
    "no penalty": {"repetition_penalty": 1.0},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
    pytest.mark.filterwarnings("ignore:Unfeasible length constraints"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid"),
]


def outcome(run: Callable[[], list[int]], expected: type[Exception]) -> list[int] | str:
    """The tokens, or that it was refused."""
    torch.manual_seed(11)
    try:
        return run()
    except expected:
        return "refused"


def both(pair: Pair, prompt: list[int], **options: Any) -> tuple[list[int] | str, list[int] | str]:
    """(handloom's tokens, transformers' tokens) for the same options after the same manual_seed."""
    ours = outcome(lambda: pair.lm().generate(prompt, rng="torch", **options).token_ids, HandloomError)
    ids = torch.tensor([prompt])
    theirs = outcome(lambda: pair.hf.generate(ids, **options)[0, len(prompt) :].tolist(), ValueError)
    return ours, theirs


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(2)


def with_file(model: Any, folder: Path, values: dict[str, Any] | None) -> Pair:
    save(model, folder, tokenizer=False)
    path = folder / "generation_config.json"
    path.unlink()
    if values is not None:
        path.write_text(json.dumps(values))
    return load_pair(folder)


@pytest.mark.parametrize("file", FILES)
def test_the_file_counts_as_in_transformers(model: Any, tmp_path: Path, file: str) -> None:
    pair = with_file(model, tmp_path, FILES[file])
    for options in ASKED.values():
        ours, theirs = both(pair, random_ids(3, 12), **options)
        assert ours == theirs, options


def test_a_file_whose_max_length_the_prompt_already_has(model: Any, tmp_path: Path) -> None:
    pair = with_file(model, tmp_path, {"max_length": 12, "eos_token_id": None})
    assert both(pair, random_ids(3, 12)) == ("refused", "refused")
    ours, theirs = both(pair, random_ids(3, 12), max_new_tokens=4)
    assert ours == theirs
    assert len(ours) == 4


def test_a_passed_config_stands_between_the_caller_and_the_file(model: Any, tmp_path: Path) -> None:
    pair = with_file(model, tmp_path, {"do_sample": True, "top_k": 5, "eos_token_id": EOS_SET, "max_new_tokens": 30})
    passed = GenerationConfig(top_k=60, temperature=1.7, max_new_tokens=26)
    for options in ({}, {"max_new_tokens": 9}, {"eos_token_id": None}, {"top_k": 3, "do_sample": True}):
        ours, theirs = both(pair, random_ids(3, 12), generation_config=passed, **options)
        assert ours == theirs, options


def test_eos_of_config_json_counts_where_there_is_no_generation_config(model: Any, tmp_path: Path) -> None:
    pair = with_file(model, tmp_path, None)
    prompt = random_ids(3, 12)
    free = pair.lm().generate(prompt, eos_token_id=None).token_ids
    edit_json(tmp_path / "config.json", eos_token_id=[free[4], EOS])
    pair = load_pair(tmp_path)
    ours, theirs = both(pair, prompt)
    assert ours == theirs == free[: free.index(free[4]) + 1]


def test_without_any_file_that_names_an_eos_there_is_none(model: Any, tmp_path: Path) -> None:
    """Not even the default of transformers' LlamaConfig."""
    with_file(model, tmp_path, None)
    edit_json(tmp_path / "config.json", eos_token_id=..., bos_token_id=...)
    pair = load_pair(tmp_path)
    assert pair.hf.config.eos_token_id is not None
    prompt = random_ids(3, 12)
    free = pair.lm().generate(prompt, eos_token_id=None).token_ids
    ours, theirs = both(pair, prompt, do_sample=False)
    assert ours == theirs == free


def test_the_file_of_a_model_may_not_hold_what_we_do_not_do(model: Any, tmp_path: Path) -> None:
    """…unless the caller says otherwise: nothing in it is dropped in silence."""
    with_file(model, tmp_path, {"use_mtp": True, "no_repeat_ngram_size": 3})
    lm = hl.LM.from_pretrained(tmp_path)
    with pytest.raises(HandloomError, match=r"use_mtp"):
        lm.generate(random_ids(3, 12))
    prompt = random_ids(3, 12)
    assert len(lm.generate(prompt, use_mtp=False, no_repeat_ngram_size=0, eos_token_id=None).token_ids) == 20


def test_a_field_of_the_file_that_nobody_knows_is_refused_with_the_way_out(model: Any, tmp_path: Path) -> None:
    lm = with_file(model, tmp_path, {"max_window_size": 6144, "eos_token_id": None}).lm()
    with pytest.raises(InvalidParam, match=r"'max_window_size'.*delete it from lm\.generation_config"):
        lm.generate([5, 6, 7])
    del lm.generation_config["max_window_size"]
    assert len(lm.generate([5, 6, 7]).token_ids) == 20


def test_the_config_of_a_loaded_model_may_be_replaced_by_an_object(pair: Pair) -> None:
    lm = hl.LM.from_pretrained(pair.folder)
    lm.generation_config = GenerationConfig(max_new_tokens=4, eos_token_id=None, repetition_penalty=1.5)
    expected = pair.lm().generate([5, 6, 7], max_new_tokens=4, eos_token_id=None, repetition_penalty=1.5)
    assert lm.generate([5, 6, 7]).token_ids == expected.token_ids
    lm.generation_config = 5
    with pytest.raises(HandloomError, match="must be a GenerationConfig or a mapping, not int"):
        lm.generate([5, 6, 7])
