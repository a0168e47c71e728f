"""What a decoder-only model is, declared: everything the forward pass needs to know, and nothing else.

A family (`families/*.py`) turns the Hub's config.json into a `ModelSpec`; nothing below reads
config.json again. Every field here is carried out by `Transformer`; a choice that is not listed does
not exist yet, and a family must refuse a config that asks for it.

This module does not know weight names, files, devices or dtypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

NormKind = Literal["rms", "rms_unit_offset", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A normalisation; the kinds are defined in `handloom_kernels.reference.Norm`."""

    kind: NormKind
    eps: float

    @property
    def has_bias(self) -> bool:
        return self.kind == "layer"


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions over the first `rotary_dim` dimensions of a head.

    scaling "none"; "linear": positions divided by factor (Chen et al. 2023, arXiv 2306.15595);
    "llama3": wavelengths past a band divided by factor, the band itself blended (Llama 3.1 model card).
    """

    theta: float
    rotary_dim: int
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Softmax attention: MHA, GQA or MQA by num_kv_heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    softcap: float | None = None
    qk_norm: NormSpec | None = None
    qkv_bias: bool = False
    out_bias: bool = False


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A dense MLP; gated ones multiply activation(gate) by up (Shazeer 2020, arXiv 2002.05202)."""

    intermediate_size: int
    activation: Activation
    gated: bool
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer. residual "pre": norm before each half; "sandwich": a norm before and after each half."""

    mixer: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec
    residual: Literal["pre", "sandwich"] = "pre"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole decoder-only model. `learned_positions`: rows of the position table, 0 where there is none."""

    model_type: str
    vocab_size: int
    hidden_size: int
    max_context: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tied_head: bool
    embedding_scale: float = 1.0
    learned_positions: int = 0
    logits_softcap: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight as the forward pass holds it; `parts` are the row counts of what is stacked in it."""

    shape: tuple[int, ...]
    parts: tuple[int, ...] = field(default=())

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def layer_parameters(hidden_size: int, layer: LayerSpec) -> dict[str, Parameter]:
    """Names and shapes of one layer's weights, as `Transformer` holds them (q, k, v and gate, up stacked)."""
    mixer, mlp = layer.mixer, layer.mlp
    q_rows, kv_rows = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    qkv = (q_rows, kv_rows, kv_rows)
    up = (mlp.intermediate_size,) * (2 if mlp.gated else 1)
    parameters = {
        "qkv.weight": Parameter((sum(qkv), hidden_size), qkv),
        "out.weight": Parameter((hidden_size, q_rows)),
        "up.weight": Parameter((sum(up), hidden_size), up),
        "down.weight": Parameter((hidden_size, mlp.intermediate_size)),
    }
    if mixer.qkv_bias:
        parameters["qkv.bias"] = Parameter((sum(qkv),), qkv)
    if mixer.out_bias:
        parameters["out.bias"] = Parameter((hidden_size,))
    if mlp.bias:
        parameters["up.bias"] = Parameter((sum(up),), up)
        parameters["down.bias"] = Parameter((hidden_size,))
    if mixer.qk_norm is not None:
        parameters["q_norm.weight"] = parameters["k_norm.weight"] = Parameter((mixer.head_dim,))
    norms = ["attn_norm", "mlp_norm"]
    if layer.residual == "sandwich":
        norms += ["attn_post_norm", "mlp_post_norm"]
    for name in norms:
        parameters[f"{name}.weight"] = Parameter((hidden_size,))
        if layer.norm.has_bias:
            parameters[f"{name}.bias"] = Parameter((hidden_size,))
    return parameters


def model_parameters(spec: ModelSpec) -> dict[str, Parameter]:
    """Names and shapes of every weight of the model; layers are prefixed `layers.{i}.`."""
    parameters = {"embed.weight": Parameter((spec.vocab_size, spec.hidden_size))}
    if spec.learned_positions:
        parameters["positions.weight"] = Parameter((spec.learned_positions, spec.hidden_size))
    for i, layer in enumerate(spec.layers):
        for name, parameter in layer_parameters(spec.hidden_size, layer).items():
            parameters[f"layers.{i}.{name}"] = parameter
    parameters["final_norm.weight"] = Parameter((spec.hidden_size,))
    if spec.final_norm.has_bias:
        parameters["final_norm.bias"] = Parameter((spec.hidden_size,))
    if not spec.tied_head:
        parameters["head.weight"] = Parameter((spec.vocab_size, spec.hidden_size))
    return parameters


def looked_up(spec: ModelSpec) -> frozenset[str]:
    """The tables of which a step reads only its tokens' rows; an embedding that is the head too is read whole."""
    return frozenset({"positions.weight"} if spec.tied_head else {"positions.weight", "embed.weight"})


def num_parameters(spec: ModelSpec) -> int:
    """Weights of the model, a tied head counted once."""
    return sum(parameter.numel for parameter in model_parameters(spec).values())


def kv_values_per_token(spec: ModelSpec) -> int:
    """Numbers (not bytes) that one token adds to the KV cache, over all layers."""
    return sum(2 * layer.mixer.num_kv_heads * layer.mixer.head_dim for layer in spec.layers)
