"""How many tokens a request may and must have: its length options, checked together.

This module does not know when a request ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from handloom.errors import ContextOverflow, InvalidParam
from handloom.sampling.callers_options import longest_by_criteria
from handloom.sampling.options import Options, integer, show

DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """Those of one request, under the names of `GenerationParams`."""

    max_new_tokens: int
    max_length: int | None
    min_new_tokens: int
    min_length: int


def read_lengths(asked: Options, prompt_length: int, max_context: int) -> Lengths:
    """What the options say, checked together. Raises ContextOverflow, InvalidParam."""
    longest, counts_prompt = _longest(asked, prompt_length, max_context)
    min_new = asked.read("min_new_tokens", integer(0), default=None, off=None)
    min_total = asked.read("min_length", integer(0), default=0, off=0)
    name = "min_length" if min_new is None else "min_new_tokens"
    if min_new is not None:
        min_total = prompt_length + min_new
    if min_total > longest and asked.by_caller(name):
        raise InvalidParam(
            f"{name} asks for {show(min_total)} tokens with the prompt, and at most {longest} can come; lower it, or "
            f"raise max_new_tokens={longest - prompt_length}"
        )
    return Lengths(longest - prompt_length, longest if counts_prompt else None, min_new or 0, min_total)


def _longest(asked: Options, prompt_length: int, max_context: int) -> tuple[int, bool]:
    """(the most tokens with the prompt, whether it was said like that, and not as a number of new ones)."""
    room = max_context - prompt_length
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {prompt_length} tokens and the context holds {max_context}: no token can be generated; "
            "shorten the prompt, or load the model with a larger context"
        )
    name, new_tokens = "max_new_tokens", asked.read("max_new_tokens", integer(1), default=None, off=None)
    total = asked.read("max_length", integer(1), default=None, off=None)
    if new_tokens is None and total is not None:
        name, new_tokens = "max_length", total - prompt_length
        if new_tokens < 1:
            raise InvalidParam(
                f"max_length={show(total)} counts the prompt, which has {prompt_length} tokens: no token is left to "
                "generate; raise it, or give max_new_tokens"
            )
    if new_tokens is None:
        new_tokens = min(DEFAULT_NEW_TOKENS, room)
    elif new_tokens > room and asked.by_caller(name):
        raise ContextOverflow(
            f"{prompt_length} prompt tokens and {show(new_tokens)} new ones exceed the context of {max_context}; "
            f"max_new_tokens can be at most {room} for this prompt"
        )
    by_options = prompt_length + min(new_tokens, room)
    total = longest_by_criteria(asked, by_options)
    if total > max_context:
        raise ContextOverflow(
            f"stopping_criteria: a MaxLengthCriteria allows {total} tokens and the context holds {max_context}; lower "
            "it, or load the model with a larger max_context"
        )
    return total, name == "max_length" or total > by_options
