"""The decoders of the `tokenizers` library as stages that stream.

A stage takes one piece and gives the pieces that are now certain; `flush` gives the rest. Before a `Fuse` (or a decoder
that joins) a piece is a token, and its borders and index count; after it a piece is just the next part of the text.
What each stage does was read from the library's Rust sources (0.23) and is held equal to them by fuzzing.

This module does not know token ids, special tokens or who reads the text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from handloom.errors import TokenizerError
from handloom.text.plain_tokenizer import PlainTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Fast: TypeAlias = "PreTrainedTokenizerFast | PlainTokenizer"

REPLACEMENT = "\ufffd"
MAX_PATTERN_CHARS = 64
# transformers' clean_up_tokenization, in order. As a chain of stages, of a run of spaces it may keep one back for each.
CLEAN_UP = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
# The WordPiece decoder's own, token by token, in order.
WORDPIECE_CLEAN_UP = (*CLEAN_UP[:7], (" do not", " don't"), *CLEAN_UP[7:])


class Stage(Protocol):
    """One step of decoding. Its attributes are values, so that a shallow copy is a stage of its own."""

    @property
    def is_open(self) -> bool:
        """Whether it keeps text back."""
        ...

    def push(self, piece: str) -> Sequence[str]:
        """Take the next piece; return the pieces that are now certain."""
        ...

    def flush(self) -> Sequence[str]:
        """No more pieces come: return the rest."""
        ...


def build_stages(fast: Fast) -> list[Stage]:
    """Fresh stages that together do what `fast.decode` does to the tokens it keeps. Raises TokenizerError."""
    _check_class(fast)
    stages: list[Stage] = []
    known = TOKEN_STAGES
    for spec in decoder_steps(fast):
        kind = spec["type"]
        if kind not in known:
            raise TokenizerError(f"the tokenizer's decoder has a {kind!r} in a place where it cannot be streamed")
        stages.append(known[kind](spec))
        known = STAGES_AFTER.get(kind, known)
    if cleans_up(fast):
        stages += [ReplaceText(old, new) for old, new in CLEAN_UP]
    return stages


def _check_class(fast: Fast) -> None:
    """Raises TokenizerError where a class decodes otherwise than the base class."""
    if isinstance(fast, PlainTokenizer):
        return
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if (
        type(fast)._decode is not PreTrainedTokenizerFast._decode
        or type(fast).clean_up_tokenization is not PreTrainedTokenizerBase.clean_up_tokenization
    ):
        raise TokenizerError(f"{type(fast).__name__} decodes in a way of its own, which cannot be streamed")


def cleans_up(fast: Fast) -> bool:
    """Whether `fast.decode` takes spaces out before punctuation. Later transformers leave BPE alone if not forced."""
    if not fast.clean_up_tokenization_spaces:
        return False
    forced = getattr(fast, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    return bool(forced) or type(fast.backend_tokenizer.model).__name__ != "BPE"


def decoder_steps(fast: Fast) -> list[dict[str, Any]]:
    """The specifications of the decoder's steps, nested sequences laid flat."""
    decoder = fast.backend_tokenizer.decoder
    if decoder is None:
        return [{"type": "None"}]
    flat: list[dict[str, Any]] = []
    todo = [json.loads(decoder.__getstate__())]
    while todo:
        spec = todo.pop()
        if spec["type"] == "Sequence":
            todo += reversed(spec["decoders"])
        else:
            flat.append(spec)
    return flat


# Stages on tokens --------------------------------------------------------------------------------


class MapToken:
    """A step that looks at one token and at whether it is the first."""

    is_open = False

    def __init__(self, change: Callable[[str, bool], str]) -> None:
        self._change = change
        self._first = True

    def push(self, piece: str) -> Sequence[str]:
        first, self._first = self._first, False
        return (self._change(piece, first),)

    def flush(self) -> Sequence[str]:
        return ()


def _join(spec: dict[str, Any]) -> Stage:
    return MapToken(lambda token, first: token if first else f" {token}")


def _replace_in_token(spec: dict[str, Any]) -> Stage:
    pattern, content = _pattern(spec)
    return MapToken(lambda token, first: token.replace(pattern, content))


def _strip_token(spec: dict[str, Any]) -> Stage:
    content, start, stop = spec["content"], spec["start"], spec["stop"]

    def strip(token: str, first: bool) -> str:
        left = min(start, len(token) - len(token.lstrip(content)))
        right = min(stop, len(token) - len(token.rstrip(content)))
        return token[left : len(token) - right]

    return MapToken(strip)


def _metaspace(spec: dict[str, Any]) -> Stage:
    mark, at_start = spec["replacement"], " " if spec["prepend_scheme"] == "never" else ""
    return MapToken(lambda token, first: token.replace(mark, at_start if first else " "))


def _wordpiece(spec: dict[str, Any]) -> Stage:
    prefix, replacements = spec["prefix"], WORDPIECE_CLEAN_UP if spec["cleanup"] else ()

    def join(token: str, first: bool) -> str:
        if not first:
            token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        for old, new in replacements:
            token = token.replace(old, new)
        return token

    return MapToken(join)


class ByteFallback:
    """`<0x41>` tokens become text where a whole run of them is UTF-8, else one U+FFFD for each."""

    BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2}|\+[0-9a-fA-F])>")

    def __init__(self, spec: dict[str, Any]) -> None:
        self._start_run()

    @property
    def is_open(self) -> bool:
        return self._length > 0 and self._text is not None

    def _start_run(self) -> None:
        self._text: str | None = ""  # None: this run is no UTF-8, whatever comes
        self._open = b""
        self._length = 0

    def push(self, piece: str) -> Sequence[str]:
        match = self.BYTE_TOKEN.fullmatch(piece)
        if match is None:
            return [*self.flush(), piece]
        self._length += 1
        if self._text is None:
            return [REPLACEMENT]
        try:
            text, self._open = decode_utf8(self._open + bytes([int(match[1], 16)]), "strict")
        except UnicodeDecodeError:
            self._text = None
            return [REPLACEMENT] * self._length
        self._text += text
        return ()

    def flush(self) -> Sequence[str]:
        text, is_cut, length = self._text, bool(self._open), self._length
        self._start_run()
        if text is None or length == 0:
            return ()
        return [REPLACEMENT] * length if is_cut else [text]


class WordSuffix:
    """`</w>` becomes a space, in the last token nothing. Gives parts of tokens, so only a `Fuse` may follow."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._suffix: str = spec["suffix"]
        if not self._suffix:
            raise TokenizerError("the tokenizer's decoder looks for an empty suffix, which cannot be streamed")
        self._held = ""

    @property
    def is_open(self) -> bool:
        return bool(self._held)

    def push(self, piece: str) -> Sequence[str]:
        before = self._held.replace(self._suffix, " ")
        at = piece.find(self._suffix)
        certain, self._held = (piece, "") if at < 0 else (piece[:at], piece[at:])
        return (before, certain)

    def flush(self) -> Sequence[str]:
        held, self._held = self._held, ""
        return (held.replace(self._suffix, ""),)


class ByteLevel:
    """Tokens spelled in GPT-2's alphabet of 256 printable characters; joined, their bytes are UTF-8."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._open = b""

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    def push(self, piece: str) -> Sequence[str]:
        text, self._open = decode_utf8(self._open + byte_level(piece), "replace")
        return (text,)

    def flush(self) -> Sequence[str]:
        rest, self._open = self._open, b""
        return (rest.decode("utf-8", "replace"),)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's `bytes_to_unicode`, reversed: printable Latin-1 stands for itself, the rest is moved up to 256…"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def byte_level(token: str) -> bytes:
    """The bytes that a token spells in that alphabet; an added token that is not written in it stands for itself."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


def decode_utf8(data: bytes, errors: str) -> tuple[str, bytes]:
    """The text of `data` but for an end that may still become a character, and that end (at most 3 bytes)."""
    text, used = codecs.utf_8_decode(data, errors, False)
    rest = data[used:]
    if rest[:1] == b"\xed" and rest[1:2] >= b"\xa0":  # a surrogate: Python waits for its third byte, in vain
        return text + rest.decode("utf-8", errors), b""
    return text, rest


# Stages on text ----------------------------------------------------------------------------------


class PassOn:
    """A piece is certain as it comes."""

    is_open = False

    def __init__(self, spec: dict[str, Any]) -> None:
        pass

    def push(self, piece: str) -> Sequence[str]:
        return (piece,)

    def flush(self) -> Sequence[str]:
        return ()


class ReplaceText:
    """`str.replace` on a text that is still coming: keeps back only what may begin the pattern."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content
        self._held = ""

    @property
    def is_open(self) -> bool:
        return bool(self._held)

    def push(self, piece: str) -> Sequence[str]:
        *done, rest = (self._held + piece).split(self._pattern)
        held = max(n for n in range(len(self._pattern)) if rest.endswith(self._pattern[:n]))
        cut = len(rest) - held
        self._held = rest[cut:]
        return (self._content.join([*done, rest[:cut]]),)

    def flush(self) -> Sequence[str]:
        held, self._held = self._held, ""
        return (held,)


class StripStart:
    """Takes up to `start` characters `content` off the beginning of the text."""

    is_open = False

    def __init__(self, spec: dict[str, Any]) -> None:
        if spec["stop"]:
            raise TokenizerError("the tokenizer's decoder strips the end of the text, which cannot be streamed")
        self._content: str = spec["content"]
        self._left: int = spec["start"]

    def push(self, piece: str) -> Sequence[str]:
        if self._left and piece:
            stripped = min(self._left, len(piece) - len(piece.lstrip(self._content)))
            self._left = self._left - stripped if stripped == len(piece) else 0
            piece = piece[stripped:]
        return (piece,)

    def flush(self) -> Sequence[str]:
        return ()


def _pattern(spec: dict[str, Any]) -> tuple[str, str]:
    pattern = spec["pattern"].get("String")
    if pattern is None or not 1 <= len(pattern) <= MAX_PATTERN_CHARS:
        raise TokenizerError(
            f"the tokenizer's decoder replaces {str(spec['pattern'])[:200]}, which cannot be streamed: "
            f"a string of 1 to {MAX_PATTERN_CHARS} characters is needed"
        )
    return pattern, spec["content"]


def _replace_in_text(spec: dict[str, Any]) -> Stage:
    return ReplaceText(*_pattern(spec))


TOKEN_STAGES: dict[str, Callable[[dict[str, Any]], Stage]] = {
    "None": _join,
    "Replace": _replace_in_token,
    "Strip": _strip_token,
    "Metaspace": _metaspace,
    "WordPiece": _wordpiece,
    "ByteFallback": ByteFallback,
    "BPEDecoder": WordSuffix,
    "ByteLevel": ByteLevel,
    "Fuse": PassOn,
}
TEXT_STAGES: dict[str, Callable[[dict[str, Any]], Stage]] = {
    "Fuse": PassOn,
    "Replace": _replace_in_text,
    "Strip": StripStart,
}
# What may follow a stage that does not give whole tokens.
STAGES_AFTER: dict[str, dict[str, Callable[[dict[str, Any]], Stage]]] = {
    "Fuse": TEXT_STAGES,
    "ByteLevel": TEXT_STAGES,
    "BPEDecoder": {"Fuse": PassOn},
}
