"""Models whose matrices are held quantised: what is kept of a GGUF file, what is made of floats, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Storage
from torch import Tensor
from typer.testing import CliRunner

import handloom as hl
from gguf_files import MIXED, QUANTIZABLE, WIDE, export
from handloom import machine
from handloom.checkpoint import open_checkpoint
from handloom.checkpoint.gguf import GGUFCheckpoint
from handloom.checkpoint.quantization import FORMATS, QuantizedMatrix, QuantizedRows
from handloom.cli import app
from handloom.errors import CheckpointError, InvalidParam, UnsupportedOption
from handloom.model.families import read_config
from handloom.model.loading import load_transformer
from handloom.model.transformer import Transformer
from handloom.ops import choose_backend
from tiny_models import save, tiny_gemma3, tiny_gpt2, tiny_llama

PROMPT = [5, 77, 300, 12, 9, 240, 18, 3]
LEGACY = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def load(path: Path, **options: Any) -> Transformer:
    checkpoint = open_checkpoint(path)
    try:
        family, spec = read_config(checkpoint.config, "config.json")
        backend, cpu = choose_backend(torch.device("cpu"), "torch"), torch.device("cpu")
        return load_transformer(checkpoint, family, spec, backend, **{"dtype": torch.float32, "device": cpu} | options)
    finally:
        checkpoint.close()


def matrices(transformer: Transformer) -> dict[str, QuantizedMatrix]:
    return {name: w for name, w in transformer.weights.items() if isinstance(w, QuantizedMatrix)}


def assert_same_numbers(kept: Transformer, floats: Transformer) -> None:
    for name, expected in floats.weights.items():
        held: Any = kept.weights[name]
        got: Tensor = held.matrix() if isinstance(held, QuantizedMatrix) else held
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("storage", LEGACY)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def test_what_is_kept_of_a_file_are_the_weights_that_it_dequantises_to(tmp_path: Path, make: Any, storage: str) -> None:
    path = export(make(**QUANTIZABLE), tmp_path / "x.gguf", Storage[storage])
    kept = load(path, quantize="keep")
    assert {segment.format.name for matrix in matrices(kept).values() for segment in matrix.segments} == {storage}
    assert_same_numbers(kept, load(path))


def test_a_transposed_family_is_kept_too(tmp_path: Path) -> None:
    path = export(tiny_gpt2(n_embd=64), tmp_path / "x.gguf", Storage.Q5_0)
    kept = load(path, quantize="keep")
    assert len(matrices(kept)) == 1 + 4 * len(kept.spec.layers)
    assert not isinstance(kept.weights["positions.weight"], QuantizedMatrix)
    assert_same_numbers(kept, load(path))


def test_a_stacked_weight_has_a_segment_for_each_run_of_a_format(tmp_path: Path) -> None:
    path = export(tiny_llama(**WIDE), tmp_path / "x.gguf", storages=MIXED)
    kept = load(path, quantize="keep")
    names = {name: [s.format.name for s in matrix.segments] for name, matrix in matrices(kept).items()}
    assert names["layers.1.qkv.weight"] == ["Q4_K", "Q6_K"]
    assert names["layers.1.up.weight"] == ["Q4_K", "Q5_1"]
    assert [len(s) for s in matrices(kept)["layers.1.qkv.weight"].segments] == [256 + 64, 64]
    assert_same_numbers(kept, load(path))


def test_a_weight_with_a_part_that_cannot_be_kept_is_held_in_floats(tmp_path: Path) -> None:
    path = export(tiny_llama(**WIDE), tmp_path / "x.gguf", storages=MIXED | {"attn_v.weight": Storage.Q3_K})
    kept = load(path, quantize="keep")
    assert "layers.0.qkv.weight" not in matrices(kept)
    assert "layers.0.out.weight" in matrices(kept)
    assert_same_numbers(kept, load(path))


def test_a_kept_model_takes_the_bytes_of_its_file(tmp_path: Path) -> None:
    path = export(tiny_llama(**WIDE), tmp_path / "x.gguf", storages=MIXED)
    kept = load(path, quantize="keep")
    in_file = sum(info.nbytes for info in open_checkpoint(path).tensors.values())
    assert sum(w.nbytes for w in kept.weights.values()) < 1.02 * in_file


@pytest.mark.parametrize("name", ["int8", "int8:32", "int4", "int4-sym"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_gemma3], ids=["llama", "gpt2", "gemma3"])
def test_a_quantised_model_computes_with_the_weights_that_its_codes_stand_for(
    tmp_path: Path, make: Any, name: str
) -> None:
    sizes = {"n_embd": 64} if make is tiny_gpt2 else QUANTIZABLE
    path = save(make(**sizes), tmp_path / "model")
    lm = hl.LM.from_pretrained(path, quantize=name, backend="torch")
    assert set(lm.held) == {name if name.startswith("int8") else f"{name}:32", "float32"} | (
        {"int8"} if name.startswith("int4") else set()
    )
    expected = hl.LM.from_pretrained(path, dtype="float32", backend="torch")
    for key, held in matrices(lm.transformer).items():
        expected.transformer.weights[key].copy_(held.matrix())
    assert torch.equal(lm.sequence(PROMPT).logits, expected.sequence(PROMPT).logits)
    assert lm.generate(PROMPT, max_new_tokens=8).token_ids == expected.generate(PROMPT, max_new_tokens=8).token_ids
    points = ["blocks.1.attn.hook_q", "blocks.1.hook_mlp_out", "ln_final.hook_normalized"]
    seen = []
    for model in (lm, expected):
        with model.capture(points) as acts:
            model.score(PROMPT)
        seen.append([acts[point] for point in points])
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


def test_the_embedding_and_the_head_have_eight_bits_where_the_rest_has_four(tmp_path: Path) -> None:
    lm = hl.LM.from_pretrained(save(tiny_llama(**QUANTIZABLE), tmp_path / "model"), quantize="int4", backend="torch")
    formats = {name: held.segments[0].format.name for name, held in matrices(lm.transformer).items()}
    assert {name: f for name, f in formats.items() if f != "int4:32"} == {"embed.weight": "int8", "head.weight": "int8"}


def test_a_gguf_file_may_be_quantised_anew_and_its_floats_are_had_by_asking(tmp_path: Path) -> None:
    path = export(tiny_llama(**QUANTIZABLE), tmp_path / "x.gguf", Storage.Q4_1)
    assert set(hl.LM.from_pretrained(path, quantize="int8", backend="torch").held) == {"int8", "float32"}
    assert set(hl.LM.from_pretrained(path, dtype="bfloat16").held) == {"bfloat16"}


def test_the_decode_limit_counts_the_bytes_that_are_held(tmp_path: Path) -> None:
    lm = hl.LM.from_pretrained(save(tiny_gpt2(), tmp_path / "model"), quantize="int8", backend="torch")
    positions = lm.transformer.weights["positions.weight"]
    read = sum(lm.held.values()) - positions.nbytes + positions[0].nbytes
    assert machine.decode_limit(lm, lm.dtype, 1e9) == 1e9 / read


def test_rows_that_a_group_does_not_divide_are_an_error_that_names_a_way_out(tmp_path: Path) -> None:
    path = save(tiny_llama(**QUANTIZABLE), tmp_path / "model")
    with pytest.raises(InvalidParam, match=r"'int8:64', but rows of embed.weight have 96 columns.* a group of 32"):
        hl.LM.from_pretrained(path, quantize="int8:64", backend="torch")
    with pytest.raises(InvalidParam, match="'int8' takes rows of any length"):
        hl.LM.from_pretrained(save(tiny_llama(), tmp_path / "odd"), quantize="int8:32", backend="torch")


@pytest.mark.parametrize("backend", ["reference"])
def test_a_backend_that_needs_floats_refuses_to_quantise(tmp_path: Path, backend: str) -> None:
    path = save(tiny_llama(), tmp_path / "model")
    with pytest.raises(UnsupportedOption, match=f"quantize='int8' runs on the CPU with .* this is '{backend}'"):
        hl.LM.from_pretrained(path, quantize="int8", backend=backend)


def test_weights_that_are_no_numbers_are_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    path = save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.up_proj.weight has weights that are NaN"):
        hl.LM.from_pretrained(path, quantize="int8", backend="torch")


def test_a_damaged_scale_in_a_file_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    path = export(tiny_llama(**QUANTIZABLE), tmp_path / "x.gguf", Storage.Q8_0)
    checkpoint = GGUFCheckpoint.open(path, "x")
    raw = checkpoint._weights["model.layers.1.mlp.up_proj.weight"].raw
    data = bytearray(path.read_bytes())
    data[raw.start + 34 : raw.start + 36] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'blk\.1.ffn_up.weight', rows 0 to 95: a scale is NaN"):
        load(path, quantize="keep")


def test_a_weight_is_read_only_in_the_format_and_shape_that_the_file_has(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint.open(export(tiny_llama(**QUANTIZABLE), tmp_path / "x.gguf", Storage.Q8_0), "x")
    name = "model.layers.1.mlp.up_proj.weight"
    for format, rows, columns in (("Q4_0", 96, 96), ("Q8_0", 95, 96), ("Q8_0", 96, 64)):
        with pytest.raises(CheckpointError, match="asked to read it into"):
            checkpoint.read_quantized(name, QuantizedRows.empty(FORMATS[format], rows, columns))
    with pytest.raises(CheckpointError, match="transposed"):
        checkpoint.read_quantized(name, QuantizedRows.empty(FORMATS["Q8_0"], 96, 96), transpose=True)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_inspect_says_how_a_file_would_be_held_and_loading_holds_it_so(
    tmp_path: Path, quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda **_: 10e9)
    path = export(tiny_llama(**QUANTIZABLE, vocab_size=352), tmp_path / "x.gguf", Storage.Q5_0)
    options = [] if quantize is None else ["--quantize", quantize]
    found = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json", *options]).stdout)
    lm = hl.LM.from_pretrained(path, quantize=quantize, backend="torch" if quantize else "cpu")
    assert found["held"] == {"dtype": "float32", "bytes": sum(lm.held.values()), "formats": lm.held}
    assert found["decode_limit"]["tokens_per_second"] == machine.decode_limit(lm, torch.float32, 10e9)
