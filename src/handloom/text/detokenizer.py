"""Text of token ids that arrive one by one: never a broken character, and none later than certain.

The pieces, joined, are what decoding all the ids at once gives. No earlier token is decoded again: the tokenizer's own
decoder (`decoder` in tokenizer.json) is rebuilt as a chain of small stages (decoder_stages.py), each of which passes on
what no later token can change. So a token costs the same at position ten and at ten thousand.

What stays open longest is byte fallback (`<0x41>` pieces): a run of byte tokens is decided only where it ends, because
one bad byte turns every byte of the run into U+FFFD.

This module does not know stop strings, or where the ids come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy

from handloom.errors import InvalidPrompt
from handloom.text.decoder_stages import Stage, build_stages
from handloom.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one growing sequence of ids.

    `push` and `flush` give pieces whose concatenation is `tokenizer.decode(ids, skip_special_tokens=…)`. An id without
    a token (a hole in the vocabulary, or a row of the model's head beyond it) has no text, as in transformers. The
    constructor raises TokenizerError for a decoder that cannot be streamed.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._id_to_token: Callable[[int], str | None] = tokenizer.fast.backend_tokenizer.id_to_token
        self._skipped = tokenizer.special_tokens if skip_special_tokens else frozenset[str]()
        self._stages = build_stages(tokenizer.fast)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain: often the token's own, sometimes none."""
        if not 0 <= token_id < 2**32:
            raise InvalidPrompt(f"token id {token_id} is outside 0..{2**32 - 1}")
        token = self._id_to_token(token_id)
        if token is None or token in self._skipped:
            return ""
        pieces = [token]
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return "".join(pieces)

    def push_many(self, token_ids: Iterable[int]) -> str:
        """Add several tokens; return the text that is now certain."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """No more tokens come: return the rest of the text."""
        return _flush(self._stages)

    @property
    def pending(self) -> str:
        """What `flush` would return now, nothing changed: the text if the sequence ended here, which it may not.

        Empty for almost every token. Under byte fallback it is the open run of byte tokens, so `"\\n"` spelled
        `<0x0A>` is here one token before `push` can give it: match stop strings on it, but do not show it.
        """
        if not any(stage.is_open for stage in self._stages):
            return ""
        return _flush([copy(stage) for stage in self._stages])


def _flush(stages: list[Stage]) -> str:
    pieces: list[str] = []
    for stage in stages:
        pieces = [out for piece in pieces for out in stage.push(piece)]
        pieces += stage.flush()
    return "".join(pieces)
