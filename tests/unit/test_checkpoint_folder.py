"""Model folders: what transformers wrote is read back exactly; what is hostile is refused by name."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import handloom
from handloom.checkpoint.folder import MAX_CONFIG_BYTES, FolderCheckpoint
from handloom.errors import CheckpointError, ConfigError, UnsafeCheckpoint
from tiny_tokenizers import byte_bpe, wrap

INDEX = "model.safetensors.index.json"


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def folder_of(root: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A minimal folder: config.json and one weight file."""
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file(tensors or {"w": torch.ones(2)}, root / "model.safetensors")
    return root


def sharded(root: Path, weight_map: object, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text("{}")
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, tensors in shards.items():
        (root / name).parent.mkdir(exist_ok=True)
        save_file(tensors, root / name)
    return root


@pytest.mark.parametrize("shard_size", ["1GB", "8KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_written_by_transformers_is_read_exactly(tmp_path: Path, shard_size: str, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "8KB")

    checkpoint = FolderCheckpoint.open(tmp_path, "tiny")
    expected = model.state_dict()
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        out = torch.empty_like(tensor)
        checkpoint.read_into(name, out)
        assert torch.equal(out, tensor), name
    assert checkpoint.dtype == dtype
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config == json.loads((tmp_path / "generation_config.json").read_text())
    assert checkpoint.tokenizer() is None
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        checkpoint.read_into("absent", torch.empty(1))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read_into("lm_head.weight", torch.empty(61, 24))


def test_the_tokenizer_of_the_folder_is_given(tmp_path: Path) -> None:
    folder_of(tmp_path)
    theirs = wrap(byte_bpe())
    theirs.save_pretrained(tmp_path)
    ours = FolderCheckpoint.open(tmp_path, "tiny").tokenizer()
    assert ours is not None
    assert ours.encode("Once upon 12 times") == theirs.encode("Once upon 12 times")


def test_dtype_is_that_of_the_config_else_that_of_most_numbers(tmp_path: Path) -> None:
    mixed = {"a": torch.ones(10, dtype=torch.bfloat16), "b": torch.ones(3), "c": torch.ones(3), "n": torch.arange(99)}
    for config, expected in [
        ({}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32", "torch_dtype": "float16"}, torch.float32),
        ({"dtype": "torch.float64"}, torch.float64),
    ]:
        assert FolderCheckpoint.open(folder_of(tmp_path, mixed, **config), "tiny").dtype == expected


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "auto", 3, ["float32"], "os.system"])
def test_an_unknown_dtype_in_the_config_is_refused(tmp_path: Path, dtype: object) -> None:
    with pytest.raises(ConfigError, match=r"dtype .*; known are float64, float32, bfloat16, float16"):
        FolderCheckpoint.open(folder_of(tmp_path, dtype=dtype), "tiny")


def test_weights_without_any_floating_dtype_need_one_in_the_config(tmp_path: Path) -> None:
    quantised = {"w": torch.zeros(4).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"config\.json gives no dtype"):
        FolderCheckpoint.open(folder_of(tmp_path, quantised), "tiny")
    assert FolderCheckpoint.open(folder_of(tmp_path, quantised, dtype="bfloat16"), "tiny").dtype == torch.bfloat16


CONFIGS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{nope", "JSON"),
    "empty": (b"", "JSON"),
    "a list": (b"[1]", "must be a JSON object, is list"),
    "a number": (b"7", "must be a JSON object, is int"),
    "not UTF-8": (b'{"a": "\xff"}', "JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "JSON"),
    "NaN": (b'{"rope_theta": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"rope_theta": -Infinity}', "-Infinity is not a JSON number"),
    "a number without end": (b'{"rope_theta": 1e400}', "1e400 is too big"),
    "an integer of 10000 digits": (b'{"n": ' + b"1" * 10_000 + b"}", "JSON"),
    "nested": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "nested lists": (b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}", "nested too deeply"),
    "the same key twice": (b'{"n": 1, "n": 2}', "'n' is given twice"),
    "half a surrogate pair": (b'{"n": "\\udfff"}', "surrogates not allowed"),
    "too big": (b'{"a": "' + b"x" * MAX_CONFIG_BYTES + b'"}', "more than the 1000000 bytes"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("case", CONFIGS)
def test_damaged_and_hostile_configs_are_refused(tmp_path: Path, case: str, file: str) -> None:
    content, said = CONFIGS[case]
    folder_of(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        FolderCheckpoint.open(tmp_path, "tiny")
    assert file in str(caught.value)
    assert said in str(caught.value)


def test_a_folder_without_config_or_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        FolderCheckpoint.open(tmp_path, "tiny")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        FolderCheckpoint.open(tmp_path, "tiny")


def test_row1_and_row2_nothing_a_config_names_is_imported_or_looked_up(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Model: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (tmp_path / name).write_text(code)
    folder_of(
        tmp_path,
        auto_map={"AutoModelForCausalLM": "modeling_evil.Model", "AutoTokenizer": ["tokenization_evil.Model", None]},
        _attn_implementation="attacker/kernels",
        _attn_implementation_internal="attacker/kernels",
        text_config={"trust_remote_code": True, "auto_map": {"AutoConfig": "configuration_evil.Model"}},
    )
    wrap(byte_bpe()).save_pretrained(tmp_path)
    checkpoint = FolderCheckpoint.open(tmp_path, "tiny")
    checkpoint.read_into("w", torch.empty(2))
    assert checkpoint.tokenizer() is not None
    assert not marker.exists()


def test_row2_and_row3_the_source_never_unpickles_nor_trusts_remote_code() -> None:
    files = sorted(Path(handloom.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                roots = {name.partition(".")[0] for name in names}
                assert not roots & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}, where
                assert not ("load" in names and "torch" in roots), where
            if isinstance(node, ast.Attribute) and node.attr in {"load", "serialization"}:
                assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), where
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, where
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, where


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "model.pkl"])
def test_row3_pickled_weights_are_refused_by_name_with_a_hint(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeCheckpoint) as caught:
        FolderCheckpoint.open(tmp_path, "tiny")
    assert file in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_row3_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "training_args.bin").write_bytes(b"not even a pickle")
    assert FolderCheckpoint.open(tmp_path, "tiny").tensors.keys() == {"w"}


ONE = {"w": torch.ones(2)}


@pytest.mark.parametrize("target", ["../other.safetensors", "a/../../other.safetensors", "..\\other.safetensors"])
def test_row8_an_index_that_climbs_out_is_refused(tmp_path: Path, target: str) -> None:
    save_file(ONE, tmp_path / "other.safetensors")
    root = sharded(tmp_path / "model", {"w": target}, {})
    with pytest.raises(CheckpointError, match="is not a path inside the folder"):
        FolderCheckpoint.open(root, "tiny")


def test_row8_an_absolute_path_in_the_index_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(ONE, other)
    for target in (str(other), f"file:{other}", "C:\\model.safetensors", "a\0.safetensors"):
        root = sharded(tmp_path / "model", {"w": target}, {})
        with pytest.raises(CheckpointError, match="is not a path inside the folder"):
            FolderCheckpoint.open(root, "tiny")


@pytest.mark.parametrize("file", ["a.safetensors", "config.json", "generation_config.json", INDEX])
def test_row8_a_link_out_of_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    root = sharded(tmp_path / "model", {"w": "a.safetensors"}, {"a.safetensors": ONE})
    outside = tmp_path / "outside"
    if (root / file).exists():
        (root / file).rename(outside)
    else:
        outside.write_text("{}")
    (root / file).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        FolderCheckpoint.open(root, "tiny")


def test_row8_links_inside_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    root = sharded(tmp_path / "model", {"w": "sub/a.safetensors"}, {"sub/b.safetensors": ONE})
    (root / "sub/a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "link").symlink_to("model")
    for path in (root, tmp_path / "link"):
        assert FolderCheckpoint.open(path, "tiny").tensors.keys() == {"w"}


def test_row8_links_of_the_hub_cache_are_followed_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    folder_of(snapshot)
    shared = tmp_path / "cache" / "blobs" / "ab" / "abcd"
    for place in (repository / "blobs" / "abcd", shared):
        place.parent.mkdir(parents=True, exist_ok=True)
        (snapshot / "model.safetensors").resolve().rename(place)
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(os.path.relpath(place, snapshot))
        assert FolderCheckpoint.open(snapshot, "tiny").tensors.keys() == {"w"}
    elsewhere = tmp_path / "cache" / "models--org--other" / "blobs" / "abcd"
    elsewhere.parent.mkdir(parents=True)
    shared.rename(elsewhere)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(elsewhere, snapshot))
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        FolderCheckpoint.open(snapshot, "tiny")


def test_row8_a_link_that_goes_round_in_circles_is_refused(tmp_path: Path) -> None:
    root = sharded(tmp_path / "model", {"w": "a.safetensors"}, {})
    (root / "a.safetensors").symlink_to("b.safetensors")
    (root / "b.safetensors").symlink_to("a.safetensors")
    with pytest.raises(CheckpointError, match=r"'a\.safetensors'"):
        FolderCheckpoint.open(root, "tiny")


def test_row8_a_pipe_for_a_file_does_not_hang(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        FolderCheckpoint.open(tmp_path, "tiny")


def test_row8_a_missing_shard_is_refused(tmp_path: Path) -> None:
    root = sharded(tmp_path, {"v": "a.safetensors", "w": "b.safetensors"}, {"a.safetensors": {"v": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"the shard 'b\.safetensors' is missing"):
        FolderCheckpoint.open(root, "tiny")


def test_row8_a_tensor_missing_in_its_shard_is_refused(tmp_path: Path) -> None:
    root = sharded(tmp_path, {"v": "a.safetensors", "w": "a.safetensors"}, {"a.safetensors": {"v": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"tensor 'w' is not in a\.safetensors"):
        FolderCheckpoint.open(root, "tiny")


def test_row8_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    both = {"a.safetensors": ONE, "b.safetensors": ONE | {"v": torch.ones(2)}}
    root = sharded(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"}, both)
    with pytest.raises(CheckpointError, match=r"tensor 'w' is in a\.safetensors and in b\.safetensors"):
        FolderCheckpoint.open(root, "tiny")


def test_a_tensor_the_index_leaves_out_is_still_seen(tmp_path: Path) -> None:
    root = sharded(tmp_path, {"w": "a.safetensors"}, {"a.safetensors": ONE | {"v": torch.ones(2)}})
    assert FolderCheckpoint.open(root, "tiny").tensors.keys() == {"v", "w"}


@pytest.mark.parametrize("weight_map", [{}, [], None, "x", {"w": 3}, {"w": None}, {"w": "a.bin"}, {"w": ""}])
def test_row8_a_malformed_index_is_refused(tmp_path: Path, weight_map: object) -> None:
    root = sharded(tmp_path, weight_map, {"a.safetensors": ONE})
    with pytest.raises(CheckpointError, match=r"weight_map must be|is not the name of"):
        FolderCheckpoint.open(root, "tiny")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"weight_map": {"w": "a", "w": "b"}}', b'{"a":' * 10**5])
def test_row8_a_damaged_index_is_refused(tmp_path: Path, content: bytes) -> None:
    root = sharded(tmp_path, {}, {"a.safetensors": ONE})
    (root / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=INDEX):
        FolderCheckpoint.open(root, "tiny")


def test_row7_a_damaged_shard_is_refused_by_file_and_tensor_and_leaves_no_file_open(tmp_path: Path) -> None:
    root = sharded(
        tmp_path,
        {"v": "a.safetensors", "w": "b.safetensors"},
        {"a.safetensors": {"v": torch.ones(2)}, "b.safetensors": ONE},
    )
    damaged = root / "b.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor 'w'"):
        FolderCheckpoint.open(root, "tiny")
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
