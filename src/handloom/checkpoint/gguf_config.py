"""A Hub-style config from GGUF metadata, for the architectures llama, gpt2 and gemma3.

The numbers are those that transformers derives from the same file, and what the file leaves unsaid is what
llama.cpp assumes. Two things go beyond transformers 5.23, which drops them without a word: linear rope scaling, and
llama3 rope scaling, which llama.cpp stores as the tensor `rope_freqs.weight`.

Every key of the architecture must be understood; one that is not is refused by name, because the model would be
computed wrongly. Sizes are checked for type and sign only; what a model may be is for the families to say.

This module does not know tensors' bytes or tokenization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from handloom.checkpoint.gguf_reader import RawTensor
from handloom.checkpoint.json_object import quote
from handloom.errors import ConfigError, UnsupportedModel

ARCHITECTURES = ("gemma3", "gpt2", "llama")
GEMMA3_27B_LAYERS = 62
"""llama.cpp knows Gemma 3 27B, the one model with another attention scale, by its number of layers."""

_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_END_OF_TURN = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys that may be there with a value that changes nothing."""


def build_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, RawTensor],
    rope_factors: Sequence[float] | None,
    where: str,
) -> dict[str, Any]:
    """The content that the Hub's config.json would have.

    Args:
        metadata: the file's.
        tensors: the file's, by GGUF name; only names and shapes are looked at.
        rope_factors: the content of `rope_freqs.weight` [head_dim / 2], if the file has it.
        where: names the file in messages.

    Raises:
        UnsupportedModel: another architecture, or a variant that is not supported; the message names it.
        ConfigError: a key is missing, has the wrong type or contradicts another.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where}: general.architecture is {quote(architecture)}; supported are {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(metadata, architecture, where)
    if rope_factors is not None and architecture != "llama":
        raise UnsupportedModel(f"{where}: rope_freqs.weight is not supported in a {architecture} model")
    if architecture == "llama":
        config = _llama(keys, tensors, rope_factors)
    else:
        config = {"gpt2": _gpt2, "gemma3": _gemma3}[architecture](keys, tensors)
    config["vocab_size"] = _vocab_size(keys, tensors)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config |= _token_ids(keys)
    keys.finish()
    return config


def build_generation_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The content that the Hub's generation_config.json would have: only token ids.

    The file's end-of-turn and end-of-message ids, where it has them, end a text as eos does.
    """
    result = {name: config[name] for name in _TOKEN_IDS if name in config}
    ends = [result["eos_token_id"]] if "eos_token_id" in result else []
    ends += [metadata[key] for key in _END_OF_TURN if type(metadata.get(key)) is int]
    if len(set(ends)) > 1:
        result["eos_token_id"] = list(dict.fromkeys(ends))
    return result


class _Keys:
    """Typed access to the metadata of one architecture; remembers what was asked for."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self.metadata, self.prefix, self.where = metadata, f"{architecture}.", where
        self._asked: set[str] = set()

    def get(self, key: str) -> Any:
        self._asked.add(self.prefix + key)
        return self.metadata.get(self.prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self.error(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not float or not math.isfinite(value) or value <= 0:
            raise self.error(key, value, "a positive float")
        return value

    def error(self, key: str, value: Any, expected: str) -> ConfigError:
        said = "missing" if value is None else quote(value)
        return ConfigError(f"{self.where}: metadata key {quote(self.prefix + key)} is {said}; expected {expected}")

    def unsupported(self, key: str, value: Any, supported: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.where}: metadata key {quote(self.prefix + key)} is {quote(value)}; supported: {supported}"
        )

    def finish(self) -> None:
        for name, value in self.metadata.items():
            key = name.removeprefix(self.prefix)
            if key == name or name in self._asked:
                continue
            if key not in _NEUTRAL or not any(
                value is v or (type(value), value) == (type(v), v) for v in _NEUTRAL[key]
            ):
                allowed = f"only {_NEUTRAL[key]}" if key in _NEUTRAL else "no value of this key"
                raise self.unsupported(key, value, allowed)


def _llama(keys: _Keys, tensors: Mapping[str, RawTensor], rope_factors: Sequence[float] | None) -> dict[str, Any]:
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = _head_dim(keys, hidden_size // num_heads)
    theta = keys.number("rope.freq_base", 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta} | _linear_scaling(keys)
    if rope_factors is not None:
        if rope["rope_type"] != "default":
            raise UnsupportedModel(f"{keys.where}: has both rope.scaling and rope_freqs.weight; supported: one of them")
        rope |= _llama3_scaling(rope_factors, theta, head_dim, keys.where)
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": _num_layers(keys, tensors),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _gpt2(keys: _Keys, tensors: Mapping[str, RawTensor]) -> dict[str, Any]:
    num_heads = keys.integer("attention.head_count")
    if keys.integer("attention.head_count_kv", num_heads) != num_heads:
        raise keys.unsupported("attention.head_count_kv", keys.get("attention.head_count_kv"), f"only {num_heads}")
    return {
        "model_type": "gpt2",
        "n_embd": keys.integer("embedding_length"),
        "n_inner": keys.integer("feed_forward_length"),
        "n_layer": _num_layers(keys, tensors),
        "n_head": num_heads,
        "n_positions": keys.integer("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _gemma3(keys: _Keys, tensors: Mapping[str, RawTensor]) -> dict[str, Any]:
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = _head_dim(keys, hidden_size // num_heads)
    num_layers = _num_layers(keys, tensors)
    window = keys.get("attention.sliding_window")
    config = {
        "model_type": "gemma3_text",
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": hidden_size // num_heads if num_layers == GEMMA3_27B_LAYERS else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [
            "sliding_attention" if slides else "full_attention"
            for slides in _sliding_layers(keys, num_layers, sliding=window not in (None, 0))
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base")}
            | _linear_scaling(keys),
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)},
        },
    }
    if window not in (None, 0):
        config["sliding_window"] = keys.integer("attention.sliding_window")
    if keys.get("final_logit_softcapping") is not None:
        config["final_logit_softcapping"] = keys.number("final_logit_softcapping")
    return config


def _head_dim(keys: _Keys, default: int) -> int:
    """Width of a head: q, k, v and the rotated part must all have it."""
    head_dim = keys.integer("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := keys.integer(key, head_dim)) != head_dim:
            raise keys.unsupported(key, value, f"only the head's width, {head_dim}")
    return head_dim


def _num_layers(keys: _Keys, tensors: Mapping[str, RawTensor]) -> int:
    layers = keys.integer("block_count")
    if layers > len(tensors):
        raise keys.error("block_count", layers, f"at most one layer per tensor, and the file has {len(tensors)}")
    return layers


def _sliding_layers(keys: _Keys, num_layers: int, *, sliding: bool) -> list[bool]:
    """Which layers slide: a flag for each, or "every n-th does not" (n = 6 where the file does not say)."""
    key = "attention.sliding_window_pattern"
    pattern = keys.get(key)
    if not sliding:
        return [False] * num_layers
    if pattern is None or (type(pattern) is int and pattern > 0):
        return [bool((i + 1) % (pattern or 6)) for i in range(num_layers)]
    if not isinstance(pattern, list) or len(pattern) != num_layers or not all(type(flag) is bool for flag in pattern):
        raise keys.error(key, pattern, f"a positive integer or {num_layers} booleans")
    return pattern


def _linear_scaling(keys: _Keys) -> dict[str, Any]:
    """`rope.scaling.type` linear (or the older `rope.scale_linear`) as fields of `rope_parameters`."""
    kind = keys.get("rope.scaling.type")
    legacy = keys.number("rope.scale_linear", 1.0)
    if kind not in (None, "none", "linear"):
        raise keys.unsupported("rope.scaling.type", kind, "linear, none, and llama3 through rope_freqs.weight")
    factor = keys.number("rope.scaling.factor", legacy)
    keys.get("rope.scaling.original_context_length")  # says where the model came from; only yarn computes with it
    if kind == "none" or factor == 1.0:
        return {}
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(factors: Sequence[float], theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """The llama3 rope scaling (arXiv 2407.21783) that gives these divisors of the rope frequencies.

    The file has the divisors only. Every Llama 3 uses low 1, high 4 and an original context of 8192, so the factor is
    the largest divisor, and computing the divisors back shows whether that is indeed what the file means.
    """
    factor = float(max(factors, default=0.0))
    wavelengths = [2 * math.pi * theta ** (2 * i / head_dim) for i in range(head_dim // 2)]
    if len(factors) != len(wavelengths) or not all(
        math.isclose(given, _llama3_divisor(wavelength, factor), rel_tol=1e-4)
        for given, wavelength in zip(factors, wavelengths, strict=True)
    ):
        raise UnsupportedModel(
            f"{where}: rope_freqs.weight is not the rope scaling of a Llama 3; no other is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama3_divisor(wavelength: float, factor: float) -> float:
    """1 for wavelengths below 8192 / 4, `factor` for those above 8192, and a smooth passage between."""
    smooth = min(max((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth) if factor > 0 else math.nan


def _vocab_size(keys: _Keys, tensors: Mapping[str, RawTensor]) -> int:
    """Rows of the embedding; what the metadata says must agree."""
    if "token_embd.weight" not in tensors:
        raise ConfigError(f"{keys.where}: has no tensor 'token_embd.weight'")
    rows = tensors["token_embd.weight"].shape[0]
    if (stated := keys.integer("vocab_size", rows)) != rows:
        raise keys.error("vocab_size", stated, f"the {rows} rows of token_embd.weight")
    tokens = keys.metadata.get("tokenizer.ggml.tokens", ())
    if isinstance(tokens, list) and len(tokens) > rows:
        raise ConfigError(
            f"{keys.where}: metadata key 'tokenizer.ggml.tokens' has {len(tokens)} tokens, more than the {rows} rows "
            "of token_embd.weight"
        )
    return rows


def _token_ids(keys: _Keys) -> dict[str, int]:
    ids = {}
    for name, key in _TOKEN_IDS.items():
        if key in keys.metadata:
            if type(keys.metadata[key]) is not int:
                raise ConfigError(
                    f"{keys.where}: metadata key {quote(key)} is {quote(keys.metadata[key])}; expected an integer"
                )
            ids[name] = keys.metadata[key]
    return ids
