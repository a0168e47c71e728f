"""Whatever a config.json says, reading it gives a sound spec or a HandloomError, quickly and in little memory."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from handloom.errors import HandloomError
from handloom.model.families import FAMILIES, read_config
from handloom.model.families.config import INERT, INERT_AT
from handloom.model.spec import ModelSpec, kv_values_per_token, model_parameters, num_parameters
from tiny_models import TINY

SECONDS, MEGABYTES = 2.0, 64
KEYS = """
hidden_size num_attention_heads num_key_value_heads head_dim max_position_embeddings rope_scaling rope_parameters
rope_theta attention_bias intermediate_size hidden_act mlp_bias rms_norm_eps vocab_size num_hidden_layers
tie_word_embeddings eos_token_id bos_token_id n_embd n_head n_positions n_inner n_layer activation_function
layer_norm_epsilon scale_attn_weights scale_attn_by_inverse_layer_idx rope_local_base_freq layer_types sliding_window
sliding_window_pattern use_bidirectional_attention query_pre_attn_scalar attn_logit_softcapping hidden_activation
final_logit_softcapping _attn_implementation auto_map quantization_config is_encoder_decoder pruned_heads torch_dtype
""".split()
ROPE_KEYS = "rope_type type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings".split()

EDGES = (0, 1, -1, 3, 2**17, 2**18, 2**18 + 1, 2**22, 2**27, 2**31, 2**63, -(2**63), 10**9, 10**400)
NASTY: list[Any] = [
    *EDGES,
    *(0.0, 1.0, 0.5, -1.5, 1e-320, 1e12, 1e300, float("inf"), float("-inf"), float("nan")),
    *(
        None,
        True,
        False,
        "",
        "1",
        "x" * 10_000,
        "\ud800",
        [],
        [1],
        [None] * 3,
        {},
        {"": {"": {}}},
        ["full_attention"] * 5,
    ),
]
integers = st.integers(-3, 300) | st.sampled_from(EDGES)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(),
    st.sampled_from(("silu", "gelu_new", "default", "linear", "llama3", "sdpa", "evil/kernel", "full_attention")),
    st.text(max_size=20),
)
ropes = st.dictionaries(st.sampled_from(ROPE_KEYS) | st.text(max_size=5), scalars, max_size=7)
values = st.one_of(
    scalars,
    ropes,
    st.dictionaries(st.sampled_from(("full_attention", "sliding_attention")), ropes | scalars),
    st.lists(scalars, max_size=6),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=8),
)


def good(family: str) -> dict[str, Any]:
    """The config.json of a tiny model."""
    config: dict[str, Any] = TINY[family]().config.to_diff_dict()
    return config


GOOD = {family: good(family) for family in FAMILIES}
FOREIGN = {family: {key for other in GOOD.values() for key in other} - GOOD[family].keys() for family in GOOD}


def read(config: dict[str, Any]) -> ModelSpec | None:
    """The spec or None for a typed error; anything else, or more time or memory than a config deserves, fails."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        _, spec = read_config(config, "config.json")
        num_parameters(spec)
    except HandloomError as error:
        assert len(str(error)) < 2000
        spec = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.perf_counter() - started < SECONDS
    assert peak < MEGABYTES << 20
    return spec


def sound(spec: ModelSpec) -> None:
    """What the forward pass takes for granted."""
    assert spec.layers
    assert all(0 <= token_id < spec.vocab_size for token_id in spec.eos_token_ids)
    assert kv_values_per_token(spec) > 0
    assert all(size > 0 for parameter in model_parameters(spec).values() for size in parameter.shape)
    for layer in spec.layers:
        mixer = layer.mixer
        assert mixer.num_heads % mixer.num_kv_heads == 0
        assert 0 < mixer.scale < float("inf")
        assert mixer.window is None or mixer.window > 0
        assert layer.norm.eps > 0
        if mixer.rope is not None:
            assert mixer.rope.rotary_dim % 2 == 0
            assert 0 < mixer.rope.theta < float("inf")
            assert 0 < mixer.rope.factor < float("inf")


def test_the_unchanged_configs_are_good() -> None:
    for config in GOOD.values():
        spec = read(config)
        assert spec is not None
        sound(spec)


@pytest.mark.parametrize("family", sorted(GOOD))
def test_row9_every_key_with_every_nasty_value(family: str) -> None:
    """Also inside the rope parameters, which older files call rope_scaling."""
    config = GOOD[family]
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for value in NASTY:
        changed = [{key: value} for key in {*KEYS, *config} - {"model_type"}]
        changed += [{"rope_parameters": None, "rope_scaling": rope | {key: value}} for key in ROPE_KEYS]
        for change in changed:
            try:
                _, spec = read_config(config | change, "config.json")
            except HandloomError as error:
                assert len(str(error)) < 2000
            else:
                sound(spec)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_row9_a_changed_config_gives_a_sound_spec_or_a_typed_error(data: st.DataObject) -> None:
    """One to three keys changed: with more, the first bad one would hide all others."""
    family = data.draw(st.sampled_from(sorted(GOOD)))
    keys = st.sampled_from([key for key in KEYS if key in GOOD[family] or key not in FOREIGN[family]])
    changed = data.draw(st.dictionaries(keys, integers | values, min_size=1, max_size=3))
    spec = read(GOOD[family] | changed)
    if spec is not None:
        sound(spec)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(config=st.dictionaries(st.sampled_from([*KEYS, "model_type"]) | st.text(max_size=12), values, max_size=12))
def test_row9_any_dict_at_all_gives_a_sound_spec_or_a_typed_error(config: dict[str, Any]) -> None:
    spec = read(config)
    if spec is not None:
        sound(spec)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(family=st.sampled_from(sorted(GOOD)), key=st.text(min_size=1, max_size=12), value=values)
def test_row9_a_key_that_nobody_knows_is_never_read_over(family: str, key: str, value: Any) -> None:
    """null and false say that a feature is absent; everything else needs somebody who understands it."""
    assume(key not in KEYS and value is not None and value is not False)
    assume(key not in GOOD[family])
    spec = read(GOOD[family] | {key: value})
    assert spec is None or key in INERT or key in INERT_AT


@pytest.mark.parametrize("family", sorted(GOOD))
def test_row9_the_biggest_config_within_bounds_is_read_quickly(family: str) -> None:
    biggest = {
        "llama": {"num_hidden_layers": 1024, "hidden_size": 2**18, "num_attention_heads": 8, "vocab_size": 2**22},
        "gpt2": {"n_layer": 1024, "n_embd": 2**18, "n_positions": 2**27},
        "gemma3_text": {"num_hidden_layers": 1024, "layer_types": None, "hidden_size": 2**18, "vocab_size": 2**22},
    }[family]
    assert read(GOOD[family] | biggest) is not None
