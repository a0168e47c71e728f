"""`handloom inspect` and `handloom env`: what they say is true, and neither reads weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import handloom as hl
from handloom import machine
from handloom.checkpoint.folder import FolderCheckpoint
from handloom.cli import app
from handloom.ops.cpu import compiled, reading
from parity_checks import Pair, load_pair
from tiny_chat import save_chat
from tiny_models import save, tiny_gemma3

FAST = 10e9  # bytes per second


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails; bandwidth is a round number."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FolderCheckpoint, "read_into", refuse)
    monkeypatch.setattr(machine, "read_bandwidth", lambda **_: FAST)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(save(tiny_gemma3(), tmp_path_factory.mktemp("gemma")))


@pytest.mark.usefixtures("no_weights")
def test_inspect_counts_what_transformers_and_the_file_have(gemma: Pair) -> None:
    found = json.loads(CliRunner().invoke(app, ["inspect", str(gemma.folder), "--json", "--dtype", "bfloat16"]).stdout)
    config, parameters = gemma.hf.config, sum(weight.numel() for weight in gemma.hf.parameters())
    assert (found["family"], found["layers"], found["parameters"]) == ("gemma3_text", 5, parameters)
    assert (found["hidden_size"], found["vocab_size"]) == (config.hidden_size, config.vocab_size)
    kinds = {kind["attention"]: kind for kind in found["layer_kinds"]}
    for name, kind in (("sliding_attention", "sliding window"), ("full_attention", "full")):
        indices = [i for i, layer_type in enumerate(config.layer_types) if layer_type == name]
        assert (kinds[kind]["count"], kinds[kind]["indices"]) == (len(indices), indices)
    assert kinds["sliding window"]["window"] == config.sliding_window
    with safe_open(gemma.folder / "model.safetensors", "pt") as file:
        assert found["file"]["tensors"] == len(file.keys())
    assert found["file"]["dtypes"] == {"F32": 4 * parameters}
    assert found["held"] == {"dtype": "bfloat16", "bytes": 2 * parameters}
    assert found["kv_bytes_per_token"] == 2 * 5 * 2 * config.num_key_value_heads * config.head_dim
    assert found["decode_limit"]["tokens_per_second"] == FAST / (2 * parameters)  # tied: the head is the embedding


@pytest.mark.usefixtures("no_weights")
def test_inspect_shows_a_table(gemma: Pair) -> None:
    result = CliRunner().invoke(app, ["inspect", str(gemma.folder)])
    assert result.exit_code == 0
    for fact in ("5: 4 sliding window + 1 full", "0–2, 4", "sliding window of 7", "4, 2 for K and V", "10.0 GB/s"):
        assert fact in result.stdout


def test_an_untied_embedding_is_looked_up_and_not_read(tmp_path: Path) -> None:
    pair = load_pair(save_chat(tmp_path))
    weights = sum(weight.numel() for weight in pair.hf.parameters())
    embedding = pair.hf.get_input_embeddings().weight
    per_token = 4 * (weights - embedding.numel() + embedding.shape[1])
    spec = pair.lm().spec
    assert machine.decode_limit(pair.lm(), torch.float32, FAST) == FAST / per_token
    kv = 4 * 3 * 2 * 2 * 14
    assert machine.decode_limit(spec, torch.float32, FAST, context=100) == FAST / (per_token + 100 * kv)


def test_a_window_bounds_the_cache_that_a_token_reads(gemma: Pair) -> None:
    spec, per_layer = gemma.lm().spec, 4 * 2 * 2 * 12
    assert machine.kv_bytes_read(spec, torch.float32, 100) == per_layer * (4 * 7 + 100)


def test_the_measured_bandwidth_is_one_that_memory_can_have() -> None:
    threads = torch.get_num_threads()
    assert 0.5e9 < machine.read_bandwidth(threads=1) < 2e12
    assert torch.get_num_threads() == threads


def test_the_compiled_kernels_read_all_of_a_buffer_and_a_small_one_is_read_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled.compiled_step()
    data = torch.arange(3 * reading.PANEL_BYTES // 4, dtype=torch.float32) % 1000
    total = reading.reader(data)()
    assert total.double().sum() == pytest.approx(data.double().sum().item(), rel=1e-6)
    sizes: list[int] = []

    def noted(part: torch.Tensor) -> Callable[[], torch.Tensor]:
        sizes.append(part.nbytes)
        return reading.reader(part)

    monkeypatch.setattr(machine, "reader", noted)
    assert 0.5e9 < machine.read_bandwidth(nbytes=70 << 20) < 2e12
    assert len(sizes) == 2 and all(size % reading.PANEL_BYTES == 0 for size in sizes)
    assert 69 << 20 <= sum(sizes) <= 70 << 20


def test_env_says_what_there_is_and_what_would_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HANDLOOM_MODEL", str(save_chat(tmp_path)))
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert found["versions"]["handloom"] == hl.__version__
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["backend"]["reason"] and found["device"]["reason"]
    assert (found["hub"]["reachable"], found["hub"]["reason"]) == (False, "offline mode (HF_HUB_OFFLINE)")
    assert found["default_model"] == {
        "name": str(tmp_path),
        "origin": f"the folder {tmp_path} (from HANDLOOM_MODEL)",
    }


@pytest.mark.parametrize("named", [True, False])
def test_env_downloads_nothing_to_find_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool, recwarn: Callable[..., None]
) -> None:
    monkeypatch.setattr("handloom.checkpoint.hub.why_unreachable", lambda *_: None)
    monkeypatch.setattr("handloom.checkpoint.hub.fetch", lambda *_: pytest.fail("a download"))
    monkeypatch.setenv("HANDLOOM_MODEL", "/no/such/folder") if named else monkeypatch.delenv("HANDLOOM_MODEL", False)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert ("/no/such/folder' does not exist" in result.stdout) is named
    assert ("to be downloaded from" in result.stdout) is not named
