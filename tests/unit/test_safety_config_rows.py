"""Hostile configs, through LM: a typed error that names the key, the value's limit and the way out, before anything is
allocated or imported. Each test is named after its row of the list of bad input."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from handloom.errors import (
    CheckpointError,
    ConfigError,
    OutOfMemory,
    UnsafeCheckpoint,
    UnsupportedModel,
)
from handloom.lm import LM
from tiny_models import TINY, edit_json, save, tiny_llama

GOOD = [5, 6, 7]
FEW = 100_000  # numbers a refused model may allocate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small llama checkpoint to be made hostile."""
    return save(tiny_llama(num_hidden_layers=1), tmp_path)


@pytest.fixture
def no_big_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty refuses to make a big tensor: what must be refused has to be refused before."""
    empty = torch.empty

    def guarded(*size: Any, **how: Any) -> torch.Tensor:
        shape = size[0] if size and not isinstance(size[0], int) else size
        assert math.prod(shape) <= FEW, f"allocated {list(shape)} before looking"
        return empty(*size, **how)

    monkeypatch.setattr(torch, "empty", guarded)


def set_config(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", **changes)


# Rows 1, 2: code named by a config ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize(
    "value", ["kernels-community/flash-attn", "evil/kernels:run", {"": "evil/kernels"}, ["sdpa"], 1, "paged|evil/x"]
)
def test_row1_a_kernel_repository_in_the_config_is_refused(
    folder: Path, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(folder, **{key: value})
    loader = ModuleType("kernels")
    for name in ("get_kernel", "get_local_kernel", "get_locked_kernel", "load_kernel"):
        setattr(loader, name, lambda *_: pytest.fail("a kernel was asked for"))
    monkeypatch.setitem(sys.modules, "kernels", loader)
    with pytest.raises(UnsafeCheckpoint, match=f"{key}=.*never loads kernels named by a checkpoint"):
        LM.from_pretrained(folder)


@pytest.mark.parametrize("value", ["eager", "sdpa", "flash_attention_2", None])
def test_row1_names_of_transformers_own_implementations_change_nothing(folder: Path, value: str | None) -> None:
    expected = LM.from_pretrained(folder).generate(GOOD, max_new_tokens=5).token_ids
    set_config(folder, _attn_implementation=value)
    assert LM.from_pretrained(folder).generate(GOOD, max_new_tokens=5).token_ids == expected


def test_row2_code_beside_a_checkpoint_is_never_imported(folder: Path, tmp_path_factory: Any) -> None:
    marker = tmp_path_factory.mktemp("marker") / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Config")
    set_config(folder, auto_map=auto_map)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Config", "evil.Config"]})
    lm = LM.from_pretrained(folder)
    assert len(lm.generate("hello", max_new_tokens=3, min_new_tokens=3).token_ids) == 3
    set_config(folder, model_type="evil")
    with pytest.raises(UnsupportedModel, match=r"model_type 'evil' is not one of .*auto_map.* is never run"):
        LM.from_pretrained(folder)
    assert not marker.exists()
    assert "evil" not in sys.modules


def test_row2_trust_remote_code_in_a_config_is_not_obeyed(folder: Path) -> None:
    set_config(folder, trust_remote_code=True)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        LM.from_pretrained(folder)


# Row 9: configs ------------------------------------------------------------------------------------

HUGE = 10**400
BAD_VALUES: list[tuple[str, Any]] = [
    *[("num_attention_heads", v) for v in (0, -1, 10**9, 1.5, "8", True, [6], HUGE, 5)],
    *[("num_key_value_heads", v) for v in (0, 4, -6, HUGE)],
    *[("head_dim", v) for v in (0, 3, -2, 10**9)],
    *[("num_hidden_layers", v) for v in (0, -1, 10**9, HUGE, "1")],
    *[("hidden_size", v) for v in (0, 2**31, 2**63, 47)],
    *[("vocab_size", v) for v in (0, 2**40, HUGE)],
    *[("intermediate_size", v) for v in (0, 2**40)],
    *[("max_position_embeddings", v) for v in (0, -1, 10**18, 2.5)],
    *[("rms_norm_eps", v) for v in (0, -1, 1e9, "x", HUGE)],
    *[("hidden_act", v) for v in ("exec", 7, "silu\x00", "x" * 10_000)],
    *[("tie_word_embeddings", v) for v in (1, "yes")],
    *[("eos_token_id", v) for v in ("x", 1.5, [0, "x"], {"a": 1})],
    *[("rope_parameters", v) for v in ("x", [1], {"rope_type": "yarn", "factor": 4.0}, {"rope_type": 5})],
    *[("rope_parameters", {"rope_type": "default", "rope_theta": v}) for v in (0, -1e4, HUGE, "nan", True)],
    *[("rope_parameters", {"rope_type": "linear", "factor": v}) for v in (0, -2, HUGE, None)],
    (
        "rope_parameters",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
    ),
]


@pytest.mark.usefixtures("no_big_tensor")
@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=lambda v: str(v)[:40])
def test_row9_a_value_out_of_bounds_is_named_with_its_limit_before_anything_is_allocated(
    folder: Path, key: str, value: Any
) -> None:
    set_config(folder, **{key: value})
    with pytest.raises(ConfigError) as caught:
        LM.from_pretrained(folder)
    message = str(caught.value)
    assert key in message
    assert len(message) < 500


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_row9_numbers_that_are_none_are_refused_in_the_file(folder: Path, value: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = "HERE"
    (folder / "config.json").write_text(json.dumps(config).replace('"HERE"', value))
    with pytest.raises(ConfigError, match=r"config\.json"):
        LM.from_pretrained(folder)


@pytest.mark.usefixtures("no_big_tensor")
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**18, "num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 1024},
        {"vocab_size": 2**22},
        {"intermediate_size": 2**20},
        {"hidden_size": 96},
    ],
)
def test_row9_sizes_within_bounds_that_the_weights_do_not_have_are_refused_before_allocation(
    folder: Path, changes: dict[str, int]
) -> None:
    set_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"tensor .* has shape \[.*\]; its config\.json calls for \["):
        LM.from_pretrained(folder)


@pytest.mark.usefixtures("no_big_tensor")
@pytest.mark.parametrize("layers", [2, 1024])
def test_row9_layers_that_the_weights_do_not_have_are_named(folder: Path, layers: int) -> None:
    set_config(folder, num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1.* missing, which its config\.json calls for"):
        LM.from_pretrained(folder)


def test_row9_more_memory_than_there_is_is_refused_with_the_estimate(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutOfMemory, match=r"KV cache for 1000000000000 tokens takes \d+\.\d\d GiB \(224 bytes per"):
        LM.from_pretrained(folder, kv_cache_tokens=10**12)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(OutOfMemory, match=r"the weights take 0\.00 GiB in torch\.float32, and 0\.00 GiB are free"):
        LM.from_pretrained(folder)


def test_row9_a_context_of_2_to_the_27_costs_nothing_by_itself(folder: Path) -> None:
    set_config(folder, max_position_embeddings=2**27)
    before = psutil.Process().memory_info().rss
    lm = LM.from_pretrained(folder)
    assert len(lm.generate(GOOD, max_new_tokens=3, min_new_tokens=3).token_ids) == 3
    assert psutil.Process().memory_info().rss - before < 100 << 20


@pytest.mark.parametrize(("family", "key"), [("llama", "qk_layernorm"), ("gpt2", "rotary_dim"), ("gemma3_text", "moe")])
def test_row9_an_unknown_key_is_refused_by_name_with_the_way_out(tmp_path: Path, family: str, key: str) -> None:
    folder = save(TINY[family](), tmp_path)
    expected = LM.from_pretrained(folder).generate(GOOD, max_new_tokens=5).token_ids
    set_config(folder, **{key: 2})
    with pytest.raises(ConfigError, match=rf"{key}=2 is not understood.*ignore_config_keys=\['{key}'\]"):
        LM.from_pretrained(folder)
    lm = LM.from_pretrained(folder, ignore_config_keys=[key])
    assert lm.generate(GOOD, max_new_tokens=5).token_ids == expected


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "default", "mscale": 2}),
        ("gemma3_text", {"full_attention": {"rope_type": "default", "mscale": 2}}),
    ],
)
def test_row9_the_way_out_works_for_nested_keys_too(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    folder = save(TINY[family](), tmp_path)
    set_config(folder, rope_parameters=rope)
    with pytest.raises(ConfigError, match=r"rope_parameters.*mscale=2 .*ignore_config_keys=\['mscale'\]"):
        LM.from_pretrained(folder)
    LM.from_pretrained(folder, ignore_config_keys=["mscale"])
