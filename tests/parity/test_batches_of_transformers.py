"""Prompts as transformers' `generate` takes them: `input_ids`, `inputs`, `inputs_embeds`, `attention_mask`, padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from handloom import LM
from handloom.errors import InvalidPrompt, UnsupportedOption
from parity_checks import Pair, load_pair
from tiny_models import save, tiny_llama, tiny_tokenizer

TEXTS = ["Once upon a time", "Hi", "The loom"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(save(tiny_llama(), tmp_path_factory.mktemp("llama")))


def padded(side: str, tensors: str | None = "pt") -> dict[str, Any]:
    """What a tokenizer returns for a batch of texts of different lengths."""
    tokenizer = copy.deepcopy(tiny_tokenizer())  # that one is everybody's
    tokenizer.padding_side, tokenizer.pad_token = side, tokenizer.eos_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer(TEXTS, padding=True, return_tensors=tensors)


def test_a_padded_batch_gives_the_tokens_of_generate(pair: Pair) -> None:
    batch = padded("left")
    assert 0 in batch["attention_mask"]
    theirs = pair.hf.generate(**batch, **OPTIONS)[:, batch["input_ids"].shape[1] :]
    for ours in (
        pair.lm().generate(**batch, **OPTIONS),
        pair.lm().generate(batch, **OPTIONS),
        pair.lm().generate(batch["input_ids"], attention_mask=batch["attention_mask"], **OPTIONS),
        pair.lm().generate(inputs=batch["input_ids"], attention_mask=batch["attention_mask"].bool(), **OPTIONS),
        pair.lm().generate(**padded("left", "np"), **OPTIONS),
        pair.lm().generate(**padded("left", None), **OPTIONS),
        pair.lm().generate(**padded("right"), **OPTIONS),
    ):
        assert [output.token_ids for output in ours] == theirs.tolist()
        assert [output.prompt_token_ids for output in ours] == tiny_tokenizer()(TEXTS)["input_ids"]


def test_padded_embeddings_give_the_tokens_of_generate(pair: Pair) -> None:
    batch = padded("left")
    embeddings = pair.hf.get_input_embeddings()(batch["input_ids"]).detach()
    theirs = pair.hf.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **OPTIONS)
    ours = pair.lm().generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **OPTIONS)
    assert [output.token_ids for output in ours] == theirs.tolist()


def test_one_prompt_needs_no_mask_and_no_batch(pair: Pair) -> None:
    ids = tiny_tokenizer()(TEXTS[0])["input_ids"]
    expected = pair.lm().generate(ids, **OPTIONS).token_ids
    (batch_of_one,) = pair.lm().generate(input_ids=torch.tensor([ids]), **OPTIONS)
    alone = pair.lm().generate(input_ids=ids, attention_mask=[1] * len(ids), **OPTIONS)
    assert batch_of_one.token_ids == alone.token_ids == expected
    for first in (torch.tensor([ids]), np.array([ids])):
        assert [output.token_ids for output in pair.lm().generate(first, **OPTIONS)] == [expected]
    pieces = list(pair.lm().stream(input_ids=np.array(ids), **OPTIONS))
    assert [piece.token_id for piece in pieces[:-1]] == expected
    ragged = pair.lm().generate(input_ids=[ids, ids[:2]], **OPTIONS)
    assert [len(output.prompt_token_ids) for output in ragged] == [len(ids), 2]


def test_what_transformers_would_mask_as_padding_needs_a_mask(pair: Pair) -> None:
    """It takes pad_token_id in the ids for padding, unless that is an end-of-sequence token."""
    ids = torch.tensor([[2, 2, 5, 6, 7]])
    said = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": 0}
    hidden = pair.hf.generate(ids, **said, pad_token_id=2)[0, 5:].tolist()
    shown = pair.hf.generate(ids, attention_mask=torch.ones_like(ids), **said, pad_token_id=2)[0, 5:].tolist()
    assert hidden != shown
    for way in (
        {"pad_token_id": 2},
        {"generation_config": {"pad_token_id": 2}},
        {"generation_config": GenerationConfig(pad_token_id=2)},
    ):
        for name in ("input_ids", "inputs"):
            with pytest.raises(InvalidPrompt, match=r"holds pad_token_id=2.*attention_mask"):
                pair.lm().generate(**{name: ids}, **said, **way)
        with pytest.raises(InvalidPrompt, match=r"holds pad_token_id=2.*attention_mask"):
            pair.lm().generate(ids, **said, **way)
        for mask, expected in ((ids != 2, hidden), (torch.ones_like(ids), shown)):
            assert pair.lm().generate(input_ids=ids, attention_mask=mask, **said, **way)[0].token_ids == expected
        assert pair.lm().generate(ids[0].tolist(), **said, **way).token_ids == shown
    for way in ({"pad_token_id": None}, {"pad_token_id": 3}, {"pad_token_id": 2, "eos_token_id": [0, 2]}):
        theirs = pair.hf.generate(ids, **{**said, **way})[0, 5:].tolist()
        assert pair.lm().generate(input_ids=ids, **{**said, **way})[0].token_ids == theirs


def test_a_padding_of_the_models_file_counts(pair: Pair) -> None:
    lm = LM.from_pretrained(pair.folder)
    lm.generation_config["pad_token_id"] = 7
    with pytest.raises(InvalidPrompt, match="holds pad_token_id=7"):
        lm.generate(input_ids=np.array([[7, 5]]), **OPTIONS)
    assert len(lm.generate(input_ids=np.array([[7, 5]]), **OPTIONS, pad_token_id=None)) == 1


IDS, MASK = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 1], [0, 1]])
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "the first argument is the prompt"),
    "None": ({"prompts": None, "input_ids": None}, "the first argument is the prompt"),
    "two prompts": ({"prompts": "a", "input_ids": IDS}, "the first argument and input_ids both are prompts"),
    "two names": ({"inputs": IDS, "inputs_embeds": IDS.float()}, "inputs and inputs_embeds both are prompts"),
    "twice": ({"prompts": {"input_ids": IDS}, "input_ids": IDS}, "input_ids stands in the prompt and beside it"),
    "no mask": ({"input_ids": IDS}, "give its attention_mask too"),
    "a text": ({"input_ids": "Hi"}, "input_ids is str"),
    "no dimension": ({"input_ids": torch.tensor(5)}, "the shape []"),
    "too many": ({"input_ids": IDS[None]}, "the shape [1, 2, 2]"),
    "mask of one row": ({"input_ids": IDS, "attention_mask": MASK[:1]}, "a row for each of the 2 prompts"),
    "mask too short": ({"input_ids": IDS, "attention_mask": MASK[:, :1]}, "row 0 of attention_mask is not as long"),
    "mask 4-D": ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, "row 0 of attention_mask is not as long"),
    "mask of floats": ({"input_ids": IDS, "attention_mask": MASK * -1e9}, "something other than 0 and 1"),
    "mask of nothing": ({"input_ids": IDS, "attention_mask": MASK * 0}, "row 0 of attention_mask hides the whole"),
    "mask a number": ({"input_ids": IDS, "attention_mask": 1}, "a row for each"),
    "mask a text": ({"input_ids": [5, 6], "attention_mask": "11"}, "not as long"),
    "mask of tensors": ({"input_ids": [[5, 6]], "attention_mask": [[torch.ones(2), 1]]}, "other than 0 and 1"),
    "mask of nothing at all": ({"input_ids": IDS, "attention_mask": MASK.to("meta")}, "meta device"),
    "nested": ({"input_ids": torch.nested.nested_tensor([IDS[0], IDS[0][:1]], layout=torch.jagged)}, "its unbind()"),
    "out of range": ({"input_ids": [[10**9]]}, "token 0 of the prompt is 1000000000"),
    "a message": ({"prompts": {"role": "user", "content": "Hi"}}, "lm.chat(messages)"),
    "messages": ({"prompts": [{"role": "user", "content": "Hi"}]}, "lm.chat(messages)"),
    "conversations": ({"prompts": [[{"role": "user", "content": "Hi"}]]}, "lm.chat(messages)"),
    "a mapping": ({"prompts": {"text": "Hi"}}, "input_ids"),
    "a generator": ({"prompts": (text for text in TEXTS)}, "make a list of prompts of it"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "says"), BAD.values(), ids=BAD.keys())
def test_a_prompt_that_is_none_is_refused_with_the_way_out(pair: Pair, call: dict[str, Any], says: str) -> None:
    for function in (pair.lm().generate, pair.lm().stream, pair.lm().astream):
        with pytest.raises(InvalidPrompt) as refused:
            function(**call, **OPTIONS)
        assert says in str(refused.value) and len(str(refused.value)) < 300


def test_a_mask_without_ids_is_refused_by_name(pair: Pair) -> None:
    with pytest.raises(UnsupportedOption, match=r"attention_mask=.*about `input_ids`"):
        pair.lm().generate("Hi", attention_mask=MASK, **OPTIONS)


def test_ids_of_numpy_are_one_prompt(pair: Pair, tmp_path: Path) -> None:
    lm = pair.lm()
    assert lm.generate([np.int64(5), np.int32(6)], **OPTIONS).token_ids == lm.generate([5, 6], **OPTIONS).token_ids
