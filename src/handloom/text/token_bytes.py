"""The bytes that each token stands for, where that is the same wherever it stands.

It is so for byte-level vocabularies and for SentencePiece's, which are those of nearly all language models. The space
that some decoders take off the beginning of a text counts as a byte here.

This module does not know models, grammars, or how text is cut into tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handloom.errors import TokenizerError
from handloom.text.decoder_stages import ByteFallback, byte_level, cleans_up, decoder_steps

if TYPE_CHECKING:
    from handloom.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """`values[i]`: the bytes of token i, empty where the id has no token; `special`: ids of tokens that are no text,
    whose value is how they are written."""

    values: list[bytes]
    special: frozenset[int]


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> TokenBytes:
    """Of ids 0..vocab_size - 1. Raises TokenizerError for a decoder that joins tokens by what stands beside them."""
    fast = tokenizer.fast
    if cleans_up(fast):
        raise TokenizerError(
            "this tokenizer takes spaces out before punctuation when it decodes (clean_up_tokenization_spaces), so "
            "tokens have no bytes of their own; set lm.tokenizer.hf.clean_up_tokenization_spaces = False"
        )
    read = _reader([step["type"] for step in decoder_steps(fast)], decoder_steps(fast))
    values = [b""] * vocab_size
    for token, token_id in fast.get_vocab().items():
        if token_id < vocab_size:
            values[token_id] = read(token)
    added = fast.added_tokens_decoder
    return TokenBytes(values, frozenset(id_ for id_, token in added.items() if token.special and id_ < vocab_size))


def _reader(kinds: list[str], steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    """What gives a token's bytes."""
    names = " ".join(kinds)
    if re.fullmatch(r"ByteLevel( Fuse)?", names):
        return byte_level
    if re.fullmatch(r"(Replace )*ByteFallback( Fuse)?( Strip)?|Metaspace", names):
        replaced = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
        replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
        if all(isinstance(pattern, str) for pattern, _ in replaced):
            return lambda token: _with_fallback(token, replaced)
    raise TokenizerError(
        f"the tokens of this tokenizer have no bytes of their own: its decoder ({', '.join(kinds)}) joins them by what "
        "stands beside them; a byte-level or SentencePiece vocabulary is needed"
    )


def _with_fallback(token: str, replaced: list[tuple[str, str]]) -> bytes:
    for pattern, content in replaced:
        token = token.replace(pattern, content)
    byte = ByteFallback.BYTE_TOKEN.fullmatch(token)
    return token.encode() if byte is None else bytes([int(byte[1], 16)])


class Extensions:
    """Which tokens begin with given bytes; special tokens never do."""

    def __init__(self, tokens: TokenBytes) -> None:
        texts = ((value, id_) for id_, value in enumerate(tokens.values) if value and id_ not in tokens.special)
        self._sorted = sorted(texts)
        self._of = tokens

    def of(self, text: bytes) -> list[int]:
        """Ids of the tokens that begin with `text` and go on, if at all, with whole characters."""
        found = []
        for value, token_id in self._sorted[bisect_left(self._sorted, (text, -1)) :]:
            if not value.startswith(text):
                break
            if _is_utf8(value[len(text) :]):
                found.append(token_id)
        return found

    def are_text(self, token_ids: Sequence[int]) -> bool:
        """Whether each of these has bytes, and is not special."""
        size = len(self._of.values)
        return all(id_ < size and self._of.values[id_] and id_ not in self._of.special for id_ in token_ids)

    def text_of(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of tokens, one after the other."""
        return b"".join(self._of.values[id_] for id_ in token_ids if id_ < len(self._of.values))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
