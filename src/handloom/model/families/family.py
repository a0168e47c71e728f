"""What a family file provides, and the pieces that most of them share.

This module does not know any particular model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from handloom.errors import ConfigError, UnsupportedModel
from handloom.model.families.config import MAX_CONTEXT, ConfigReader
from handloom.model.spec import LayerSpec, ModelSpec, RopeSpec

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
ROPE_SCALINGS: dict[str, Literal["none", "linear", "llama3"]] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where one of our weights comes from: Hub tensors stacked along the rows, transposed first if asked."""

    names: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table: how config.json becomes a spec, and Hub weight names become ours.

    sources(i, layer) names layer i's weights, model_sources the others; all names are written with the
    first of `prefixes` and tried with each. `ignored`: patterns of Hub tensors that carry no weight.
    """

    model_type: str
    read_spec: Callable[[ConfigReader], ModelSpec]
    model_sources: dict[str, Source]
    layer_sources: Callable[[int, LayerSpec], dict[str, Source]]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def read_rope(
    config: ConfigReader, head_dim: int, max_context: int, *, theta: float, parameters: ConfigReader | None
) -> RopeSpec:
    """A rope from `rope_parameters` (transformers 5) or `rope_scaling` (before), `theta` where neither has it.

    Raises ConfigError for bad values and UnsupportedModel for a rope type handloom does not compute.
    """
    if head_dim % 2:
        raise ConfigError(f"{config.where}: head_dim is {head_dim}; rotary positions need an even head_dim")
    if parameters is None:
        return RopeSpec(theta, head_dim)
    kind_key = "rope_type" if parameters.get("rope_type") is not None else "type"
    scaling = parameters.one_of(kind_key, ROPE_SCALINGS, "default")
    parameters.ignore("rope_type", "type")
    theta = parameters.number("rope_theta", theta)
    if parameters.number("partial_rotary_factor", 1.0, high=1.0) != 1.0:
        raise UnsupportedModel(f"{parameters.where}: partial_rotary_factor other than 1 is not supported here")
    rope = RopeSpec(theta, head_dim)
    if scaling == "linear":
        rope = RopeSpec(theta, head_dim, "linear", parameters.number("factor"))
    elif scaling == "llama3":
        low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
        if high <= low:
            raise ConfigError(f"{parameters.where}: high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        original = parameters.integer("original_max_position_embeddings", max_context, high=MAX_CONTEXT)
        rope = RopeSpec(theta, head_dim, "llama3", parameters.number("factor"), low, high, original)
    parameters.ignore("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    parameters.finish(top_level=False)
    return rope


def check_heads(config: ConfigReader, num_heads: int, num_kv_heads: int) -> None:
    """Query heads must divide evenly over KV heads. Raises ConfigError."""
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{config.where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )


def default_head_dim(config: ConfigReader, hidden_size: int, num_heads: int) -> int:
    """hidden_size / num_heads. Raises ConfigError where it does not divide, as transformers: head_dim or not."""
    if hidden_size % num_heads:
        raise ConfigError(
            f"{config.where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    return hidden_size // num_heads
