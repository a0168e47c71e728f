"""A fast tokenizer from GGUF metadata, giving the ids that llama.cpp's own tokenizer gives.

Two kinds exist (`tokenizer.ggml.model`):
- `gpt2`: byte-level BPE with merges from the file. `tokenizer.ggml.pre` says how text is cut into words first; a
  cut that we do not know is refused by name, since a wrong one gives wrong ids that only look right.
- `llama`: SentencePiece BPE, which has scores instead of merges. Any two neighbouring pieces may be joined if their
  union is a piece, best score first; so the merges are all cuts of all pieces, in the order of the pieces' scores.

Control tokens are never the result of a merge, as in SentencePiece: typed text cannot become one unless special tokens
are asked for. Facts are from llama.cpp (`src/llama-vocab.cpp`), whose recorded ids are the test. A tokenizer.json on
the Hub may differ: Qwen2's also normalises text to NFC, which GGUF has no way to say and llama.cpp does not do.

This module does not know files, models, or what a chat template does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from handloom.errors import TokenizerError
from handloom.text.plain_tokenizer import PlainTokenizer
from handloom.text.typed_errors import typed_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_CHAT_TEMPLATE_CHARS = 2**20
MAX_PIECE_CHARS = 2**8
"""Longest piece of a SentencePiece vocabulary."""
MAX_CUTS = 2**24
"""Most characters in all its pieces together, which bounds the time that looking for merges takes."""
MAX_ADDED_CHARS = 2**20
"""Most characters in all control tokens together, or all user-defined ones: an automaton is built to find them."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"
_NEVER_IN_UTF8 = frozenset(map(chr, (0xC0, 0xC1, *range(0xF5, 0x100))))
"""Bytes, as the byte-level alphabet spells them."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """What a value of `tokenizer.ggml.pre` means.

    Attributes:
        cuts: regular expressions; each isolates its matches in every piece left by the one before.
        ignore_merges: a word that is a token is that token, whatever the merges say.
        add_bos: what `add_bos_token` is where the file does not say.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_PRES = {
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Pre((_GPT2,)),
    "smollm": _Pre((r"\p{N}", _GPT2)),
    "starcoder": _Pre((r"\p{N}", _GPT2)),
    "llama-bpe": _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama3": _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama-v3": _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": _Pre((_LLAMA3.replace("{1,3}", ""),)),
    "deepseek-r1-qwen": _Pre((_LLAMA3.replace("{1,3}", ""),)),
}


def build(metadata: Mapping[str, Any], where: str) -> PlainTokenizer:
    """The tokenizer that GGUF metadata describes, with its special tokens and its chat template.

    Args:
        metadata: GGUF keys and values; arrays are lists.
        where: names the file in messages.

    Raises:
        TokenizerError: an unknown `tokenizer.ggml.model` or `.pre`, or a vocabulary that is damaged.
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise vocabulary.error("model", f"is {kind!r:.80}; known are gpt2 and llama")
    with typed_errors(TokenizerError, f"{where}: the metadata make no tokenizer"):
        backend, add_bos = (_byte_level if kind == "gpt2" else _sentencepiece)(vocabulary)
        add_bos, add_eos = vocabulary.flag("add_bos_token", add_bos), vocabulary.flag("add_eos_token", False)
        named = {
            "bos_token": vocabulary.special("bos_token_id", needed=add_bos),
            "eos_token": vocabulary.special("eos_token_id", needed=add_eos),
            "unk_token": vocabulary.special("unknown_token_id"),
            "pad_token": vocabulary.special("padding_token_id"),
        }
        special = {name: token for name, token in named.items() if token is not None}
        backend.add_special_tokens(vocabulary.added(_CONTROL, _UNKNOWN, special=True))
        backend.add_tokens(vocabulary.added(_USER_DEFINED, special=False))
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([AddedToken(token, special=True) for token in special.values() if token not in known])
        backend.post_processor = _around(backend, add_bos and special["bos_token"], add_eos and special["eos_token"])
    template = _chat_template(metadata, where)

    def in_transformers() -> PreTrainedTokenizerFast:
        return _wrap(backend, add_bos_token=add_bos, add_eos_token=add_eos, **special)

    return PlainTokenizer(backend, special, template, in_transformers)


def _around(backend: Tokenizer, bos: str | Literal[False], eos: str | Literal[False]) -> TemplateProcessing:
    """What puts bos and eos around a text."""
    tokens = [token for token in (bos, eos) if token]
    template = " ".join([*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])])
    return TemplateProcessing(single=template, special_tokens=[(token, backend.token_to_id(token)) for token in tokens])


def _wrap(backend: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    """`PreTrainedTokenizerFast(tokenizer_object=backend)` without its copy, which goes through JSON: 2 s for Gemma.

    Like transformers' own tokenizer classes, this sets the backend before the constructor looks for it.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    tokenizer._tokenizer = backend
    tokenizer.__init__(clean_up_tokenization_spaces=False, **kwargs)
    return tokenizer


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE (Radford et al. 2019), and whether bos is added where the file does not say."""
    name = vocabulary.get("pre")
    if not isinstance(name, str) or name not in _PRES:
        raise vocabulary.error("pre", f"is {name!r:.80}; known are {', '.join(sorted(_PRES))}")
    if vocabulary.flag("add_space_prefix", False):
        raise vocabulary.error("add_space_prefix", "is true, which is only supported in a SentencePiece vocabulary")
    pre, merges = _PRES[name], []
    for rank, merge in enumerate(vocabulary.strings("merges")):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
            raise vocabulary.error("merges", f"number {rank}, {merge!r:.80}, does not join two tokens to a third")
        merges.append((left, right))
    backend = Tokenizer(BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    # A byte without a token disappears; kept apart, it does not let its neighbours merge across it.
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.ids.keys() - _NEVER_IN_UTF8:
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, sorted(missing)))), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE (Kudo and Richardson 2018) with byte fallback; bos is added where the file does not say."""
    if vocabulary.get("pre") not in (None, "default"):
        raise vocabulary.error(
            "pre", f"is {vocabulary.get('pre')!r:.80}; a SentencePiece vocabulary knows only 'default'"
        )
    backend = Tokenizer(
        BPE(
            vocab=vocabulary.ids,
            merges=_merges_by_score(vocabulary),
            unk_token=vocabulary.special("unknown_token_id"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    if vocabulary.flag("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), backend.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every cut of every piece into two pieces, best score first. 0.9 s for Gemma's 262k pieces, 515k merges."""
    scores = vocabulary.numbers("scores", np.floating)
    if np.isnan(scores).any():
        raise vocabulary.error("scores", "has a score that is not a number")
    mergeable = ~np.isin(vocabulary.types, (_UNKNOWN, _CONTROL, _BYTE))
    pieces = {vocabulary.tokens[index] for index in np.flatnonzero(mergeable).tolist()}
    if max(map(len, pieces), default=0) > MAX_PIECE_CHARS or sum(map(len, pieces)) > MAX_CUTS:
        raise vocabulary.error("tokens", f"exceeds {MAX_PIECE_CHARS} characters in a token, or {MAX_CUTS} in all")
    best_first = np.argsort(-scores, kind="stable")
    return [
        (left, right)
        for piece in map(vocabulary.tokens.__getitem__, best_first[mergeable[best_first]].tolist())
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in pieces and (right := piece[cut:]) in pieces
    ]


def _chat_template(metadata: Mapping[str, Any], where: str) -> str | dict[str, str] | None:
    """The template, or templates by name where the file has more than the default one."""
    prefix = "tokenizer.chat_template"
    found = {
        key[len(prefix) + 1 :] or "default": value
        for key, value in metadata.items()
        if f"{key}.".startswith(prefix + ".")
    }
    for name, source in found.items():
        if not isinstance(source, str) or len(source) > MAX_CHAT_TEMPLATE_CHARS:
            raise TokenizerError(
                f"{where}: the chat template {name!r:.80} must be text of at most {MAX_CHAT_TEMPLATE_CHARS} characters"
            )
    return found["default"] if found.keys() == {"default"} else found or None


class _Vocabulary:
    """The `tokenizer.ggml.*` keys, checked as they are asked for."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.tokens = self.strings("tokens")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.error("tokens", f"has {twice!r:.80} twice")
        self.types = np.full(len(self.tokens), _NORMAL)
        if self.get("token_type") is not None:
            self.types = self.numbers("token_type", np.integer)

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def error(self, key: str, message: str) -> TokenizerError:
        return TokenizerError(f"{self.where}: metadata key 'tokenizer.ggml.{key}' {message}")

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"is {value!r:.40}; expected a list of strings")
        return value

    def numbers(self, key: str, kind: type[Any]) -> NDArray[Any]:
        """One number per token."""
        value = self.get(key)
        numbers = np.array(value) if isinstance(value, list) else np.empty(0)
        if len(numbers) != len(self.tokens) or not np.issubdtype(numbers.dtype, kind):
            raise self.error(key, f"must be {len(self.tokens)} numbers of a {kind.__name__} type, one per token")
        return numbers

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self.error(key, f"is {value!r:.40}; expected true or false")
        return default if value is None else value

    def special(self, key: str, *, needed: bool = False) -> str | None:
        """The token that a `*_token_id` key names."""
        index = self.get(key)
        if index is None and not needed:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            raise self.error(key, f"is {index!r:.40}; expected an id from 0 to {len(self.tokens) - 1}")
        return self.tokens[index]

    def added(self, *types: int, special: bool) -> list[AddedToken]:
        """Tokens that are found in the text before anything else happens to it."""
        tokens = [self.tokens[index] for index in np.flatnonzero(np.isin(self.types, types)).tolist()]
        if sum(map(len, tokens)) > MAX_ADDED_CHARS:
            raise self.error(
                "token_type", f"makes more than {MAX_ADDED_CHARS} characters of control or user-defined tokens"
            )
        return [AddedToken(token, special=special, normalized=False) for token in tokens if token]
