"""The options of decoding by contrast, checked: guidance.

This module does not know how any of it decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from torch import Tensor

from handloom.errors import ContextOverflow, InvalidParam, UnsupportedOption
from handloom.sampling.options import LARGEST_FACTOR, Expected, Options, is_integer, real


class Contrast(TypedDict):
    """See `GenerationParams`."""

    guidance_scale: float
    negative_prompt_ids: tuple[int, ...]


def read_contrast(asked: Options, *, vocab_size: int, room: int) -> Contrast:
    """The options. room: tokens that a prompt may have.

    Raises InvalidParam, UnsupportedOption, ContextOverflow where they, or others beside them, do not go together.
    """
    scale = asked.read("guidance_scale", real(-LARGEST_FACTOR, LARGEST_FACTOR), default=1.0, off=1.0)
    negative = asked.read("negative_prompt_ids", token_ids(vocab_size), default=(), off=())
    if negative and not said(asked, "guidance_scale"):
        raise InvalidParam("a negative prompt is what guidance leads away from; give guidance_scale too")
    if len(negative) > room:
        raise ContextOverflow(
            f"the negative prompt has {len(negative)} tokens, and beside the new ones there is room for {room}; "
            "shorten it, or ask for fewer max_new_tokens"
        )
    if scale != 1.0 and said(asked, "prompt_logprobs"):
        raise UnsupportedOption(
            f"prompt_logprobs beside guidance_scale={scale:g}: ask for them in a request of their own, or use "
            "`lm.score`"
        )
    return Contrast(guidance_scale=scale, negative_prompt_ids=negative)


def said(asked: Options, name: str) -> bool:
    """Whether anybody gave the option a value."""
    return (asked.find(name) or (None, ""))[0] is not None


def token_ids(vocab_size: int) -> Callable[[Any], tuple[int, ...]]:
    """A list or tensor of ids [n], n > 0."""

    def check(value: Any) -> tuple[int, ...]:
        if isinstance(value, Tensor) and value.dim() == 1:
            value = value.tolist()
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) and len(value) > 0
        if not is_list or not all(is_integer(id_) and 0 <= id_ < vocab_size for id_ in value):
            raise Expected(f"one or more token ids from 0 to {vocab_size - 1}, one prompt's, without padding")
        return tuple(int(id_) for id_ in value)

    return check
