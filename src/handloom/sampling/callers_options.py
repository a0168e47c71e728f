"""The caller's processors and stopping criteria, held against the options that they stand for.

A processor is called for one output at a time, where transformers calls it for all at once: of its classes that keep
what came before, one object cannot serve several outputs here.

In transformers a criterion of a class that it builds for an option takes that option's place. Where that would differ
from the two together it is refused here, and a length that only a criterion says is the request's.

This module does not know when a request ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from handloom.errors import InvalidParam, UnsupportedOption
from handloom.sampling.options import Options, callables, is_integer, show

StoppingCriterion = Callable[..., Any]
# class -> the option that does the same
_REMEMBERING = {
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
}
# option -> (the value that asks for nothing, whether it counts in a model's file)
_GO_BY_THE_LENGTH: dict[str, tuple[Any, bool]] = {
    "max_new_tokens": (None, False),
    "max_length": (None, False),
    "forced_eos_token_id": (None, True),
    "num_beams": (1, True),
}


def of_transformers(callables: Iterable[Any], name: str) -> list[Any]:
    """Those that are transformers' class of that very name."""
    kinds = [(type(each), each) for each in callables]
    return [each for kind, each in kinds if kind.__name__ == name and kind.__module__.startswith("transformers.")]


def refuse_remembering(processors: Any) -> None:
    """For processors that several outputs share: raises UnsupportedOption for one that remembers its output."""
    for name, option in _REMEMBERING.items():
        if isinstance(processors, list | tuple) and of_transformers(processors, name):
            raise UnsupportedOption(
                f"logits_processor: a {name} keeps what came before, and called for one output after another it would "
                f"mix up several of them; give {option} instead, or one output at a time"
            )


def longest_by_criteria(asked: Options, limit: int) -> int:
    """`limit`, the most tokens by the options, or more where the caller's MaxLengthCriteria alone says a length.

    Raises InvalidParam where the options of the caller say a shorter one, or others go by it.
    """
    criteria = asked.read("stopping_criteria", callables, default=(), off=())
    lengths = [each.max_length for each in of_transformers(criteria, "MaxLengthCriteria")]
    if not all(map(is_integer, lengths)):
        raise InvalidParam(f"stopping_criteria: the max_length of a MaxLengthCriteria is {show(lengths)}, no integer")
    total = min(lengths, default=limit)
    if total <= limit:
        return limit
    for name, (neutral, in_a_file) in _GO_BY_THE_LENGTH.items():
        value = asked.given(name)
        if value not in (None, neutral) and (in_a_file or asked.by_caller(name)):
            way_out = f"give max_length={total} instead of the criterion"
            raise InvalidParam(_instead("MaxLengthCriteria", f"the length beside {name}={show(value)}", way_out))
    return int(total)


def read_criteria(asked: Options, eos: tuple[int, ...]) -> tuple[StoppingCriterion, ...]:
    """The criteria. Raises InvalidParam where one would take the place of an option that says something else."""
    criteria = asked.read("stopping_criteria", callables, default=(), off=())
    for name, option in (("MaxTimeCriteria", "max_time"), ("StopStringCriteria", "stop_strings")):
        if of_transformers(criteria, name) and asked.given(option) is not None:
            raise InvalidParam(_instead(name, f"{option}={show(asked.given(option))}", "give one of the two"))
    own = of_transformers(criteria, "EosTokenCriteria")
    if own and eos and {*own[0].eos_token_id.tolist()} != {*eos}:
        ids = sorted({*own[0].eos_token_id.tolist()})
        raise InvalidParam(_instead("EosTokenCriteria", f"eos_token_id={show([*eos])}", f"give eos_token_id={ids}"))
    return criteria


def _instead(name: str, option: str, way_out: str) -> str:
    return f"stopping_criteria: in transformers a {name} takes the place of {option}; {way_out}"
