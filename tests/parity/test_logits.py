"""Logits equal transformers' at every position, for every family, variant of config, backend and way of running."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig
from transformers.models.gemma3 import modeling_gemma3

from handloom.cache.batch import Work
from handloom.model.families import read_config
from parity_checks import BACKENDS, Pair, assert_logits_equal, hf_logits, load_pair, our_logits, run
from tiny_models import TINY, VOCAB_SIZE, edit_json, random_ids, save

LENGTH = 61

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What the tiny models of tiny_models.py have by default is the first case of each family.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama mqa": ("llama", {"num_key_value_heads": 1}),
    "llama mha": ("llama", {"num_key_value_heads": 6}),
    "llama default head_dim": ("llama", {"head_dim": None, "num_attention_heads": 4}),
    "llama odd sizes": ("llama", {"hidden_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10,
                                  "intermediate_size": 67, "vocab_size": 259, "num_hidden_layers": 1}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama attention_bias": ("llama", {"attention_bias": True}),
    "llama mlp_bias": ("llama", {"mlp_bias": True}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama large eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama gelu": ("llama", {"hidden_act": "gelu"}),
    "llama relu": ("llama", {"hidden_act": "relu"}),
    "gpt2": ("gpt2", {}),
    "gpt2 scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2 unscaled, by layer": ("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2 n_inner": ("gpt2", {"n_inner": 71}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 gelu": ("gpt2", {"activation_function": "gelu"}),
    "gpt2 large eps": ("gpt2", {"layer_norm_epsilon": 0.1}),
    "gemma3": ("gemma3_text", {}),
    "gemma3 mqa": ("gemma3_text", {"num_key_value_heads": 1}),
    "gemma3 window 1": ("gemma3_text", {"sliding_window": 1}),
    "gemma3 window 16": ("gemma3_text", {"sliding_window": 16}),
    "gemma3 window past the prompt": ("gemma3_text", {"sliding_window": 100}),
    "gemma3 every layer full": ("gemma3_text", {"sliding_window_pattern": 1}),
    "gemma3 layer_types": ("gemma3_text", {"num_hidden_layers": 4, "layer_types": [
        "full_attention", "sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma3 attention_bias": ("gemma3_text", {"attention_bias": True}),
    "gemma3 untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "gemma3 large eps": ("gemma3_text", {"rms_norm_eps": 0.1}),
    "gemma3 final softcap": ("gemma3_text", {"final_logit_softcapping": 2.0}),
    "gemma3 attention softcap": ("gemma3_text", {"attn_logit_softcapping": 1.5}),
    "gemma3 silu": ("gemma3_text", {"hidden_activation": "silu"}),
    "gemma3 thetas": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}),
    "gemma3 scaled sliding rope": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 2000.0},
        "sliding_attention": {"rope_type": "linear", "rope_theta": 30.0, "factor": 2.0}}}),
}  # fmt: skip


def check_everywhere(pair: Pair, seed: int = 0, length: int = LENGTH, **how: Any) -> None:
    """Every backend, in one go, in chunks and token by token, against one forward pass of transformers."""
    ids = random_ids(seed, length, pair.hf.config.vocab_size)
    theirs = hf_logits(pair.hf, ids)
    chunks = random.Random(seed).choices((1, 2, 3, 7, 16, 17), k=length)
    for backend in BACKENDS:
        lm = pair.lm(backend=backend, **how)
        assert_logits_equal(our_logits(lm, ids), theirs, f"{backend}, in one go")
        assert_logits_equal(our_logits(lm, ids, chunks), theirs, f"{backend}, in chunks of {chunks}")
        assert_logits_equal(our_logits(lm, ids, [length // 2] + [1] * length), theirs, f"{backend}, decode")


@pytest.fixture
def softcap_reaches_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' Gemma 3 hand attn_logit_softcapping to its own eager attention, as its Gemma 2 does.

    Up to 5.23 it reads the field, has the formula, and does not connect the two.
    """
    eager = modeling_gemma3.eager_attention_forward

    def with_softcap(module: Any, *args: Any, **kwargs: Any) -> Any:
        return eager(module, *args, softcap=module.attn_logit_softcapping, **kwargs)

    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", with_softcap)


@pytest.mark.usefixtures("softcap_reaches_attention")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_each_variant(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    folder = save(TINY[family](3, **overrides), tmp_path, tokenizer=False)
    check_everywhere(load_pair(folder, attention="eager" if "softcap" in variant else "sdpa"))


def random_overrides(family: str, seed: int) -> dict[str, Any]:
    """A config drawn from `seed`: sizes, heads, biases, ropes, windows, all at once; attention softcap if odd."""
    draw = random.Random(f"{family} {seed}")
    heads = draw.choice((1, 2, 3, 4, 6))
    common = {"vocab_size": draw.choice((17, 128, 331)), "tie_word_embeddings": draw.random() < 0.5}
    if family == "gpt2":
        return common | {
            "n_embd": heads * draw.choice((5, 8, 13)),
            "n_head": heads,
            "n_layer": draw.randint(1, 4),
            "n_inner": draw.choice((None, 33, 100)),
            "scale_attn_weights": draw.random() < 0.7,
            "scale_attn_by_inverse_layer_idx": draw.random() < 0.3,
            "activation_function": draw.choice(("gelu_new", "gelu", "relu", "silu")),
            "layer_norm_epsilon": draw.choice((1e-6, 1e-5, 1e-2)),
        }
    common |= {
        "hidden_size": heads * draw.choice((4, 9, 16)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([k for k in range(1, heads + 1) if heads % k == 0]),
        "head_dim": draw.choice((2, 6, 16, 22)),
        "intermediate_size": draw.choice((31, 64, 130)),
        "num_hidden_layers": draw.randint(1, 5),
        "rms_norm_eps": draw.choice((1e-6, 1e-5, 1e-2)),
        "attention_bias": draw.random() < 0.4,
    }
    if family == "llama":
        rope = draw.choice((LINEAR, LLAMA3, {"rope_type": "default", "rope_theta": draw.choice((50.0, 1e4, 5e5))}))
        return common | {"rope_parameters": dict(rope), "mlp_bias": draw.random() < 0.4}
    scaling = draw.choice(({"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0}))
    return common | {
        "sliding_window": draw.randint(1, 40),
        "sliding_window_pattern": draw.randint(1, 4),
        "query_pre_attn_scalar": draw.choice((8, 33, 256)),
        "final_logit_softcapping": draw.choice((None, 3.0)),
        "attn_logit_softcapping": (None, 2.0)[seed % 2],
        "rope_parameters": {
            "full_attention": scaling | {"rope_theta": draw.choice((1e3, 1e6))},
            "sliding_attention": {"rope_type": "default", "rope_theta": draw.choice((20.0, 1e4))},
        },
    }


@pytest.mark.usefixtures("softcap_reaches_attention")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", sorted(TINY))
def test_logits_of_random_configs(family: str, seed: int, tmp_path: Path) -> None:
    overrides = random_overrides(family, seed)
    folder = save(TINY[family](seed, **overrides), tmp_path, tokenizer=False)
    check_everywhere(load_pair(folder, attention="eager" if seed % 2 else "sdpa"), seed, length=LENGTH - seed)


def test_logits_of_a_ragged_batch_equal_each_prompt_alone(pair: Pair) -> None:
    prompts = [random_ids(i, length) for i, length in enumerate((1, 33, 2, 16, 17, 40))]
    for backend in BACKENDS:
        lm = pair.lm(backend=backend)
        sequences = [lm.sequence(ids) for ids in prompts]
        prefill = run(lm, [Work(s, len(s), "all") for s in sequences]).split([len(ids) for ids in prompts])
        for sequence in sequences:
            sequence.append(7)
        decode = run(lm, [Work(s, 1, "last") for s in sequences])
        for ids, first, last in zip(prompts, prefill, decode, strict=True):
            assert_logits_equal(torch.cat((first, last[None])), hf_logits(pair.hf, [*ids, 7]), backend)


def test_logits_past_the_trained_context(tiny_pair: Callable[..., Pair]) -> None:
    """Rotary models go on past max_position_embeddings where max_context allows it, as transformers does."""
    for family in ("llama", "gemma3_text"):
        pair = tiny_pair(family, max_position_embeddings=32)
        ids = random_ids(5, 90)
        assert_logits_equal(our_logits(pair.lm(max_context=90), ids, [32, 1, 20]), hf_logits(pair.hf, ids), family)


def test_live_sequence_logits_equal_the_forward_pass(pair: Pair) -> None:
    ids = random_ids(8, 40)
    theirs = hf_logits(pair.hf, ids)
    with pair.lm().sequence(ids[:30]) as sequence:
        assert_logits_equal(sequence.logits[None], theirs[29:30])
        for at, token_id in enumerate(ids[30:], 30):
            sequence.append(token_id)
            assert_logits_equal(sequence.logits[None], theirs[at : at + 1])
        sequence.rewind(25)
        assert_logits_equal(sequence.logits[None], theirs[14:15])
        with sequence.fork() as branch:
            branch.append(ids[15:25])
            sequence.append([9, 9])
            assert_logits_equal(branch.logits[None], theirs[24:25])
        assert_logits_equal(sequence.logits[None], hf_logits(pair.hf, [*ids[:15], 9, 9])[-1:])


# How checkpoints are written -------------------------------------------------------------------


OLD_KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama rope_theta": ("llama", {"rope_theta": 321.0}),
    "llama rope_scaling null": ("llama", {"rope_theta": 321.0, "rope_scaling": None}),
    "llama linear, type": ("llama", {"rope_theta": 321.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama linear, rope_type": ("llama", {"rope_theta": 321.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama llama3": ("llama", {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    "llama llama3, no original": ("llama", {"max_position_embeddings": 64, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "llama both, rope_scaling empty": ("llama", {"rope_scaling": {}, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 321.0, "factor": 4.0}}),
    "llama no rope keys at all": ("llama", {}),
    "gemma3 thetas and pattern": ("gemma3_text", {
        "rope_theta": 3000.0, "rope_local_base_freq": 30.0, "sliding_window_pattern": 2, "rope_scaling": None}),
    "gemma3 linear": ("gemma3_text", {
        "rope_theta": 3000.0, "rope_local_base_freq": 30.0, "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3 no rope keys at all": ("gemma3_text", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_KEYS)
def test_logits_of_configs_written_before_rope_parameters(case: str, tmp_path: Path) -> None:
    family, keys = OLD_KEYS[case]
    folder = save(TINY[family](4), tmp_path, tokenizer=False)
    own = {"rope_parameters": ..., "layer_types": ..., "_sliding_window_pattern": ..., "sliding_window_pattern": ...}
    edit_json(folder / "config.json", **own | {"dtype": ..., "torch_dtype": "float32"} | keys)
    check_everywhere(load_pair(folder))


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config, Gemma3TextConfig])
def test_an_absent_key_means_what_it_means_to_transformers(config: type[Any]) -> None:
    """The spec of an empty config.json is that of transformers' defaults written out, but for the special tokens."""
    _, written = read_config(config().to_dict(), "defaults")
    _, empty = read_config({"model_type": config.model_type}, "empty")
    assert empty == replace(written, eos_token_ids=(), bos_token_id=None)


@pytest.mark.parametrize("family", sorted(TINY))
def test_logits_of_a_sharded_checkpoint(family: str, tmp_path: Path) -> None:
    folder = save(TINY[family](5), tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check_everywhere(load_pair(folder))


@pytest.mark.parametrize("family", sorted(TINY))
def test_logits_of_a_base_model_checkpoint_without_prefix(family: str, tmp_path: Path) -> None:
    model = TINY[family](6, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=[type(model).__name__])
    pair = load_pair(tmp_path)
    check_everywhere(pair)
    assert_logits_equal(our_logits(pair.lm(), random_ids(1, 9)), hf_logits(model, random_ids(1, 9)))


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_tied_config_whose_file_has_another_head_is_untied(family: str, tmp_path: Path) -> None:
    folder = save(TINY[family](7, tie_word_embeddings=False), tmp_path)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    pair = load_pair(folder)
    assert not torch.equal(pair.hf.get_input_embeddings().weight, pair.hf.get_output_embeddings().weight)
    check_everywhere(pair)


# Half precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", sorted(TINY))
def test_half_precision_errs_no_more_than_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Mean and worst error against float64 are at most 1.5 times those of transformers in the same dtype."""
    ours: dict[str, list[torch.Tensor]] = {backend: [] for backend in BACKENDS}
    theirs = []
    for seed in range(4):
        folder = save(TINY[family](seed).to(dtype), tmp_path / str(seed))
        pair = load_pair(folder, dtype=dtype)
        exact_model = load_pair(folder, dtype=torch.float64).hf
        for prompt in range(3):
            ids = random_ids(prompt, 50)
            exact = hf_logits(exact_model, ids)
            theirs.append((hf_logits(pair.hf, ids).double() - exact).abs())
            for backend, errors in ours.items():
                lm = pair.lm(backend=backend)
                assert lm.dtype == dtype
                errors += [(our_logits(lm, ids, chunks).double() - exact).abs() for chunks in ((), (20, 1, 1, 5))]
    reference = torch.stack(theirs)
    for backend, errors in ours.items():
        error = torch.stack(errors)
        assert error.mean() <= 1.5 * reference.mean(), f"{backend}: {error.mean():.3g}, theirs {reference.mean():.3g}"
        assert error.max() <= 1.5 * reference.max(), f"{backend}: {error.max():.3g}, theirs {reference.max():.3g}"


def test_weights_may_be_loaded_in_another_dtype_than_stored(pair: Pair) -> None:
    lm = pair.lm(dtype="bfloat16")
    assert lm.dtype == torch.bfloat16
    ids = random_ids(2, 30)
    half = load_pair(pair.folder, dtype=torch.bfloat16).hf
    exact = hf_logits(pair.hf, ids)
    theirs = (hf_logits(half, ids).float() - exact).abs().mean()
    assert (our_logits(lm, ids) - exact).abs().mean() <= 1.5 * theirs
    assert lm.spec.vocab_size == VOCAB_SIZE
