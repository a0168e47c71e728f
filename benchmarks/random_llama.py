"""Llamas in the shapes of real models with random weights, made on the device: there may be no network, and speed does
not depend on what the weights say. transformers' model has the very same tensors, so that tokens can be compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import handloom as hl
from handloom.cache.pages import PagePool
from handloom.loading import PAGE_SIZE
from handloom.model.families import read_config
from handloom.model.spec import model_parameters
from handloom.model.transformer import Transformer
from handloom.ops import choose_backend

# hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, tied head
SHAPES = {
    "tiny": (64, 176, 2, 4, 2, 16, 512, True),
    "135m": (576, 1536, 30, 9, 3, 64, 49152, True),  # SmolLM2-135M
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),  # Qwen3-0.6B, without its norms of q and k
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),  # Llama-3.2-1B
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, False),  # Llama-3.1-8B
}


def config_of(shape: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied = SHAPES[shape]
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocabulary,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "hidden_act": "silu",
        "rope_theta": 500000.0,
    }  # fmt: skip


def make(shape: str, dtype: torch.dtype, device: torch.device, backend: str, tokens: int) -> hl.LM:
    """A llama of that shape with weights from a fixed seed, and a KV cache for so many tokens."""
    transformer = make_transformer(shape, dtype, device, backend)
    pool = PagePool(transformer.spec, -(-tokens // PAGE_SIZE), PAGE_SIZE, dtype=dtype, device=device)
    return hl.LM(transformer, None, pool, name=shape)


def make_transformer(shape: str, dtype: torch.dtype, device: torch.device, backend: str) -> Transformer:
    """The same without a KV cache."""
    _, spec = read_config(config_of(shape), shape)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, parameter in model_parameters(spec).items():
        drawn = torch.randn(parameter.shape, generator=generator, device=device, dtype=dtype)
        weights[name] = drawn.mul_(drawn.shape[1] ** -0.5) if drawn.dim() == 2 else drawn.mul_(0.1).add_(1)
    return Transformer(spec, weights, choose_backend(device, backend, {layer.mixer.head_dim for layer in spec.layers}))


def on_backend(lm: hl.LM, backend: str) -> hl.LM:
    """The same weights and KV cache, computed by another backend that reads plain tensors."""
    return hl.LM(Transformer(lm.spec, tensors(lm), choose_backend(lm.device, backend)), None, lm.pool, name=lm.name)


def tensors(lm: hl.LM) -> dict[str, Tensor]:
    """The weights by name. Raises SystemExit where the backend holds them otherwise."""
    held = lm.transformer.weights
    if not all(isinstance(weight, Tensor) for weight in held.values()):
        raise SystemExit(f"backend {lm.backend.name!r} holds weights in a form of its own; peers need plain tensors")
    return {name: weight for name, weight in held.items() if isinstance(weight, Tensor)}


def as_transformers(lm: hl.LM) -> LlamaForCausalLM:
    """transformers' model made of views of handloom's weights: no memory of its own."""
    config = LlamaConfig(
        **{name: value for name, value in config_of(lm.name).items() if name != "model_type"},
        attn_implementation="sdpa",
        dtype=lm.dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    own = tensors(lm)
    state = {"model.embed_tokens.weight": own["embed.weight"], "model.norm.weight": own["final_norm.weight"]}
    state["lm_head.weight"] = own["embed.weight" if lm.spec.tied_head else "head.weight"]
    for i, layer in enumerate(lm.spec.layers):
        mixer, at = layer.mixer, f"model.layers.{i}."
        widths = [heads * mixer.head_dim for heads in (mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads)]
        q, k, v = own[f"layers.{i}.qkv.weight"].split(widths)
        gate, up = own[f"layers.{i}.up.weight"].chunk(2)
        attention = {"q": q, "k": k, "v": v, "o": own[f"layers.{i}.out.weight"]}
        state |= {f"{at}self_attn.{name}_proj.weight": weight for name, weight in attention.items()}
        mlp = {"gate": gate, "up": up, "down": own[f"layers.{i}.down.weight"]}
        state |= {f"{at}mlp.{name}_proj.weight": weight for name, weight in mlp.items()}
        state[f"{at}input_layernorm.weight"] = own[f"layers.{i}.attn_norm.weight"]
        state[f"{at}post_attention_layernorm.weight"] = own[f"layers.{i}.mlp_norm.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(lm.device)  # its table is not among the weights
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()
