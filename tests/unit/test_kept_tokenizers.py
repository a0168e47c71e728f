"""A tokenizer that was kept gives what transformers' own gives, and is kept only where that is so."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from handloom import kept
from handloom.text import kept_tokenizers
from handloom.text.decoder_stages import build_stages, cleans_up
from handloom.text.kept_tokenizers import MAX_KEPT, pack, unpack
from handloom.text.plain_tokenizer import PlainTokenizer
from handloom.text.tokenizer import Tokenizer
from handloom.text.tokenizer_folder import load_fast_tokenizer
from tiny_tokenizers import BUILDERS, SETTINGS, STRINGS, tiny, wrap

CLASSES = ("LlamaTokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer")
LOAD = """
import json, sys
from pathlib import Path
from handloom.text.tokenizer import Tokenizer
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
ids = [tokenizer.encode(text) for text in json.loads(sys.argv[2])]
print(json.dumps([ids, [tokenizer.decode(i) for i in ids], "transformers" in sys.modules, tokenizer.bos_token_id]))
print(type(tokenizer.hf).__name__, [tokenizer.encode(text) for text in json.loads(sys.argv[2])] == ids)
"""


def save(folder: Path, name: str = "byte_bpe", **settings: Any) -> Path:
    wrap(tiny(name), **{**SETTINGS[name], **settings}).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def assert_same(plain: PlainTokenizer, hf: PreTrainedTokenizerFast) -> None:
    assert plain.get_vocab() == hf.get_vocab()
    assert plain.special_tokens_map == hf.special_tokens_map
    assert plain.chat_template == hf.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(plain, name) == getattr(hf, name)
    assert [(i, str(t), t.special) for i, t in plain.added_tokens_decoder.items()] == [
        (i, str(t), t.special) for i, t in hf.added_tokens_decoder.items()
    ]
    for text in STRINGS:
        for special in (False, True):
            ids = hf.encode(text, add_special_tokens=special)
            assert plain.encode(text, add_special_tokens=special) == ids
            for skip in (False, True):
                assert plain.decode(ids, skip_special_tokens=skip) == hf.decode(ids, skip_special_tokens=skip)
    assert len(build_stages(plain)) == len(build_stages(hf))


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_kept_says_what_transformers_says(tmp_path: Path, name: str, class_name: str) -> None:
    folder = save(tmp_path, name, chat_template="T")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": class_name}))
    hf = load_fast_tokenizer(folder)
    data = pack(hf)
    assert (data is None) == cleans_up(hf)
    if data is not None:
        assert_same(unpack(data, folder), AutoTokenizer.from_pretrained(folder))


def test_cutting_and_padding_that_a_file_asks_for_happen_to_neither() -> None:
    backend = BUILDERS["byte_bpe"]()
    backend.enable_truncation(3)
    backend.enable_padding(length=40)
    hf = wrap(backend, **SETTINGS["byte_bpe"])
    data = pack(hf)
    assert data is not None
    assert_same(unpack(data, Path()), hf)


class Odd(LlamaTokenizer):
    def _decode(self, *args: Any, **options: Any) -> str:
        return "odd"


@pytest.mark.parametrize("settings", [{"split_special_tokens": True}, {"clean_up_tokenization_spaces": True}])
def test_what_python_changes_is_not_kept(settings: dict[str, bool]) -> None:
    assert pack(wrap(tiny("byte_bpe"), **SETTINGS["byte_bpe"])) is not None
    hf = wrap(tiny("words"), **SETTINGS["words"])
    assert pack(hf) is not None
    assert pack(wrap(tiny("words"), **SETTINGS["words"], **settings)) is None
    hf.__class__ = Odd
    assert pack(hf) is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "handloom"


def start(folder: Path) -> tuple[list[Any], list[str]]:
    """A fresh process: ids, texts, whether transformers was imported, bos; then what `hf` is, and whether it agrees."""
    command = [sys.executable, "-c", LOAD, str(folder), json.dumps(STRINGS)]
    first, second = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return json.loads(first), second.split()


def test_the_second_process_does_without_transformers(tmp_path: Path, cache: Path) -> None:
    folder = save(tmp_path / "model", "sentencepiece_prefix_space")
    hf = AutoTokenizer.from_pretrained(folder)
    ids = [hf.encode(text) for text in STRINGS]
    for imported in (True, False):
        printed, later = start(folder)
        assert printed == [ids, [hf.decode(i, skip_special_tokens=True) for i in ids], imported, hf.bos_token_id]
        assert later == [type(hf).__name__, "True"]
    assert len(list(cache.glob("tokenizer-*"))) == 1


def test_any_change_of_the_folder_is_seen_and_a_damaged_file_is_made_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "transformers")  # as in a process that has not imported it
    folder = save(tmp_path / "model")

    def load() -> Tokenizer:
        monkeypatch.delitem(sys.modules, "transformers", raising=False)
        return Tokenizer.from_folder(folder)

    assert not isinstance(load().fast, PlainTokenizer)
    assert isinstance(load().fast, PlainTokenizer)
    for path in list(folder.iterdir()):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"}", b" }", 1) if b"}" in before else before + b" ")
        assert not isinstance(load().fast, PlainTokenizer), path.name
        path.write_bytes(before)
        assert isinstance(load().fast, PlainTokenizer)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load().chat_template["rag"] == "R"
    assert load().chat_template["rag"] == "R"
    for path in cache.glob("tokenizer-*"):
        path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "handloom"):
        assert not isinstance(load().fast, PlainTokenizer)
    assert "is damaged; the tokenizer is made anew" in caplog.text


def test_no_more_than_so_many_are_kept(cache: Path) -> None:
    for number in range(MAX_KEPT + 5):
        kept.write(cache / f"tokenizer-{number}", b"", "it")
        kept_tokenizers._drop_oldest(cache / "tokenizer-0")
    assert len(list(cache.glob("tokenizer-*"))) == MAX_KEPT
