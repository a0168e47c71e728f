"""Gemma 3, text only (Gemma Team 2025, arXiv 2503.19786).

RMSNorm with unit offset before and after each half, q/k norm, GeGLU, scaled embeddings; five sliding-window layers
with a local rope to one full layer with a global rope.
"""

from __future__ import annotations

from dataclasses import replace

from handloom.errors import UnsupportedModel
from handloom.model.families import llama
from handloom.model.families.config import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from handloom.model.families.family import ACTIVATIONS, Family, Source, check_heads, read_rope
from handloom.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

LAYER_TYPES = {"sliding_attention": True, "full_attention": False}


def read_ropes(config: ConfigReader, head_dim: int, max_context: int) -> tuple[RopeSpec, RopeSpec]:
    """(global, local) rope: nested per layer type (transformers 5), or two thetas and a scaling of the global one."""
    global_theta = config.number("rope_theta", 1e6)
    local_theta = config.number("rope_local_base_freq", 1e4)
    nested, scaling = config.nested("rope_parameters"), config.nested("rope_scaling")
    for_full = for_sliding = None
    if nested is not None:
        for_full, for_sliding = nested.nested("full_attention"), nested.nested("sliding_attention")
        nested.finish(top_level=False)
    if scaling is not None:
        for_full = scaling
    return (
        read_rope(config, head_dim, max_context, theta=global_theta, parameters=for_full),
        read_rope(config, head_dim, max_context, theta=local_theta, parameters=for_sliding),
    )


def read_sliding_layers(config: ConfigReader, num_layers: int) -> list[bool]:
    """Which layers slide: `layer_types`, or every layer but each `sliding_window_pattern`-th (default 6)."""
    types = config.strings("layer_types", num_layers)
    pattern = config.integer("sliding_window_pattern", 6, high=MAX_LAYERS)
    config.ignore("_sliding_window_pattern")
    if types is None:
        return [(i + 1) % pattern != 0 for i in range(num_layers)]
    for kind in types:
        if kind not in LAYER_TYPES:
            raise UnsupportedModel(f"{config.where}: layer_types has {kind!r}; handloom computes {list(LAYER_TYPES)}")
    return [LAYER_TYPES[kind] for kind in types]


def read_spec(config: ConfigReader) -> ModelSpec:
    """config.json of model_type gemma3_text -> ModelSpec. Raises ConfigError, UnsupportedModel."""
    hidden_size = config.integer("hidden_size", 2304)
    num_heads = config.integer("num_attention_heads", 8, high=MAX_HEADS)
    num_kv_heads = config.integer("num_key_value_heads", 4, high=MAX_HEADS)
    check_heads(config, num_heads, num_kv_heads)
    head_dim = config.integer("head_dim", 256, high=MAX_HEAD_DIM)
    max_context = config.integer("max_position_embeddings", 131072, high=MAX_CONTEXT)
    if config.flag("use_bidirectional_attention", False):
        raise UnsupportedModel(f"{config.where}: use_bidirectional_attention is not text generation")
    norm = NormSpec("rms_unit_offset", config.number("rms_norm_eps", 1e-6, high=1.0))
    global_rope, local_rope = read_ropes(config, head_dim, max_context)
    bias = config.flag("attention_bias", False)
    full = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        rope=global_rope,
        softcap=config.optional_number("attn_logit_softcapping"),
        qk_norm=norm,
        qkv_bias=bias,
        out_bias=bias,
    )
    window = config.integer("sliding_window", 4096, high=MAX_CONTEXT)
    sliding = replace(full, rope=local_rope, window=window)
    mlp = MlpSpec(
        intermediate_size=config.integer("intermediate_size", 9216, high=1 << 20),
        activation=config.one_of("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated=True,
    )
    config.ignore("hidden_act")
    slides = read_sliding_layers(config, config.integer("num_hidden_layers", 26, high=MAX_LAYERS))
    vocab_size = config.integer("vocab_size", 262208, high=MAX_VOCAB)
    return ModelSpec(
        model_type="gemma3_text",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_context=max_context,
        layers=tuple(LayerSpec(sliding if slide else full, mlp, norm, "sandwich") for slide in slides),
        final_norm=norm,
        tied_head=config.flag("tie_word_embeddings", True),
        embedding_scale=hidden_size**0.5,
        logits_softcap=config.optional_number("final_logit_softcapping"),
        eos_token_ids=config.token_ids("eos_token_id", vocab_size),
        bos_token_id=next(iter(config.token_ids("bos_token_id", vocab_size)), None),
    )


def layer_sources(i: int, layer: LayerSpec) -> dict[str, Source]:
    """Hub names of layer i's weights: Llama's, with q/k norms and four norms per layer."""
    at = f"model.layers.{i}."
    return llama.layer_sources(i, layer) | {
        "attn_post_norm.weight": Source((at + "post_attention_layernorm.weight",)),
        "mlp_norm.weight": Source((at + "pre_feedforward_layernorm.weight",)),
        "mlp_post_norm.weight": Source((at + "post_feedforward_layernorm.weight",)),
        "q_norm.weight": Source((at + "self_attn.q_norm.weight",)),
        "k_norm.weight": Source((at + "self_attn.k_norm.weight",)),
    }


FAMILY = Family(
    model_type="gemma3_text",
    read_spec=read_spec,
    model_sources=llama.MODEL_SOURCES,
    layer_sources=layer_sources,
    prefixes=("model.", ""),
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
