"""How many outputs one prompt has, and how many beams look for them: checked together.

This module does not know how a search goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from handloom.errors import InvalidParam, UnsupportedOption
from handloom.sampling.options import Expected, Options, integer, real

MAX_SEQUENCES = 1024  # outputs or beams of one prompt
LARGEST_PENALTY = 50.0  # a length to this power stays a float
EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class Search:
    """See `GenerationParams`."""

    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping


def read_search(asked: Options, *, do_sample: bool, num_eos: int, vocab_size: int) -> Search:
    """The four options. Raises InvalidParam, UnsupportedOption where they, or others beside them, contradict."""
    count = integer(1, MAX_SEQUENCES)
    search = Search(
        asked.read("num_return_sequences", count, default=1, off=1),
        asked.read("num_beams", count, default=1, off=1),
        asked.read("length_penalty", real(-LARGEST_PENALTY, LARGEST_PENALTY), default=1.0, off=1.0),
        asked.read("early_stopping", _early_stopping, default=False, off=False),
    )
    outputs, beams = search.num_return_sequences, search.num_beams
    if beams == 1:
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if asked.by_caller(name) and getattr(search, name) != neutral:
                raise InvalidParam(f"{name}={getattr(search, name)!r} is about beam search; give num_beams too")
        if outputs > 1 and not do_sample:
            raise InvalidParam(
                f"num_return_sequences={outputs}: the most likely tokens are the same each time; sample, or give "
                "num_beams"
            )
    else:
        if outputs > beams:
            raise InvalidParam(f"num_return_sequences={outputs} is more than num_beams={beams}; raise num_beams")
        if max(2, num_eos + 1) > vocab_size:
            raise InvalidParam(f"num_beams={beams}: a vocabulary of {vocab_size} has too few tokens that go on")
    if max(outputs, beams) > 1 and (asked.find("prompt_logprobs") or (None, ""))[0] is not None:
        raise UnsupportedOption(
            "prompt_logprobs beside num_return_sequences or num_beams: ask for them in a request of their own, or use "
            "`lm.score`"
        )
    penalty, _ = asked.find("encoder_repetition_penalty") or (None, "")
    if max(outputs, beams) > 1 and penalty not in (None, 1.0):
        raise UnsupportedOption(
            f"encoder_repetition_penalty={penalty!r} beside num_return_sequences or num_beams: transformers applies it "
            "to one of them only; use repetition_penalty, or several requests"
        )
    return search


def _early_stopping(value: Any) -> EarlyStopping:
    if isinstance(value, bool):
        return value
    if value == "never":
        return "never"
    raise Expected("True, False or 'never'")
