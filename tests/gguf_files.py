"""GGUF files of tiny transformers models, written by the gguf package in the way llama.cpp's converter does it;
and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Storage
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from handloom.checkpoint.gguf import GGUFCheckpoint
from tiny_models import tiny_tokenizer

ARCHITECTURES = {"llama": "llama", "gpt2": "gpt2", "gemma3_text": "gemma3"}
QUANTIZABLE = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 16}
"""Overrides that make every row of a tiny llama or gemma3 a multiple of 32."""


WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 8}
"""Overrides that make every row of a tiny llama a multiple of 256."""
MIXED = {
    "attn_q.weight": Storage.Q4_K,
    "attn_k.weight": Storage.Q4_K,
    "attn_v.weight": Storage.Q6_K,
    "attn_output.weight": Storage.Q5_K,
    "ffn_gate.weight": Storage.Q4_K,
    "ffn_up.weight": Storage.Q5_1,
    "ffn_down.weight": Storage.Q6_K,
    "token_embd.weight": Storage.Q8_0,
}
"""Types by the ends of GGUF names, as files mix them; for `export`."""
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
"""Byte positions of the half-precision scales in a block."""


def random_blocks(name: str, count: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    """Blocks [count, bytes] of random codes, with half-precision scales that are normally distributed."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[Storage[name]][1]), np.uint8)
    for position in HALVES[name]:
        scales = rng.normal(size=(count, 1)) * size
        blocks[:, position : position + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks


def random_matrix(name: str, rows: int, columns: int, seed: int = 0, size: float = 0.1) -> np.ndarray:
    """A matrix [rows, bytes] of random blocks whose weights have about this standard deviation."""
    count = rows * columns // gguf.GGML_QUANT_SIZES[Storage[name]][0]
    found = gguf.dequantize(random_blocks(name, count, seed), Storage[name]).std()
    return random_blocks(name, count, seed, size / found).reshape(rows, -1)


def export(
    model: PreTrainedModel,
    path: Path,
    storage: Storage = Storage.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    storages: Mapping[str, Storage] | None = None,
    tokenizer: bool = True,
) -> Path:
    """Write `model`, its matrices in `storage`; `metadata` are keys to set instead or besides (`...` leaves one out),
    `extra` are more tensors, stored as they are; `storages` gives matrices whose name ends so random blocks."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    keys = {"general.architecture": architecture, "general.name": "tiny"}
    keys |= {f"{architecture}.{key}": value for key, value in architecture_keys(config).items()}
    keys |= tokenizer_keys() if tokenizer else {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.kv_data[0].clear()  # the architecture, which the writer sets by itself
    for key, value in (keys | dict(metadata or {})).items():
        if value is not ...:
            add(writer, key, value)
    extra = extra or {}
    for name, value in (tensors_of(model, architecture) | dict(extra)).items():
        random = next((kind for end, kind in (storages or {}).items() if name.endswith(end)), None)
        if random is not None:
            writer.add_tensor(name, random_matrix(random.name, *value.shape, seed=len(name)), raw_dtype=random)
        elif value.ndim == 2 and storage is not Storage.F32 and name not in extra:
            writer.add_tensor(name, gguf.quantize(value, storage), raw_dtype=storage)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a value as the type that llama.cpp's converter would choose, or the smallest that holds it."""
    if type(value) is int:
        (writer.add_uint32 if 0 <= value < 2**32 else writer.add_uint64 if value >= 0 else writer.add_int64)(key, value)
    else:
        kinds = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)


def architecture_keys(config: Any) -> dict[str, Any]:
    """Keys without the architecture's prefix, as `conversion/{llama,gpt2,gemma}.py` of llama.cpp writes them."""
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        return keys | {"feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": 1e-5}
    rope = config.rope_parameters
    keys |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if config.model_type == "llama":
        return keys | {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    return keys | {"attention.sliding_window": config.sliding_window}


def tokenizer_keys() -> dict[str, Any]:
    """Those of `tiny_tokenizer`: a byte-level vocabulary with three control tokens."""
    hf = tiny_tokenizer()
    model = hf.backend_tokenizer
    tokens = sorted(hf.get_vocab(), key=hf.get_vocab().__getitem__)
    merges = json.loads(model.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": hf.eos_token_id,
        "tokenizer.ggml.bos_token_id": hf.bos_token_id,
        "tokenizer.ggml.padding_token_id": hf.pad_token_id,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def tensors_of(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    """The model's weights by GGUF name, changed as llama.cpp's converter changes them. Names are the gguf package's."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        value = weight.detach().to(torch.float32).clone().numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
            heads = model.config.num_attention_heads if ".q_proj" in name else model.config.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + np.float32(1)
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(value)
    return tensors


def open_gguf(path: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint.open(path, "the name")


def read(checkpoint: GGUFCheckpoint, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(checkpoint.tensors[name].shape, float("nan"), dtype=dtype)
    checkpoint.read_into(name, out)
    return out


def by_transformers(path: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that transformers reads from the file for `model`."""
    tensors: dict[str, torch.Tensor] = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    return tensors


def numbers(config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers completes it, without what says nothing about the model."""
    values = AutoConfig.for_model(**config).to_dict()
    return {
        key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version", "dtype")
    }


def without_extras(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a file, less its bookkeeping."""
    return {key: value for key, value in config.items() if key not in ("_model_name_or_path", "unk_token_id")}
