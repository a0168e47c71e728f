"""How many tokens a request may and must have: its length options, checked together.

This module does not know when a request ends.
"""

from __future__ import annotations

from handloom.errors import ContextOverflow, InvalidParam
from handloom.sampling.criteria_options import longest_by_criteria
from handloom.sampling.options import Options, integer, show

DEFAULT_NEW_TOKENS = 20


def read_lengths(asked: Options, prompt_length: int, max_context: int) -> tuple[int, int, int]:
    """(max_new_tokens, min_new_tokens, min_length). Raises ContextOverflow, InvalidParam."""
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
    total = longest_by_criteria(asked, prompt_length + min(new_tokens, room))
    if total > max_context:
        raise ContextOverflow(
            f"stopping_criteria: a MaxLengthCriteria allows {total} tokens and the context holds {max_context}; lower "
            "it, or load the model with a larger max_context"
        )
    new_tokens = total - prompt_length
    min_new = asked.read("min_new_tokens", integer(0), default=None, off=None)
    min_total = asked.read("min_length", integer(0), default=0, off=0)
    name = "min_length" if min_new is None else "min_new_tokens"
    if min_new is not None:
        min_total = prompt_length + min_new
    if min_total > prompt_length + new_tokens and asked.by_caller(name):
        raise InvalidParam(
            f"{name} asks for {show(min_total)} tokens with the prompt, and at most {prompt_length + new_tokens} "
            f"can come; lower it, or raise max_new_tokens={new_tokens}"
        )
    return new_tokens, min_new or 0, min_total
