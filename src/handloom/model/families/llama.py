"""Llama (Touvron et al. 2023, arXiv 2302.13971; Llama 3: arXiv 2407.21783) and its like: SmolLM2, TinyLlama.

RMSNorm before each half, rotary positions, grouped-query attention, SwiGLU.
"""

from __future__ import annotations

from handloom.model.families.config import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from handloom.model.families.family import ACTIVATIONS, Family, Source, check_heads, default_head_dim, read_rope
from handloom.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec


def read_spec(config: ConfigReader) -> ModelSpec:
    """config.json of model_type llama -> ModelSpec. Raises ConfigError, UnsupportedModel."""
    hidden_size = config.integer("hidden_size", 4096)
    num_heads = config.integer("num_attention_heads", 32, high=MAX_HEADS)
    num_kv_heads = config.integer("num_key_value_heads", num_heads, high=MAX_HEADS)
    check_heads(config, num_heads, num_kv_heads)
    head_dim = config.integer("head_dim", default_head_dim(config, hidden_size, num_heads), high=MAX_HEAD_DIM)
    max_context = config.integer("max_position_embeddings", 2048, high=MAX_CONTEXT)
    scaling, parameters = config.nested("rope_scaling"), config.nested("rope_parameters")
    if scaling is not None and scaling.values:  # as transformers: the older key, where it says anything
        parameters = scaling
    theta = config.number("rope_theta", 10000.0)
    attention_bias = config.flag("attention_bias", False)
    mixer = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read_rope(config, head_dim, max_context, theta=theta, parameters=parameters),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
    )
    mlp = MlpSpec(
        intermediate_size=config.integer("intermediate_size", 11008, high=1 << 20),
        activation=config.one_of("hidden_act", ACTIVATIONS, "silu"),
        gated=True,
        bias=config.flag("mlp_bias", False),
    )
    norm = NormSpec("rms", config.number("rms_norm_eps", 1e-6, high=1.0))
    vocab_size = config.integer("vocab_size", 32000, high=MAX_VOCAB)
    num_layers = config.integer("num_hidden_layers", 32, high=MAX_LAYERS)
    return ModelSpec(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_context=max_context,
        layers=(LayerSpec(mixer, mlp, norm),) * num_layers,
        final_norm=norm,
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=config.token_ids("eos_token_id", vocab_size),
        bos_token_id=next(iter(config.token_ids("bos_token_id", vocab_size)), None),
    )


def layer_sources(i: int, layer: LayerSpec) -> dict[str, Source]:
    """Hub names of layer i's weights."""
    at = f"model.layers.{i}."
    attention, mlp = at + "self_attn.", at + "mlp."
    sources = {
        "attn_norm.weight": Source((at + "input_layernorm.weight",)),
        "mlp_norm.weight": Source((at + "post_attention_layernorm.weight",)),
    }
    for kind in ("weight", "bias"):
        sources[f"qkv.{kind}"] = Source(tuple(f"{attention}{x}_proj.{kind}" for x in "qkv"))
        sources[f"out.{kind}"] = Source((f"{attention}o_proj.{kind}",))
        sources[f"up.{kind}"] = Source((f"{mlp}gate_proj.{kind}", f"{mlp}up_proj.{kind}"))
        sources[f"down.{kind}"] = Source((f"{mlp}down_proj.{kind}",))
    return sources


MODEL_SOURCES = {
    "embed.weight": Source(("model.embed_tokens.weight",)),
    "final_norm.weight": Source(("model.norm.weight",)),
    "head.weight": Source(("lm_head.weight",)),
}

FAMILY = Family(
    model_type="llama",
    read_spec=read_spec,
    model_sources=MODEL_SOURCES,
    layer_sources=layer_sources,
    prefixes=("model.", ""),
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
