"""The config of a GGUF file is transformers', and what is not understood is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Storage
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gguf_files import QUANTIZABLE, export, numbers, open_gguf, read, without_extras
from handloom.errors import CheckpointError, ConfigError, UnsupportedModel
from tiny_models import TINY, tiny_gemma3, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_config_is_what_transformers_makes_of_the_file(tmp_path: Path, family: str) -> None:
    model = TINY[family](**{"head_dim": 256, "query_pre_attn_scalar": 256} if family == "gemma3_text" else {})
    checkpoint = open_gguf(export(model, tmp_path / "a.gguf"))
    theirs = load_gguf_checkpoint(checkpoint.path)["config"]
    assert numbers(checkpoint.config) == numbers(without_extras(theirs))


def test_the_config_of_gpt2_is_the_models_own(tmp_path: Path) -> None:
    """transformers reads no n_positions from the file, so the model itself is the oracle."""
    model = tiny_gpt2()
    ours = numbers(open_gguf(export(model, tmp_path / "a.gguf")).config)
    own = model.config.to_dict()
    same = {"n_positions", "n_embd", "n_layer", "n_head", "activation_function", "vocab_size", "tie_word_embeddings"}
    assert {key: ours[key] for key in same} == {key: own[key] for key in same}
    assert ours["n_inner"] == 4 * own["n_embd"]
    assert ours["layer_norm_epsilon"] == pytest.approx(own["layer_norm_epsilon"])


def test_generation_config_has_the_token_ids_and_every_end_of_turn(tmp_path: Path) -> None:
    checkpoint = open_gguf(export(tiny_llama(), tmp_path / "a.gguf"))
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}
    more = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 0}
    checkpoint = open_gguf(export(tiny_llama(), tmp_path / "b.gguf", metadata=more))
    assert checkpoint.generation_config["eos_token_id"] == [0, 7]
    assert checkpoint.config["eos_token_id"] == 0


def test_linear_rope_scaling_is_that_of_the_global_layers(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    for make, architecture in ((tiny_llama, "llama"), (tiny_gemma3, "gemma3")):
        path = export(make(), tmp_path / architecture, metadata={f"{architecture}.{k}": v for k, v in linear.items()})
        rope = open_gguf(path).config["rope_parameters"]
        assert rope.get("full_attention", rope) | {"rope_theta": 0} == {
            "rope_type": "linear",
            "factor": 8.0,
            "rope_theta": 0,
        }
        assert rope.get("sliding_attention", {"rope_type": "default"})["rope_type"] == "default"
    path = export(tiny_llama(), tmp_path / "old", metadata={"llama.rope.scale_linear": 4.0})
    assert open_gguf(path).config["rope_parameters"]["factor"] == 4.0


def llama3_divisors(factor: float, theta: float, head_dim: int, low: float = 1.0) -> np.ndarray:
    """`rope_freqs.weight` from the frequencies that transformers computes for llama3 scaling."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognised_from_its_divisors(tmp_path: Path, factor: float) -> None:
    model = tiny_llama(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    path = export(model, tmp_path / "a.gguf", extra={"rope_freqs.weight": llama3_divisors(factor, 500000.0, 64)})
    checkpoint = open_gguf(path)
    assert checkpoint.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": pytest.approx(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in checkpoint.tensors)


def test_other_rope_divisors_are_refused(tmp_path: Path) -> None:
    odd = {
        "another low_freq_factor": llama3_divisors(8.0, 10000.0, 14, low=2.0),
        "another length": np.ones(3, np.float32),
        "zeros": np.zeros(7, np.float32),
        "not numbers": np.full(7, np.nan, np.float32),
    }
    for name, divisors in odd.items():
        path = export(tiny_llama(), tmp_path / name, extra={"rope_freqs.weight": divisors})
        with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
            open_gguf(path)
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight is not supported in a gemma3 model"):
        open_gguf(export(tiny_gemma3(), tmp_path / "g", extra={"rope_freqs.weight": np.ones(6, np.float32)}))


def test_sliding_layers_are_read_as_a_pattern_as_flags_or_absent(tmp_path: Path) -> None:
    key = "gemma3.attention.sliding_window_pattern"

    def layer_types(name: str, **metadata: Any) -> str:
        types = open_gguf(export(tiny_gemma3(), tmp_path / name, metadata=metadata)).config["layer_types"]
        return "".join(kind[0] for kind in types)

    assert layer_types("default") == "sssss"
    assert layer_types("pattern", **{key: 2}) == "sfsfs"
    assert layer_types("flags", **{key: [True, False, False, True, True]}) == "sffss"
    assert layer_types("none", **{"gemma3.attention.sliding_window": ...}) == "fffff"
    with pytest.raises(ConfigError, match=f"'{key}' is .* 5 booleans"):
        layer_types("short", **{key: [True, False]})


def test_27b_has_another_attention_scale(tmp_path: Path) -> None:
    model = tiny_gemma3(num_hidden_layers=62)
    assert open_gguf(export(model, tmp_path / "a.gguf")).config["query_pre_attn_scalar"] == 40 // 4


REFUSED = {
    "other architecture": ({"general.architecture": "qwen2"}, UnsupportedModel, "is 'qwen2'; supported are gemma3"),
    "experts": ({"llama.expert_count": 8}, UnsupportedModel, "'llama.expert_count' is 8; supported: only"),
    "unknown key": ({"llama.logit_scale": 0.5}, UnsupportedModel, "'llama.logit_scale' is 0.5; supported: no value"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, UnsupportedModel, "'llama.rope.scaling.type' is 'yarn'"),
    "partial rope": ({"llama.rope.dimension_count": 7}, UnsupportedModel, "'llama.rope.dimension_count' is 7"),
    "other value width": ({"llama.attention.value_length": 7}, UnsupportedModel, "'llama.attention.value_length' is 7"),
    "heads per layer": ({"llama.attention.head_count": [6, 6, 6]}, ConfigError, "head_count' is .*; expected a pos"),
    "missing key": ({"llama.embedding_length": ...}, ConfigError, "'llama.embedding_length' is missing"),
    "zero": ({"llama.attention.head_count": 0}, ConfigError, "'llama.attention.head_count' is 0"),
    "text": ({"llama.context_length": "long"}, ConfigError, "'llama.context_length' is 'long'"),
    "NaN": ({"llama.rope.freq_base": float("nan")}, ConfigError, "'llama.rope.freq_base' is nan"),
    "10^9 layers": ({"llama.block_count": 10**9}, ConfigError, "'llama.block_count' is 1000000000"),
    "other vocabulary": ({"llama.vocab_size": 330}, ConfigError, "'llama.vocab_size' is 330; expected the 331 rows"),
    "more tokens": ({"tokenizer.ggml.tokens": [str(i) for i in range(400)]}, ConfigError, "has 400 tokens"),
    "eos text": ({"tokenizer.ggml.eos_token_id": "2"}, ConfigError, "'tokenizer.ggml.eos_token_id' is '2'"),
    "fewer layers": ({"llama.block_count": 2}, CheckpointError, r"'blk\.2\..*' is not one that a llama model has"),
    "odd heads": ({"llama.attention.head_count": 5}, CheckpointError, "which do not make 5 heads"),
    "shards": ({"split.count": 3}, CheckpointError, "one of 3 shards .*llama-gguf-split --merge"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_metadata_that_we_do_not_understand_is_refused_by_name(tmp_path: Path, name: str) -> None:
    metadata, error, message = REFUSED[name]
    path = export(tiny_llama(), tmp_path / "a.gguf", metadata=metadata)
    with pytest.raises(error, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_tensors_that_we_do_not_know_are_refused_by_name(tmp_path: Path) -> None:
    vector, cube = np.zeros(48, np.float32), np.zeros((2, 2, 2), np.float32)
    for name in ("blk.0.attn_sinks.weight", "blk.7.attn_q.weight", "blk.00.attn_q.weight", "v.patch_embd.weight", "x"):
        path = export(tiny_llama(), tmp_path / name, extra={name: vector})
        with pytest.raises(CheckpointError, match=f"tensor '{name}' is not one that a llama model has"):
            open_gguf(path)
    path = export(tiny_llama(), tmp_path / "cube", extra={"blk.0.attn_q.bias": cube})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.bias' has shape \(2, 2, 2\) in F32"):
        open_gguf(path)


def test_a_storage_that_we_cannot_read_is_refused_by_name(tmp_path: Path) -> None:
    path = export(tiny_llama(**QUANTIZABLE), tmp_path / "a.gguf", Storage.MXFP4)
    with pytest.raises(CheckpointError, match=r"tensor '.*' is stored as MXFP4; supported are F32, F16, Q4_0"):
        open_gguf(path)


def test_biases_are_announced_in_the_config_and_unpermuted(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    checkpoint = open_gguf(export(model, tmp_path / "a.gguf"))
    assert checkpoint.config["attention_bias"] is checkpoint.config["mlp_bias"] is True
    for name, weight in model.state_dict().items():
        assert torch.equal(read(checkpoint, name), weight), name


def test_a_file_without_tokenizer_opens_and_has_none(tmp_path: Path) -> None:
    checkpoint = open_gguf(export(tiny_llama(), tmp_path / "a.gguf", tokenizer=False))
    assert checkpoint.tokenizer() is None
    assert checkpoint.generation_config == {}


def test_the_tokenizer_is_the_one_in_the_file(tmp_path: Path) -> None:
    from tiny_models import tiny_tokenizer

    checkpoint = open_gguf(export(tiny_llama(), tmp_path / "a.gguf"))
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    text = "Hello, wörld!  12 <|eos|>"
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text)
