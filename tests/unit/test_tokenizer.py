"""A folder's tokenizer gives the ids of transformers' AutoTokenizer, whatever else the folder holds."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from handloom.errors import InvalidPrompt, TokenizerError
from handloom.text import tokenizer_folder
from handloom.text.tokenizer import Tokenizer, check_text
from tiny_tokenizers import BUILDERS, SETTINGS, STRINGS, byte_bpe, tiny, wrap


def save(folder: Path, name: str = "byte_bpe", *, config: object = None, **settings: Any) -> Path:
    """A model folder with that tiny tokenizer; `settings` are put into tokenizer_config.json as they are."""
    wrap(tiny(name), **SETTINGS[name]).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def outcome(encode: Any, text: str, **options: Any) -> Any:
    """Ids, or "fails": some classes cannot encode with some files, and then ours must not either."""
    try:
        return encode(text, **options)
    except Exception:
        return "fails"


def assert_same(ours: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    assert type(ours.hf) is type(theirs)
    assert ours.hf.special_tokens_map == theirs.special_tokens_map
    assert ours.hf.get_vocab() == theirs.get_vocab()
    for text in STRINGS:
        ids = outcome(theirs.encode, text)
        assert outcome(ours.encode, text) == ids
        assert outcome(ours.encode, text, add_special_tokens=False) == outcome(
            theirs.encode, text, add_special_tokens=False
        )
        for skip in (False, True):
            if ids != "fails":
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


# The same ids as transformers --------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2", "gemma3_text", "qwen2", "mistral", "unheard_of"])
@pytest.mark.parametrize("name", BUILDERS)
def test_ids_and_text_are_those_of_autotokenizer(tmp_path: Path, name: str, model_type: str | None) -> None:
    config = None if model_type is None else {"model_type": model_type}
    for number, class_name in enumerate(["LlamaTokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"]):
        folder = save(tmp_path / str(number), name, config=config, tokenizer_class=class_name)
        assert_same(Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"add_prefix_space": True},
        {"add_bos_token": True, "bos_token": "<|im_start|>"},
        {"split_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
        {"additional_special_tokens": ["<extra>", "<|im_start|>"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"audio_token": "<audio>"},
        {"bos_token": {"__type": "AddedToken", "content": "<new>", "lstrip": True, "rstrip": True}},
        {
            "added_tokens_decoder": {
                "9": {"content": "!", "special": True},
                "500": {"content": " wo", "normalized": True},
            }
        },
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
def test_settings_have_the_effect_they_have_in_transformers(tmp_path: Path, settings: Any, class_name: str) -> None:
    folder = save(tmp_path, config={"model_type": "gpt2"}, tokenizer_class=class_name, **settings)
    assert_same(Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder))


def test_vocab_and_merges_are_enough(tmp_path: Path) -> None:
    byte_bpe().model.save(str(tmp_path))
    for class_name in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<more>": 450}))
        assert_same(Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"fix_mistral_regex": True}])
def test_an_old_mistral_folder_is_read_as_transformers_reads_it(tmp_path: Path, settings: dict[str, bool]) -> None:
    data = json.loads(byte_bpe().to_str())
    data["model"]["vocab"].update({f"[{index}]": index for index in range(1000, 101_000)})
    save(tmp_path, config={"model_type": "mistral", "transformers_version": "4.40.0"}, **settings)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    try:
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    except (TypeError, ImportError):  # transformers 5.3 stumbles over the setting
        with pytest.raises(TokenizerError, match="cannot be loaded"):
            Tokenizer.from_folder(tmp_path)
    else:
        assert_same(Tokenizer.from_folder(tmp_path), theirs)


def test_every_setting_of_a_fast_tokenizer_class_is_known_or_refused_on_purpose() -> None:
    refused = {"self", "args", "kwargs", "vocab", "merges", "vocab_file", "merges_file", "normalizer_file"}
    not_text = {"entity_vocab", "tags_dict", "token_type_ids_pattern", "_spm_precompiled_charsmap", "entity_token_1"}
    not_text |= {"entity_token_2", "cls_token_box", "sep_token_box", "pad_token_box"}
    lists = tokenizer_folder.TOKEN_LIST_FIELDS
    known = tokenizer_folder.SCALAR_FIELDS | tokenizer_folder.WORD_FIELDS | lists | refused | not_text
    for source in sorted(Path(transformers.models.__path__[0]).glob("*/tokenization_*.py")):
        if "TokenizersBackend" not in source.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{source.parent.name}.{source.stem}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, PreTrainedTokenizerFast) and "__init__" in vars(cls):
                names = set(inspect.signature(cls.__init__).parameters)
                unknown = {name for name in names - known if not name.endswith(("_token", "_token_sent"))}
                assert not unknown, f"{cls.__name__} takes {unknown}: does it change ids? Then the allow-list needs it"


# Nothing in the folder is run, followed or believed ----------------------------------------------


EVIL = "import pathlib; pathlib.Path({sentinel!r}).touch()\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        {"auto_map": ["evil.Evil", "evil.Evil"]},
        {"auto_map": {"AutoTokenizer": ["other/repo--evil.Evil", None]}, "trust_remote_code": True},
        {"trust_remote_code": True, "init_inputs": ["evil"], "use_fast": False},
        {"vocab_file": "/etc/passwd", "merges_file": "/etc/passwd", "tokenizer_file": "/etc/passwd"},
        {"gguf_file": "/etc/passwd", "name_or_path": "/etc", "fast_tokenizer_files": ["../../../etc/passwd"]},
        {"tokenizer_object": True, "_tokenizer": 1, "encode": 1, "post_processor": {"a": 1}, "model": "x"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_02_hostile_settings_change_nothing_and_run_nothing(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = Tokenizer.from_folder(save(tmp_path / "clean", config={"model_type": "gpt2"}))
    sentinel = tmp_path / "it_ran"
    remote = {"AutoTokenizer": "evil.Evil", "AutoConfig": "evil.Evil"}
    config = {
        "model_type": "gpt2",
        "auto_map": remote,
        "trust_remote_code": True,
        "_attn_implementation": "evil/kernel",
    }
    folder = save(tmp_path / "evil", config=config, **settings)
    (folder / "evil.py").write_text(EVIL.format(sentinel=str(sentinel)))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was tried"))
    hostile = Tokenizer.from_folder(folder)
    assert_same(hostile, clean.hf)
    assert not sentinel.exists()
    assert "evil" not in "".join(sys.modules)
    assert str(folder) == hostile.hf.name_or_path


def test_02_own_code_that_would_be_needed_is_refused(tmp_path: Path) -> None:
    folder = save(
        tmp_path,
        config={"model_type": "my_own"},
        tokenizer_class="MyTokenizer",
        auto_map={"AutoTokenizer": "evil.Evil"},
    )
    with pytest.raises(TokenizerError, match=r"auto_map.*evil\.Evil.*never run"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "name", ["AutoModelForCausalLM", "AutoTokenizer", "pipeline", "os.system", "", 3, ["x"], "../x"]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_02_a_tokenizer_class_that_is_none_is_refused(tmp_path: Path, name: object, file: str) -> None:
    save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / file).write_text(json.dumps({**fields, "tokenizer_class": name}))
    with pytest.raises(TokenizerError, match=f"{file}: tokenizer_class"):
        Tokenizer.from_folder(tmp_path)


# Damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 100, 1000, -1])
def test_a_truncated_tokenizer_json_is_named(tmp_path: Path, kept: int) -> None:
    path = save(tmp_path) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"x"', b"[" * 100_000, b'{"a": NaN, "b"}'])
def test_a_damaged_small_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    (save(tmp_path) / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=file):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bos_token", 5),
        ("eos_token", ["x"]),
        ("pad_token", {"content": 1}),
        ("unk_token", {"content": "x", "lstrip": "yes"}),
        ("model_max_length", "10"),
        ("padding_side", 1),
        ("additional_special_tokens", "abc"),
        ("additional_special_tokens", [1]),
        ("added_tokens_decoder", {"-1": {"content": "x"}}),
        ("added_tokens_decoder", {"99999999999": {"content": "x"}}),
        ("added_tokens_decoder", [1]),
        ("chat_template", [{"name": "default"}]),
        ("chat_template", 7),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json: {field}"):
        Tokenizer.from_folder(save(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        ("model", {"type": "Nonsense"}),
        ("model", 3),
        ("added_tokens", {}),
        ("added_tokens", [{"id": 2**64, "content": "x"}]),
        ("decoder", {"type": "ByteLevel"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    ],
)
def test_wrong_types_in_tokenizer_json_are_an_error(tmp_path: Path, part: str, value: object) -> None:
    path = save(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: value}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_file_past_the_size_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    monkeypatch.setattr(tokenizer_folder, "MAX_FILE_BYTES", 1000)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has \d+ bytes; the limit is 1000"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_fast_tokenizer_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json|not a folder"):
            Tokenizer.from_folder(folder)


def test_a_panic_of_the_rust_library_is_a_typed_error(tmp_path: Path) -> None:
    path = save(tmp_path) / "tokenizer.json"
    data = json.loads(path.read_text())
    strip = {"type": "Strip", "content": "!", "start": 9, "stop": 9}
    path.write_text(json.dumps({**data, "decoder": strip}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="the tokenizer failed on these ids"):
        tokenizer.decode(tokenizer.encode("!"))
    path.write_text(
        json.dumps({**data, "model": {**data["model"], "vocab": {"a": 0, "long": 1}, "merges": ["long long"]}})
    )
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be loaded"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "continuing\\u005fsubword_prefix"])
def test_merges_that_would_end_the_process_are_refused(tmp_path: Path, key: str) -> None:
    path = save(tmp_path) / "tokenizer.json"
    model = {"type": "BPE", "prefix": "x", "vocab": {"a": 0, "▁": 1}, "merges": [["a", "▁"]]}
    text = json.dumps({**json.loads(path.read_text()), "model": model}).replace('"prefix"', f'"{key}"')
    path.write_text(text)
    with pytest.raises(TokenizerError, match=r"model\.merges\[0\]"):
        Tokenizer.from_folder(tmp_path)


def test_an_added_token_that_would_be_searched_for_ever_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path) / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = {"type": "Replace", "pattern": {"String": "\0"}, "content": ""}
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 406, "content": "\0", "normalized": True})
    path.write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match="added token 406"):
        Tokenizer.from_folder(tmp_path)


# What comes in -----------------------------------------------------------------------------------


def test_15_lone_surrogates_are_named_by_position() -> None:
    tokenizer = Tokenizer(wrap(tiny("byte_bpe")))
    with pytest.raises(InvalidPrompt, match=r"character 3 is a lone surrogate, U\+D800"):
        tokenizer.encode("é a\ud800b")


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["list"]])
def test_15_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(InvalidPrompt, match="must be a str"):
        Tokenizer(wrap(tiny("byte_bpe"))).encode(text)


def test_15_ids_outside_the_vocabulary_are_refused() -> None:
    tokenizer = Tokenizer(wrap(tiny("byte_bpe")))
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(range(tokenizer.vocab_size)) != ""
    for ids in ([-1], [tokenizer.vocab_size], [0, 2**40, 1], [0, -(2**70)]):
        with pytest.raises(InvalidPrompt, match=rf"outside this tokenizer's 0\.\.{tokenizer.vocab_size - 1}"):
            tokenizer.decode(ids)
    for not_ids in ([1.5], ["1"], [None], 7):
        with pytest.raises(InvalidPrompt, match="must be integers"):
            tokenizer.decode(not_ids)  # type: ignore[arg-type]


def test_16_text_past_the_byte_limit_is_refused_before_tokenising() -> None:
    class NeverAsked:
        def encode(self, *args: object, **options: object) -> list[int]:
            raise AssertionError("tokenised")

    tokenizer = Tokenizer(NeverAsked(), max_text_bytes=10)  # type: ignore[arg-type]
    for text in ("a" * 11, "é" * 6, "🙂" * 3):
        with pytest.raises(InvalidPrompt, match="the limit is 10"):
            tokenizer.encode(text)
    for text in ("a" * 10, "é" * 5, ""):
        assert check_text(text, max_bytes=10) is text


# Small properties --------------------------------------------------------------------------------


def test_vocab_size_counts_to_the_highest_id() -> None:
    backend = byte_bpe()
    data = json.loads(backend.to_str())
    data["model"]["vocab"]["<far>"] = 1234
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 1234, "content": "<far>"})
    tokenizer = Tokenizer(wrap(type(backend).from_str(json.dumps(data))))
    assert tokenizer.encode("<far>") == [1234]
    assert tokenizer.vocab_size == 1235
    assert len(tokenizer.hf) < 1235


def test_special_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path, "sentencepiece_prefix_space"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    tokenizer = Tokenizer(wrap(tiny("words")))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, None, None)


def test_chat_templates_are_read_from_every_place(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template=[{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}])
    assert Tokenizer.from_folder(folder).chat_template == {"default": "D", "rag": "R"}
    (folder / "chat_template.jinja").write_text("one\r\ntwo")
    assert Tokenizer.from_folder(folder).chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert Tokenizer.from_folder(folder).chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.from_folder(folder)


def test_the_loaded_tokenizer_outlives_its_folder_and_points_to_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    tokenizer = Tokenizer.from_folder(folder)
    assert not [value for value in tokenizer.hf.init_kwargs.values() if isinstance(value, str) and "handloom-" in value]
    shutil.rmtree(folder)
    tokenizer.hf.save_pretrained(tmp_path / "copy")
    assert_same(Tokenizer.from_folder(tmp_path / "copy"), tokenizer.hf)
