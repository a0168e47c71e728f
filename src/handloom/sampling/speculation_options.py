"""How a request asks for speculative decoding: who drafts, and at most how much. Checked together.

This module does not know how drafts are made or checked.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from handloom.errors import InvalidParam, UnsupportedOption
from handloom.sampling.options import Expected, Options, integer, real

MAX_DRAFT = 1024
NGRAM, NUM_TOKENS, THRESHOLD = 2, 20, 0.4  # what transformers takes where nothing is said
Schedule = Literal["constant", "heuristic", "heuristic_transient"]
_DRAFTERS = ("assistant_model", "prompt_lookup_num_tokens", "speculation")
# option -> the drafters it is about, and the value that asks for nothing
_NEEDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "max_matching_ngram_size": (("prompt_lookup_num_tokens",), NGRAM),
    "num_assistant_tokens": (("assistant_model", "speculation"), NUM_TOKENS),
    "num_assistant_tokens_schedule": (("assistant_model",), "constant"),
    "assistant_confidence_threshold": (("assistant_model",), THRESHOLD),
}
# What decodes in another way than one token after another for one output, and the value that does not.
_OTHER_WAYS = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "custom_decoder": None,
}


class Speculation(TypedDict):
    """See `GenerationParams`."""

    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int
    speculation: Literal["suffix"] | None
    assistant_model: Any
    num_assistant_tokens: int
    num_assistant_tokens_schedule: Schedule
    assistant_confidence_threshold: float


def read_speculation(asked: Options, *, torch_draws: bool) -> Speculation:
    """The options. torch_draws: whether torch's generator draws the tokens.

    Raises InvalidParam where they contradict each other, UnsupportedOption beside what speculation does not go with.
    """
    length = integer(1, MAX_DRAFT)
    found = Speculation(
        prompt_lookup_num_tokens=asked.read("prompt_lookup_num_tokens", length, default=None, off=None),
        max_matching_ngram_size=asked.read("max_matching_ngram_size", length, default=NGRAM, off=NGRAM),
        speculation=asked.read("speculation", _suffix, default=None, off=None),
        assistant_model=asked.given("assistant_model"),
        num_assistant_tokens=asked.read("num_assistant_tokens", length, default=NUM_TOKENS, off=NUM_TOKENS),
        num_assistant_tokens_schedule=asked.read(
            "num_assistant_tokens_schedule", _schedule, default="constant", off="constant"
        ),
        assistant_confidence_threshold=asked.read(
            "assistant_confidence_threshold", real(0, 1), default=THRESHOLD, off=0.0
        ),
    )
    drafters = [name for name in _DRAFTERS if asked.given(name) is not None]
    if len(drafters) > 1:
        raise InvalidParam(f"{' and '.join(drafters)}: each is a way to draft tokens, and one is enough")
    for name, (needed, neutral) in _NEEDS.items():
        value = asked.given(name)
        if asked.by_caller(name) and value not in (None, neutral) and not {*needed} & {*drafters}:
            raise InvalidParam(f"{name}={value!r} is about speculative decoding; give {' or '.join(needed)} too")
    if drafters:
        _check_beside(asked, drafters[0], torch_draws=torch_draws)
    return found


def _check_beside(asked: Options, drafter: str, *, torch_draws: bool) -> None:
    """Raises UnsupportedOption for what speculation does not go with."""
    for name, neutral in _OTHER_WAYS.items():
        value = asked.given(name)
        if value not in (None, neutral):
            raise UnsupportedOption(
                f"{drafter} beside {name}={value!r}: tokens are drafted where one sequence makes one output; leave one "
                "of the two out"
            )
    if torch_draws:
        raise UnsupportedOption(
            f"{drafter} beside rng='torch': how many numbers that generator gives would depend on the drafts; with "
            "rng='counter' the tokens are those without speculation"
        )


def _suffix(value: Any) -> Literal["suffix"]:
    if value != "suffix":
        raise Expected("'suffix'")
    return "suffix"


def _schedule(value: Any) -> Schedule:
    for known in ("constant", "heuristic", "heuristic_transient"):
        if value == known:
            return known
    raise Expected("'constant', 'heuristic' or 'heuristic_transient'")
