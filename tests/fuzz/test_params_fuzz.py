"""Whatever a caller or a model's file says: parameters in range, or an error of ours. Nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom.errors import ContextOverflow, InvalidParam, UnsupportedOption
from handloom.sampling import options as names
from handloom.sampling.params import GenerationParams, resolve_params
from handloom.sampling.rules import Row
from handloom.sampling.sampler import choose

OURS = sorted({*GenerationParams.__dataclass_fields__, "max_length", "stop", "generation_config"})
ALL = sorted({*OURS, *names.names_of_transformers()})

ODD_NUMBERS = st.sampled_from(
    [0, -0.0, 1, -1, 50, 2**31, 2**63, 2**64, 10**400, 1e-45, 1e-30, 1e30, 1e39, math.nan, math.inf, -math.inf, 0.5]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), ODD_NUMBERS, st.text(max_size=5), st.binary(max_size=3),
    st.sampled_from(["counter", "torch", "hybrid", "never"]), st.just(print), st.complex_numbers(),
)  # fmt: skip
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.lists(st.integers(0, 60), max_size=3),
    st.lists(st.text(max_size=3), max_size=70),
    st.tuples(SCALARS, SCALARS),
    st.dictionaries(st.sampled_from(ALL), SCALARS, max_size=3),
    st.builds(lambda values: torch.tensor(values), st.lists(st.floats(width=32), max_size=3)),
)
SEEDS = st.integers(0, 2**64 - 1)
PLAUSIBLE = {
    "max_new_tokens": st.integers(1, 60),
    "temperature": st.floats(0, 3),
    "top_k": st.integers(0, 60),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 3),
    "do_sample": st.booleans(),
    "min_new_tokens": st.integers(0, 5),
    "eos_token_id": st.lists(st.integers(0, 49), max_size=3),
    "top_h": st.floats(0.01, 1),
    "typical_p": st.floats(0.01, 1),
    "epsilon_cutoff": st.floats(0, 0.99),
    "eta_cutoff": st.floats(0, 0.99),
    "encoder_repetition_penalty": st.floats(0.1, 3),
    "no_repeat_ngram_size": st.integers(0, 4),
    "encoder_no_repeat_ngram_size": st.integers(0, 4),
    "watermarking_config": st.sampled_from([{}, {"ngram_len": 2, "keys": [5, 6]}]),
    "renormalize_logits": st.booleans(),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 9), st.floats(0.1, 9)),
}
MAPPINGS = st.one_of(
    st.fixed_dictionaries({}, optional={"seed": SEEDS, **PLAUSIBLE}),
    st.dictionaries(st.sampled_from(OURS), VALUES, max_size=4),
    st.dictionaries(st.one_of(st.sampled_from(ALL), st.text(max_size=8)), VALUES, max_size=4),
)


def assert_in_range(params: GenerationParams, prompt_length: int, max_context: int, vocab_size: int) -> None:
    assert 1 <= params.max_new_tokens <= max_context - prompt_length
    assert params.min_new_tokens >= 0 and params.min_length >= 0
    assert type(params.do_sample) is bool
    assert (params.temperature == 0 and not params.do_sample) or 1e-30 <= params.temperature <= 1e30
    assert 0 <= params.top_k < 2**31
    assert 0 < params.top_p <= 1
    assert params.min_p is None or 0 <= params.min_p <= 1
    assert 1e-30 <= params.repetition_penalty <= 1e30
    assert all(type(id_) is int and 0 <= id_ < vocab_size for id_ in params.eos_token_id)
    assert len(params.stop_strings) <= 64 and all(params.stop_strings)
    assert type(params.seed) is int and 0 <= params.seed < 2**64
    assert params.rng in ("counter", "torch")
    for count in (params.logprobs, params.prompt_logprobs):
        assert count is None or 0 <= count <= min(100, vocab_size)
    assert all(callable(each) for each in (*params.logits_processor, *params.stopping_criteria))
    assert params.top_h is None or 0 < params.top_h <= 1
    assert 0 < params.typical_p <= 1
    assert 0 <= params.epsilon_cutoff < 1 and 0 <= params.eta_cutoff < 1
    assert 1e-30 <= params.encoder_repetition_penalty <= 1e30
    assert 0 <= params.no_repeat_ngram_size < 2**31 and 0 <= params.encoder_no_repeat_ngram_size < 2**31
    for ids in (params.suppress_tokens, params.begin_suppress_tokens, params.forced_eos_token_id):
        assert all(type(id_) is int and 0 <= id_ < vocab_size for id_ in ids)
    for sequence in (*params.bad_words_ids, *(sequence for sequence, _ in params.sequence_bias)):
        assert sequence and all(type(id_) is int and 0 <= id_ < vocab_size for id_ in sequence)
    assert all(-1e30 <= bias <= 1e30 or bias == -math.inf for _, bias in params.sequence_bias)
    assert params.prefix_allowed_tokens_fn is None or callable(params.prefix_allowed_tokens_fn)
    assert params.max_time is None or 0 < params.max_time < math.inf
    assert -1e30 <= params.guidance_scale <= 1e30 and 0 <= params.penalty_alpha <= 1
    assert all(type(id_) is int and 0 <= id_ < vocab_size for id_ in params.negative_prompt_ids)
    assert params.penalty_alpha == 0 or (not params.do_sample and 1 <= params.top_k <= 1024)
    assert params.dola_layers in ("low", "high") or all(layer >= 0 for layer in params.dola_layers)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    options=MAPPINGS,
    passed=st.one_of(st.none(), MAPPINGS),
    file=MAPPINGS,
    prompt_length=st.integers(0, 80),
    eos=st.one_of(st.none(), st.integers(-1, 60), st.lists(st.integers(-1, 60), max_size=3)),
)
def test_any_options_give_parameters_in_range_or_an_error_of_ours(options, passed, file, prompt_length, eos):
    if passed is not None:
        options = {**options, "generation_config": passed}
    facts = {"prompt_length": prompt_length, "max_context": 64, "vocab_size": 50}
    try:
        params = resolve_params(options, generation_config=file, eos_token_id=eos, **facts)
    except (InvalidParam, UnsupportedOption, ContextOverflow) as error:
        assert 0 < len(str(error)) < 600
        return
    assert_in_range(params, **facts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(options=st.fixed_dictionaries({"seed": SEEDS}, optional=PLAUSIBLE), data=st.data())
def test_any_parameters_that_resolve_choose_a_token_of_the_vocabulary_or_fail_their_row(options, data):
    tokens: list[Any] = data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=9))
    try:
        params = resolve_params(
            options, generation_config={}, prompt_length=len(tokens), max_context=64, vocab_size=50, eos_token_id=None
        )
    except (InvalidParam, ContextOverflow):
        return
    finite = st.floats(-1e4, 1e4, width=32)
    logits = data.draw(st.lists(st.one_of(finite, st.just(-math.inf), st.just(math.nan)), min_size=50, max_size=50))
    choice = choose(torch.tensor([logits, [0.0] * 50]), [Row(params, tokens, len(tokens))] * 2)
    if choice.errors[0] is None:
        assert 0 <= choice.token_ids[0] < 50
        assert logits[choice.token_ids[0]] > -math.inf
    else:
        assert choice.token_ids[0] == -1
        forbidden = {*(params.eos_token_id if params.min_length > len(tokens) else ())}
        for size in (params.no_repeat_ngram_size, params.encoder_no_repeat_ngram_size):
            ends = range(size - 1, len(tokens)) if size else ()
            last = tokens[len(tokens) - size + 1 :]
            forbidden |= {tokens[end] for end in ends if tokens[end - size + 1 : end] == last}
        assert any(math.isnan(x) for x in logits) or all(
            x == -math.inf for i, x in enumerate(logits) if i not in forbidden
        )
    assert choice.errors[1] is None
