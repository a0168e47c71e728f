"""Hub names, shapes and orientation for the tensors of a GGUF file.

llama.cpp's converter renames weights and changes some on the way; each entry here says how to undo that:
- llama: rows of q and k are interleaved for its rope (pairs side by side instead of half a head apart);
- gemma3: norms are stored as `1 + weight`, the Hub stores `weight`;
- gpt2: the Hub's Conv1D weights are [in, out], the file has [out, in].

The facts are from llama.cpp's `conversion/*.py`. This module does not read files or numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from handloom.checkpoint.gguf_reader import RawTensor
from handloom.checkpoint.json_object import quote
from handloom.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the file as a weight of the Hub's model.

    Attributes:
        name: the Hub's name.
        raw: where and how the file has it.
        transposed: the Hub's matrix is the transpose of the file's.
        rotary_heads: number of heads whose rows the file has interleaved; 0 if none.
        offset: to be added to every element of the file's.
    """

    name: str
    raw: RawTensor
    transposed: bool = False
    rotary_heads: int = 0
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape[::-1] if self.transposed else self.raw.shape


@dataclass(frozen=True, slots=True)
class _Naming:
    """GGUF name to Hub name, without `blk.{i}.` and without `.weight` or `.bias`."""

    model: Mapping[str, str]
    block: Mapping[str, str]
    blocks_at: str = "model.layers."
    transposed: frozenset[str] = frozenset()
    rotary: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    consumed: frozenset[str] = frozenset()


_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMINGS = {
    "llama": _Naming(
        model=_MODEL,
        block=_BLOCK | {"ffn_norm": "post_attention_layernorm"},
        rotary={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        consumed=frozenset({"rope_freqs.weight"}),
    ),
    "gemma3": _Naming(
        model=_MODEL,
        block=_BLOCK
        | {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=-1.0,
    ),
    "gpt2": _Naming(
        model={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        blocks_at="transformer.h.",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}
_TENSOR_NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?([a-z0-9_]+)\.(weight|bias)")


def find_weights(
    architecture: str, tensors: Mapping[str, RawTensor], config: Mapping[str, Any], where: str
) -> dict[str, Weight]:
    """Every tensor of the file as a Hub weight, by Hub name.

    Args:
        architecture: `general.architecture`, one that `gguf_config` accepted.
        tensors: the file's, by GGUF name.
        config: the Hub-style config that `gguf_config` made.
        where: names the file in messages.

    Raises:
        CheckpointError: a tensor whose name this architecture does not have, or whose shape cannot be right.
    """
    naming = _NAMINGS[architecture]
    weights = {}
    for raw in tensors.values():
        if raw.name in naming.consumed:
            continue
        weight = _find(naming, raw, config)
        if weight is None:
            raise CheckpointError(f"{where}: tensor {quote(raw.name)} is not one that a {architecture} model has")
        _check_shape(weight, where)
        weights[weight.name] = weight
    return weights


def _find(naming: _Naming, raw: RawTensor, config: Mapping[str, Any]) -> Weight | None:
    match = _TENSOR_NAME.fullmatch(raw.name)
    if match is None:
        return None
    block, base, kind = match.groups()
    names = naming.model if block is None else naming.block
    if base not in names or (
        block is not None and int(block) >= config.get("num_hidden_layers", config.get("n_layer"))
    ):
        return None
    at = "" if block is None else f"{naming.blocks_at}{block}."
    return Weight(
        name=f"{at}{names[base]}.{kind}",
        raw=raw,
        transposed=base in naming.transposed and kind == "weight",
        rotary_heads=config[naming.rotary[base]] if base in naming.rotary else 0,
        offset=naming.norm_offset if base.endswith("norm") else 0.0,
    )


def _check_shape(weight: Weight, where: str) -> None:
    raw = weight.raw
    vector = len(raw.shape) == 1
    if len(raw.shape) > 2 or (vector and gguf.GGML_QUANT_SIZES[raw.storage][0] != 1) or (vector and weight.transposed):
        raise CheckpointError(
            f"{where}: tensor {quote(raw.name)} has shape {raw.shape} in {raw.storage.name}; expected a matrix, or a "
            "vector that is not quantised"
        )
    if weight.rotary_heads and raw.shape[0] % (2 * weight.rotary_heads):
        raise CheckpointError(
            f"{where}: tensor {quote(raw.name)} has {raw.shape[0]} rows, which do not make {weight.rotary_heads} heads "
            "of even width"
        )
