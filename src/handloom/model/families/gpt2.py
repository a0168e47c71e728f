"""GPT-2 (Radford et al. 2019): LayerNorm before each half, learned positions, biases, fused transposed weights."""

from __future__ import annotations

from handloom.model.families.config import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from handloom.model.families.family import ACTIVATIONS, Family, Source, default_head_dim
from handloom.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec


def read_spec(config: ConfigReader) -> ModelSpec:
    """config.json of model_type gpt2 -> ModelSpec. Raises ConfigError, UnsupportedModel."""
    hidden_size = config.integer("n_embd", 768)
    num_heads = config.integer("n_head", 12, high=MAX_HEADS)
    head_dim = default_head_dim(config, hidden_size, num_heads)
    max_context = config.integer("n_positions", 1024, high=MAX_CONTEXT)
    config.ignore("n_ctx", "reorder_and_upcast_attn")
    scale = head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_depth = config.flag("scale_attn_by_inverse_layer_idx", False)
    mlp = MlpSpec(
        intermediate_size=config.integer("n_inner", 4 * hidden_size, high=1 << 20),
        activation=config.one_of("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    norm = NormSpec("layer", config.number("layer_norm_epsilon", 1e-5, high=1.0))
    vocab_size = config.integer("vocab_size", 50257, high=MAX_VOCAB)

    def layer(i: int) -> LayerSpec:
        mixer = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=scale / (i + 1) if by_depth else scale,
            rope=None,
            qkv_bias=True,
            out_bias=True,
        )
        return LayerSpec(mixer, mlp, norm)

    return ModelSpec(
        model_type="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_context=max_context,
        layers=tuple(layer(i) for i in range(config.integer("n_layer", 12, high=MAX_LAYERS))),
        final_norm=norm,
        tied_head=config.flag("tie_word_embeddings", True),
        learned_positions=max_context,
        eos_token_ids=config.token_ids("eos_token_id", vocab_size),
        bos_token_id=next(iter(config.token_ids("bos_token_id", vocab_size)), None),
    )


def layer_sources(i: int, layer: LayerSpec) -> dict[str, Source]:
    """Hub names of layer i's weights; Conv1D weights are stored [in, out]."""
    at = f"transformer.h.{i}."
    modules = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    sources = {f"{ours}.weight": Source((f"{at}{hub}.weight",), transpose=True) for ours, hub in modules.items()}
    modules |= {"attn_norm": "ln_1", "mlp_norm": "ln_2"}
    sources |= {f"{ours}.weight": Source((f"{at}{modules[ours]}.weight",)) for ours in ("attn_norm", "mlp_norm")}
    return sources | {f"{ours}.bias": Source((f"{at}{hub}.bias",)) for ours, hub in modules.items()}


MODEL_SOURCES = {
    "embed.weight": Source(("transformer.wte.weight",)),
    "positions.weight": Source(("transformer.wpe.weight",)),
    "final_norm.weight": Source(("transformer.ln_f.weight",)),
    "final_norm.bias": Source(("transformer.ln_f.bias",)),
    "head.weight": Source(("lm_head.weight",)),
}

FAMILY = Family(
    model_type="gpt2",
    read_spec=read_spec,
    model_sources=MODEL_SOURCES,
    layer_sources=layer_sources,
    prefixes=("transformer.", ""),
    ignored=(r".*\.attn\.(masked_)?bias",),
)
