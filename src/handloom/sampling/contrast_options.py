"""The options of decoding by contrast, checked: guidance, contrastive search, DoLa.

This module does not know how any of it decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor

from handloom.errors import ContextOverflow, InvalidParam, UnsupportedOption
from handloom.sampling.options import LARGEST_FACTOR, Expected, Options, flag, integer, is_integer, real, show
from handloom.sampling.search_options import MAX_SEQUENCES, Search
from handloom.sampling.structure_options import STRUCTURES

DolaLayers = tuple[int, ...] | Literal["low", "high"]
MAX_LAYERS = 4096


class Contrast(TypedDict):
    """See `GenerationParams`."""

    guidance_scale: float
    negative_prompt_ids: tuple[int, ...]
    penalty_alpha: float
    dola_layers: DolaLayers


def is_contrastive(asked: Options) -> bool:
    """Whether contrastive search is asked for, whose candidates top_k counts; then it does not mean sampling."""
    return asked.read("penalty_alpha", real(0, 1), default=0.0, off=0.0) > 0


def read_contrast(asked: Options, do_sample: bool, search: Search, *, vocab_size: int, room: int) -> Contrast:
    """The options. search: those of the same request; room: tokens that a prompt may have.

    Raises InvalidParam, UnsupportedOption, ContextOverflow where they, or others beside them, do not go together.
    """
    scale = asked.read("guidance_scale", real(-LARGEST_FACTOR, LARGEST_FACTOR), default=1.0, off=1.0)
    negative = asked.read("negative_prompt_ids", token_ids(vocab_size), default=(), off=())
    if negative and asked.given("guidance_scale") is None:
        raise InvalidParam("a negative prompt is what guidance leads away from; give guidance_scale too")
    if len(negative) > room:
        raise ContextOverflow(
            f"the negative prompt has {len(negative)} tokens, and beside the new ones there is room for {room}; "
            "shorten it, or ask for fewer max_new_tokens"
        )
    alpha = asked.read("penalty_alpha", real(0, 1), default=0.0, off=0.0)
    layers = asked.read("dola_layers", dola_layers, default=(), off=())
    modes = {"guidance_scale": scale != 1.0, "penalty_alpha": alpha > 0, "dola_layers": layers != ()}
    first, *others = [f"{name}={show(asked.given(name))}" for name, on in modes.items() if on] or [""]
    if others:
        raise UnsupportedOption(f"{others[0]} beside {first}: they are two ways to weigh the logits; give one of them")
    if (scale != 1.0 or alpha > 0) and asked.given("prompt_logprobs") is not None:
        raise UnsupportedOption(
            f"prompt_logprobs beside {first}: ask for them in a request of their own, or use `lm.score`"
        )
    if layers and (structure := [name for name in STRUCTURES if asked.given(name) is not None]):
        raise UnsupportedOption(
            f"{structure[0]} beside {first}: DoLa leaves a few likely tokens, of which the grammar may allow none; "
            "leave one of the two out"
        )
    if alpha > 0:
        _check_contrastive(asked, first, do_sample)
    if (alpha > 0 or layers) and max(search.num_beams, search.num_return_sequences) > 1:
        raise UnsupportedOption(f"{first} beside num_beams or num_return_sequences: it has one output; leave them out")
    return Contrast(guidance_scale=scale, negative_prompt_ids=negative, penalty_alpha=alpha, dola_layers=layers)


def _check_contrastive(asked: Options, said_so: str, do_sample: bool) -> None:
    top_k = asked.read("top_k", integer(0, 2**31 - 1), default=50, off=0)
    if do_sample:
        raise InvalidParam(f"{said_so} does not draw tokens, and sampling is asked for; give one of the two")
    for name in ("output_hidden_states", "output_attentions", "output_past_key_values"):
        if asked.read(name, flag, default=False, off=False):
            raise UnsupportedOption(f"{name} beside {said_so}: the candidates that are not taken would be in it too")
    if not 1 <= top_k <= MAX_SEQUENCES:
        raise InvalidParam(f"{said_so} looks at top_k tokens, and top_k={top_k}; give 1 to {MAX_SEQUENCES}")


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


def dola_layers(value: Any) -> DolaLayers:
    """Which layers DoLa looks at."""
    if value == "low":
        return "low"
    if value == "high":
        return "high"
    is_list = isinstance(value, list | tuple) and 0 < len(value) <= MAX_LAYERS
    if not is_list or not all(is_integer(layer) and layer >= 0 for layer in value):
        raise Expected("'low', 'high' or a list of layers, counted from 0")
    return tuple(int(layer) for layer in value)
