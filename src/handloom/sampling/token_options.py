"""The options that name tokens, each read and held against the others.

This module does not know what a rule does with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from handloom.errors import InvalidParam
from handloom.sampling.options import MODEL, Options, integer, is_integer, show
from handloom.sampling.token_lists import MAX_LISTED_IDS, start_and_factor, token_biases, token_sequences

Ids = TypeVar("Ids", int | None, tuple[int, ...])


def read_tokens(asked: Options, vocab_size: int, eos: tuple[int, ...]) -> dict[str, Any]:
    """All options that name tokens but the end-of-sequence ones, `eos`, under the names of `GenerationParams`."""
    suppressed = read_token_ids(asked, "suppress_tokens", vocab_size)
    first = asked.read("forced_bos_token_id", integer(0, vocab_size - 1), default=None, off=None)
    last = read_token_ids(asked, "forced_eos_token_id", vocab_size)
    return {
        "sequence_bias": asked.read("sequence_bias", token_biases(vocab_size), default=(), off=()),
        "bad_words_ids": read_bad_words(asked, vocab_size, eos),
        "forced_bos_token_id": check_forced("forced_bos_token_id", first, suppressed),
        "forced_eos_token_id": check_forced("forced_eos_token_id", last, suppressed),
        "exponential_decay_length_penalty": read_decay(asked, eos),
        "suppress_tokens": suppressed,
        "begin_suppress_tokens": read_token_ids(asked, "begin_suppress_tokens", vocab_size),
    }


def read_token_ids(
    asked: Options, name: str, vocab_size: int, last_resort: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    """A token id or a list of them, each once; those of a model's file that are not in the vocabulary are left out."""
    value, source = asked.find(name) or (last_resort, MODEL)
    ids = [value] if is_integer(value) else [] if value is None else value
    if not isinstance(ids, list | tuple) or any(not is_integer(id_) for id_ in ids):
        raise InvalidParam(f"{name}={show(value)} ({source}) must be a token id or a list of them")
    if len(ids) > MAX_LISTED_IDS:
        raise InvalidParam(f"{name} ({source}) has {len(ids)} token ids; the limit is {MAX_LISTED_IDS}")
    if source != MODEL and any(not 0 <= id_ < vocab_size for id_ in ids):
        raise InvalidParam(
            f"{name}={show(value)} ({source}): ids must be in [0, {vocab_size}), the vocabulary; None: no id"
        )
    return tuple(dict.fromkeys(int(id_) for id_ in ids if 0 <= id_ < vocab_size))


def read_bad_words(asked: Options, vocab_size: int, eos: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """bad_words_ids without an end-of-sequence token that stands alone. Raises InvalidParam where nothing is left."""
    listed = asked.read("bad_words_ids", token_sequences(vocab_size), default=(), off=())
    banned = tuple(sequence for sequence in listed if len(sequence) > 1 or sequence[0] not in eos)
    if listed and not banned:
        raise InvalidParam(
            f"bad_words_ids={show(listed)} names only end-of-sequence tokens, which it never bans; to put the end off, "
            "give min_new_tokens or suppress_tokens"
        )
    return banned


def check_forced(name: str, forced: Ids, suppressed: tuple[int, ...]) -> Ids:
    """The forced tokens. Raises InvalidParam where suppress_tokens has all of them."""
    ids = (forced,) if isinstance(forced, int) else forced or ()
    if ids and set(ids) <= set(suppressed):
        raise InvalidParam(f"{name}={show(forced)}: suppress_tokens has it too, so nothing is left where it is forced")
    return forced


def read_decay(asked: Options, eos: tuple[int, ...]) -> tuple[int, float] | None:
    """exponential_decay_length_penalty. Raises InvalidParam without an end-of-sequence token."""
    penalty = asked.read("exponential_decay_length_penalty", start_and_factor, default=None, off=None)
    if penalty is not None and not eos:
        raise InvalidParam("exponential_decay_length_penalty raises the end-of-sequence token: give an eos_token_id")
    return penalty
