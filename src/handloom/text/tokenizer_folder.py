"""Loading a tokenizer from a model folder: transformers' own choice, on files with their teeth drawn.

`AutoTokenizer` decides the class and its settings, so the ids are those of transformers, version by version; but it
never sees the folder. It gets a scratch folder with `tokenizer.json` (or `vocab.json` and `merges.txt`) linked, and
copies of the small files that hold only fields on the lists below, with values of the right type. Not there, so never
acted on: `auto_map`, `trust_remote_code`, names of files, `init_inputs`, a class that is no tokenizer, weights, Python
files, and all of config.json but four strings.

This module does not know encoding or decoding, what a chat template means, or where the folder came from.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from handloom.errors import TokenizerError
from handloom.text.typed_errors import typed_errors

MAX_FILE_BYTES = 128 * 2**20
MAX_TEMPLATE_BYTES = 2**20
MAX_TEMPLATES = 64

MODEL_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"

# Fields of config.json that decide the tokenizer's class or a repair of its regex.
MODEL_CONFIG_FIELDS = ("model_type", "model_name", "tokenizer_class", "transformers_version")
# Settings of tokenizer_config.json that are a flag, a number or null; …
SCALARS = """
    add_bos_token add_eos_token add_prefix_space clean_text clean_up_tokenization_spaces
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output do_lower_case extra_ids fix_mistral_regex
    keep_accents legacy legacy_behaviour max_depth max_entity_length max_len max_length max_mention_length max_width
    model_max_length offset only_label_first_subword pad_to_multiple_of pad_token_label pad_token_type_id pad_width
    predict_timestamps remove_space return_token_type_ids spaces_between_special_tokens split_by_punct
    split_special_tokens stride strip_accents tokenize_chinese_chars trim_offsets unk_id use_default_system_prompt
"""
# … a word or null; …
WORDS = """
    errors language padding_side src_lang task tgt_lang tokenizer_class truncation_side truncation_strategy
    wordpieces_prefix
"""
SCALAR_FIELDS = frozenset(SCALARS.split())
WORD_FIELDS = frozenset(WORDS.split())
# … tokens. Any other field that ends in "_token" is a token too.
TOKEN_FIELDS = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
TOKEN_LIST_FIELDS = {"additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"}
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
MERGE_PREFIX = b'continuing_subword_prefix"'
UNSET = re.compile(rb'\s*:\s*(null|"")')
# No writer of JSON escapes a letter: here it could only hide the key above.
ESCAPED_LETTER = re.compile(rb"\\u00(?:[4-6]|7[0-9aA])")
CLASS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}(Tokenizer|TokenizerFast|Backend)")


def load_fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `AutoTokenizer.from_pretrained(folder)` gives, without running anything of the folder's.

    Raises TokenizerError, naming the file, where one is missing, damaged or too large, and where the tokenizer needs
    the folder's own code or is not a fast one.
    """
    model_file = _model_file(folder)
    with tempfile.TemporaryDirectory(prefix="handloom-") as name:
        scratch = Path(name)
        config = _fill(scratch, folder)
        with typed_errors(TokenizerError, f"{model_file} cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(
                scratch, config=config, trust_remote_code=False, local_files_only=True
            )
            _check_added_tokens(tokenizer, model_file)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(
            f"{folder} makes {type(tokenizer).__name__}, a tokenizer written in Python; a fast one is needed. "
            f"{_how_to_convert(folder)}"
        )
    for attributes in (tokenizer.init_kwargs, vars(tokenizer)):
        for key, value in attributes.items():
            if isinstance(value, str) and value.startswith(str(scratch)):
                attributes[key] = str(folder) + value.removeprefix(str(scratch))
    return tokenizer


def _model_file(folder: Path) -> Path:
    """The file with the vocabulary, its size checked."""
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder with tokenizer files")
    present = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    for path in present:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} has {path.stat().st_size} bytes; the limit is {MAX_FILE_BYTES}")
    if not present or (present[0].name != "tokenizer.json" and len(present) < 2):
        raise TokenizerError(
            f"{folder} has no tokenizer.json, nor vocab.json with merges.txt. {_how_to_convert(folder)}"
        )
    if present[0].name == "tokenizer.json":
        _check_merges(present[0])
    return present[0]


def _check_merges(path: Path) -> None:
    """Refuse merges whose right half lacks the prefix it should have.

    `tokenizers` (seen in 0.23.3) cuts that many bytes off it unseen; inside a character, that ends the process.
    """
    if not _may_set_merge_prefix(path.read_bytes()):
        return
    model = (_read_object(path) or {}).get("model")
    prefix, merges = (
        (model.get("continuing_subword_prefix"), model.get("merges")) if isinstance(model, dict) else (0, 0)
    )
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return  # the library's own check of types refuses what is neither null nor right
    for index, merge in enumerate(merges):
        right = (
            merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] if isinstance(merge, list) and merge else ""
        )
        if not isinstance(right, str) or not right.startswith(prefix):
            raise _wrong(path, f"model.merges[{index}]", merge, f"a pair whose second half starts with {prefix!r}")


def _may_set_merge_prefix(data: bytes) -> bool:
    """A quick look, for parsing a large tokenizer.json once more takes as long as loading it."""
    at = data.find(MERGE_PREFIX)
    while at >= 0:
        at += len(MERGE_PREFIX)
        if not UNSET.match(data, at):
            return True
        at = data.find(MERGE_PREFIX, at)
    return b"\\u00" in data and ESCAPED_LETTER.search(data) is not None


def _check_added_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Refuse an added token that the normalizer erases: `tokenizers` (seen in 0.23.3) may look for it for ever."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.normalized and not backend.normalizer.normalize_str(token.content):
            raise _wrong(path, f"added token {index}", token.content, "text that the normalizer leaves something of")


def _how_to_convert(folder: Path) -> str:
    return (
        "If transformers can load this tokenizer as a fast one, AutoTokenizer.from_pretrained(…)"
        f".save_pretrained({str(folder)!r}) writes the tokenizer.json that is needed"
    )


# The scratch folder ------------------------------------------------------------------------------


def _fill(scratch: Path, folder: Path) -> PreTrainedConfig | None:
    """Put into `scratch` what AutoTokenizer may read of `folder`, and return the `config` to call it with."""
    for name in MODEL_FILES:
        if (folder / name).is_file():
            _link(folder / name, scratch / name)
    config = _read_object(folder / "config.json")
    settings = _read_object(folder / "tokenizer_config.json")
    special_map = _read_object(folder / "special_tokens_map.json")
    added = _read_object(folder / "added_tokens.json")
    _check_class(config, settings, folder)
    fields = {
        key: value for key, value in (config or {}).items() if key in MODEL_CONFIG_FIELDS and isinstance(value, str)
    }
    if config is not None:
        _write(scratch / "config.json", fields)
    if settings is not None:
        _write(scratch / "tokenizer_config.json", _clean_settings(settings, folder / "tokenizer_config.json"))
    if special_map is not None:
        _write(scratch / "special_tokens_map.json", _clean_tokens(special_map, folder / "special_tokens_map.json"))
    if added is not None:
        for token, index in added.items():
            if type(index) is not int:
                raise _wrong(folder / "added_tokens.json", token, index, "an id")
        _write(scratch / "added_tokens.json", added)
    _copy_templates(scratch, folder)
    return _model_config(fields, settings or {})


def _model_config(fields: dict[str, str], settings: dict[str, Any]) -> PreTrainedConfig | None:
    """What decides the tokenizer's class, as an object of the base class; None where the model's own class decides.

    AutoTokenizer would make the model's own configuration object, whose import costs some 200 MiB and a second;
    with a `tokenizer_class` it asks that object for nothing but these fields.
    """
    model_type = fields.get("model_type")
    own_class = CONFIG_MAPPING_NAMES.get(model_type)
    shared = own_class is not None and list(CONFIG_MAPPING_NAMES.values()).count(own_class) > 1
    if not settings.get("tokenizer_class") or shared:  # a class of several types may change the type
        return None
    return PreTrainedConfig.from_dict(dict(fields))


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _read_text(path: Path, limit: int) -> str:
    if path.stat().st_size > limit:
        raise TokenizerError(f"{path} has {path.stat().st_size} bytes; the limit is {limit}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text: {error}") from error


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_read_text(path, MAX_FILE_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _copy_templates(scratch: Path, folder: Path) -> None:
    names = [TEMPLATE_FILE] if (folder / TEMPLATE_FILE).is_file() else []
    if (folder / TEMPLATE_FOLDER).is_dir():
        (scratch / TEMPLATE_FOLDER).mkdir()
        found = sorted(path for path in (folder / TEMPLATE_FOLDER).glob("*.jinja") if path.is_file())
        if len(found) > MAX_TEMPLATES:
            raise TokenizerError(
                f"{folder / TEMPLATE_FOLDER} has {len(found)} chat templates; the limit is {MAX_TEMPLATES}"
            )
        names += [f"{TEMPLATE_FOLDER}/{path.name}" for path in found]
    for name in names:
        (scratch / name).write_text(_read_text(folder / name, MAX_TEMPLATE_BYTES), encoding="utf-8", newline="")


# The fields --------------------------------------------------------------------------------------


def _check_class(config: dict[str, Any] | None, settings: dict[str, Any] | None, folder: Path) -> None:
    """Refuse a tokenizer class that is no tokenizer, and one that only the folder's own code defines."""
    known = False
    for fields, name in ((config, "config.json"), (settings, "tokenizer_config.json")):
        class_name = (fields or {}).get("tokenizer_class")
        if class_name is None:
            continue
        if not isinstance(class_name, str) or not CLASS_NAME.fullmatch(class_name):
            raise _wrong(folder / name, "tokenizer_class", class_name, "the name of a tokenizer class")
        found = getattr(transformers, class_name, None) or getattr(transformers, class_name.removesuffix("Fast"), None)
        if found is not None and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
            raise _wrong(folder / name, "tokenizer_class", class_name, "a tokenizer class that can be used here")
        known = found is not None
    auto_map = (settings or {}).get("auto_map")
    own_code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    model_type = (config or {}).get("model_type")
    if own_code and not known and model_type not in CONFIG_MAPPING_NAMES:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: auto_map asks for the repository's own tokenizer code, {own_code}, "
            f"which is never run. {_how_to_convert(folder)} and tokenizer_config.json"
        )


def _clean_settings(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json that we know, their types checked; the others have no effect on ids."""
    clean = _clean_tokens(settings, path)
    for key, value in settings.items():
        if key in SCALAR_FIELDS:
            if not (value is None or isinstance(value, bool | int | float)):
                raise _wrong(path, key, value, "a flag, a number or null")
            clean[key] = value
        elif key in WORD_FIELDS:
            if not (value is None or isinstance(value, str)):
                raise _wrong(path, key, value, "a string or null")
            clean[key] = value
    if "added_tokens_decoder" in settings:
        clean["added_tokens_decoder"] = _clean_added_tokens(settings["added_tokens_decoder"], path)
    if settings.get("chat_template") is not None:
        clean["chat_template"] = _clean_templates(settings["chat_template"], path)
    return clean


def _clean_tokens(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The special tokens among `fields`."""
    clean: dict[str, Any] = {}
    for key, value in fields.items():
        if key in TOKEN_LIST_FIELDS and value is not None:
            if isinstance(value, dict):
                clean[key] = {name: _token(token, f"{key}[{name!r}]", path) for name, token in value.items()}
            elif isinstance(value, list):
                clean[key] = [_token(token, f"{key}[{i}]", path) for i, token in enumerate(value)]
            else:
                raise _wrong(path, key, value, "a list or an object of tokens")
        elif value is not None and (key in TOKEN_FIELDS or (key.endswith("_token") and isinstance(value, str | dict))):
            clean[key] = _token(value, key, path)
    return clean


def _token(value: Any, field: str, path: Path) -> str | dict[str, Any]:
    """A token as text, or as an object with its text and how it matches."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise _wrong(path, field, value, "a token: text, or an object with 'content'")
    clean = {"content": value["content"], **{flag: value[flag] for flag in TOKEN_FLAGS if flag in value}}
    if any(not isinstance(clean.get(flag, True), bool) for flag in TOKEN_FLAGS):
        raise _wrong(path, field, value, f"a token whose {', '.join(TOKEN_FLAGS)} are true or false")
    if value.get("__type") == "AddedToken":
        clean["__type"] = "AddedToken"
    return clean


def _clean_added_tokens(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(re.fullmatch(r"[0-9]{1,9}", key) for key in value):
        raise _wrong(path, "added_tokens_decoder", value, "an object from ids to tokens")
    tokens = {key: _token(token, f"added_tokens_decoder[{key}]", path) for key, token in value.items()}
    for token in tokens.values():
        if isinstance(token, dict):
            token.pop("__type", None)
    return tokens


def _clean_templates(value: Any, path: Path) -> str | list[dict[str, str]]:
    """One template, or a list of named ones."""
    if isinstance(value, str):
        return value
    entries = [{"name": k, "template": v} for k, v in value.items()] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not all(
        isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        raise _wrong(path, "chat_template", value, "Jinja source, or a list of objects with 'name' and 'template'")
    return [{"name": entry["name"], "template": entry["template"]} for entry in entries]


def _wrong(path: Path, field: str, value: Any, expected: str) -> TokenizerError:
    return TokenizerError(f"{path}: {field} must be {expected}, not {repr(value)[:200]}")
