"""Tiny random transformers models of every family, saved as the Hub lays a checkpoint out, with a tokenizer beside.

Weights are drawn wide, norms and biases included, so that a forgotten bias, a wrong eps or a norm in the wrong place
moves the logits. Nothing here imports handloom: these are what the tests compare against.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tiny_tokenizers import CORPUS

VOCAB_SIZE = 331
EOS, BOS, PAD = 0, 1, 2


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Llama with GQA (6 heads over 2), a head_dim (14) that is not hidden_size / heads, an untied head."""
    config: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return randomize(LlamaForCausalLM(LlamaConfig(**config | overrides)), seed)


def tiny_gpt2(seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """GPT-2 with 4 heads of 11."""
    config: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "n_positions": 256,
        "n_embd": 44,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return randomize(GPT2LMHeadModel(GPT2Config(**config | overrides)), seed)


def tiny_gemma3(seed: int = 0, **overrides: Any) -> Gemma3ForCausalLM:
    """Gemma 3 text: three sliding layers (window 7) to one full one, five in all, GQA, scale unlike head_dim's."""
    config: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 17,
        "sliding_window": 7,
        "sliding_window_pattern": 4,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    model = randomize(Gemma3ForCausalLM(Gemma3TextConfig(**config | overrides)), seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                weight += 2  # or the scaled embedding outweighs all layers, and every token repeats itself
    return model


TINY = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3_text": tiny_gemma3}


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> Any:
    """The same model in eval mode, every weight drawn anew from `seed`; vectors (norms, biases) keep their mean."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(weight + 0.25 * noise if weight.dim() == 1 else 0.2 * noise)
    model.generation_config.pad_token_id = EOS if model.config.pad_token_id is None else model.config.pad_token_id
    return model.eval()


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly VOCAB_SIZE tokens: eos, bos, pad, bytes, merges. Do not change it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|bos|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    eos, bos, pad = special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=pad)


def save(model: PreTrainedModel, folder: Path, *, tokenizer: bool = True, max_shard_size: str = "5GB") -> Path:
    """Write the model (safetensors, config.json, generation_config.json) and the tiny tokenizer; returns the folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def edit_json(path: Path, **changes: Any) -> None:
    """Set the fields of a JSON file; a field set to `...` is removed."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}, indent=1))


def random_ids(seed: int, length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids without the three special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PAD + 1, vocab_size, (length,), generator=generator).tolist()


def ragged_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """One prompt of random ids per length."""
    return [random_ids(1000 * seed + i, length) for i, length in enumerate(lengths)]
