"""Who said what: the options of a request from its three places, and the checks each value must pass.

The places, the strongest first: the caller's options, a `generation_config` passed among them, the model's
generation_config.json. Names are checked here: one that nobody knows, and one of transformers' that
handloom does not have and that would have an effect, is an error wherever it stands.

This module does not know what an option means.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from handloom.errors import InvalidParam, UnsupportedOption
from handloom.sampling.surface import ELSEWHERE, NO_EFFECT, OF_LM, WHY_NOT

T = TypeVar("T")
D = TypeVar("D")

CALLER, PASSED, MODEL = "from the caller", "in the generation_config passed", "in the model's generation_config.json"
LARGEST_FACTOR = 1e30  # a score times or divided by a factor in [1e-30, 1e30] stays a float32

# Options that transformers' GenerationConfig does not have.
OURS = frozenset(
    "include_stop_text seed rng logprobs prompt_logprobs logits_processor stopping_criteria prefix_allowed_tokens_fn "
    "negative_prompt_ids skip_special_tokens output_past_key_values custom_decoder "
    "json_schema regex grammar choices assistant_model speculation".split()
)
# Any value is fine: nothing is padded, and an output always is a full object.
BOOKKEEPING = frozenset({*NO_EFFECT, "_from_model_config", "_commit_hash"})
# These choose how transformers computes or speculates, never which tokens come out: in a file they ask nothing of us.
NO_EFFECT_IN_A_FILE = frozenset(
    "use_cache cache_implementation cache_config max_cache_len compile_config prefill_chunk_size "
    "assistant_lookbehind target_lookbehind".split()
)
# Values under which a field does nothing, where that is not None or False.
INERT: dict[str, int | float | str] = {
    "use_cache": True,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}


@functools.cache
def fields_of_transformers() -> frozenset[str]:
    """Every field of the installed transformers' GenerationConfig."""
    from transformers import GenerationConfig

    return frozenset(vars(GenerationConfig()))


@functools.cache
def names_of_transformers() -> frozenset[str]:
    """Every option that `generate` of the installed transformers takes, and what it hands on to the model.

    Imports `generate` itself, about a second: ask `fields_of_transformers` first.
    """
    from transformers.generation.utils import GenerationMixin

    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    handed_on = "tokenizer assistant_tokenizer trust_remote_code input_ids inputs_embeds attention_mask position_ids"
    return fields_of_transformers() | arguments | {*handed_on.split(), "past_key_values", "logits_to_keep"}


class Options:
    """The options of one request. `names`: the fields of GenerationConfig that handloom has."""

    def __init__(self, options: Mapping[str, Any], model: Mapping[str, Any], names: frozenset[str]) -> None:
        caller = {name: value for name, value in options.items() if not (name == "do_sample" and value is None)}
        passed = as_mapping(caller.pop("generation_config", None))
        if (stop := caller.pop("stop", None)) is not None:
            if caller.get("stop_strings") is not None:
                raise InvalidParam("stop and stop_strings are two names of one option; give one of them")
            caller["stop_strings"] = stop
        self._layers = {
            CALLER: caller,
            PASSED: {name: value for name, value in passed.items() if value is not None},
            MODEL: {name: value for name, value in as_mapping(model).items() if value is not None},
        }
        self._names = names - OURS
        self._check_names()

    def find(self, name: str) -> tuple[Any, str] | None:
        """(value, where it was said), or None where nobody said anything."""
        for source, layer in self._layers.items():
            if name in layer:
                return layer[name], source
        return None

    def given(self, name: str) -> Any:
        """The value as it was said, unchecked; None where nobody said anything."""
        found = self.find(name)
        return None if found is None else found[0]

    def by_caller(self, name: str) -> bool:
        """Did the caller say it, as an option or in a config passed along?"""
        found = self.find(name)
        return found is not None and found[1] != MODEL

    def read(self, name: str, check: Callable[[Any], T], *, default: D, off: D) -> T | D:
        """The checked value; `default` where nobody said anything, `off` where the caller said None."""
        found = self.find(name)
        if found is None:
            return default
        value, source = found
        if value is None:
            return off
        try:
            return check(value)
        except Expected as expected:
            raise InvalidParam(f"{name}={show(value)} ({source}) must be {expected}") from None

    def _check_names(self) -> None:
        for source, layer in self._layers.items():
            ours = self._names | BOOKKEEPING | (OURS if source == CALLER else NO_EFFECT_IN_A_FILE)
            for name in layer.keys() - ours:
                if name in OURS or (name not in fields_of_transformers() and name not in names_of_transformers()):
                    raise InvalidParam(self._unknown(name, source))
                overruled = self.find(name) != (layer[name], source)
                if not overruled and not _is_inert(name, layer[name]):
                    raise UnsupportedOption(_unsupported(name, layer[name], source))

    def _unknown(self, name: str, source: str) -> str:
        if source != CALLER and name in OURS:
            return f"{name} ({source}) is an option of handloom and not a field of GenerationConfig; pass it yourself"
        if source == MODEL:
            return f"{show(name)} ({source}) is no generation option; delete it from lm.generation_config"
        known = sorted({*self._names, *OURS, "stop", "generation_config"} | names_of_transformers())
        elsewhere = [ELSEWHERE[name]] if name in ELSEWHERE else []
        closest = elsewhere or difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {closest[0]}?" if closest else "see GenerationParams for those there are"
        return f"{show(name)} ({source}) is no generation option; {hint}"


def said(name: str, places: Sequence[Any]) -> Any:
    """An option's value by the caller's options, the config passed, the model's file; None where nobody said it."""
    first, *others = map(as_mapping, places)
    if name in first:
        return first[name]
    return next((place[name] for place in others if place.get(name) is not None), None)


def as_mapping(config: Any) -> Mapping[str, Any]:
    """A `generation_config` option as a mapping. Raises InvalidParam for another kind of object."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    from transformers import GenerationConfig

    if not isinstance(config, GenerationConfig):
        raise InvalidParam(f"generation_config must be a GenerationConfig or a mapping, not {type(config).__name__}")
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _is_inert(name: str, value: Any) -> bool:
    if name not in INERT or value is None:
        return value is None or value is False
    inert = INERT[name]
    return (
        isinstance(value, int | float | str) and isinstance(value, bool) == isinstance(inert, bool) and value == inert
    )


def _unsupported(name: str, value: Any, source: str) -> str:
    if name in OF_LM:
        return f"{name}={show(value)} ({source}): {OF_LM[name]}"
    way_out = "leave it out" if source == CALLER else f"pass {name}={INERT.get(name)!r} to switch it off"
    why = f" ({WHY_NOT[name]})" if name in WHY_NOT else ""
    return f"{name}={show(value)} ({source}): transformers has this option, handloom does not{why}; {way_out}"


# Checks: the value in its type, or Expected ----------------------------------------------------------


class Expected(Exception):
    """The value is not what this says; `Options.read` makes an InvalidParam of it."""


def is_integer(value: Any) -> bool:
    """An integer of Python or numpy; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(low: int, high: int | None = None) -> Callable[[Any], int]:
    """Integers in [low, high]."""

    def check(value: Any) -> int:
        if not is_integer(value) or value < low or (high is not None and value > high):
            raise Expected(f"an integer >= {low}" if high is None else f"an integer from {low} to {high}")
        return int(value)

    return check


def real(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    """Numbers in [low, high], or with `above` in (low, high]."""

    def check(value: Any) -> float:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above and value == low):
            raise Expected(f"a number {'above' if above else 'from'} {low:g} up to {high:g}")
        return float(value)

    return check


def factor(value: Any) -> float:
    """What a score may be multiplied with or divided by."""
    return real(1 / LARGEST_FACTOR, LARGEST_FACTOR)(value)


def below_one(value: Any) -> float:
    """A probability to cut at."""
    number = real(0, 1)(value)
    if number == 1:
        raise Expected("a number from 0 up to 1, without 1")
    return number


def zero_or_factor(value: Any) -> float:
    """A temperature."""
    if not isinstance(value, bool) and isinstance(value, numbers.Real) and value == 0:
        return 0.0
    try:
        return factor(value)
    except Expected as expected:
        raise Expected(f"0, which means greedy, or {expected}") from None


def flag(value: Any) -> bool:
    """True or False, and nothing that merely passes for it."""
    if not isinstance(value, bool):
        raise Expected("True or False")
    return value


def random_source(value: Any) -> Literal["counter", "torch"]:
    """The name of a random number generator."""
    if value == "counter":
        return "counter"
    if value == "torch":
        return "torch"
    raise Expected("'counter' or 'torch'")


def callables(value: Any) -> tuple[Callable[..., Any], ...]:
    """A list or tuple of callables; transformers' LogitsProcessorList is one."""
    if not isinstance(value, list | tuple) or not all(callable(item) for item in value):
        raise Expected("a list of callables")
    return tuple(value)


def function(value: Any) -> Callable[..., Any]:
    """Anything that can be called."""
    if not callable(value):
        raise Expected("a function")
    checked: Callable[..., Any] = value
    return checked


def show(value: Any) -> str:
    """A short repr of anything."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return f"a very long {type(value).__name__}"
