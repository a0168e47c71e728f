"""Hostile weights, prompts and parameters, through LM: a typed error that says what is wrong, nothing
allocated, and the next good request succeeds. Each test is named after its row of the list of bad input."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import all_free, lm_with
from handloom.engine import Engine
from handloom.errors import (
    ContextOverflow,
    HandloomError,
    InvalidParam,
    InvalidPrompt,
    NonFiniteLogits,
    UnsupportedOption,
)
from handloom.lm import LM
from tiny_models import BOS, VOCAB_SIZE, random_ids, save, tiny_llama

GOOD = [5, 6, 7]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small llama checkpoint whose weights are to be made hostile."""
    return save(tiny_llama(num_hidden_layers=1), tmp_path)


@pytest.fixture
def lm() -> Iterator[LM]:
    """A good model, which must still be good, and hold no pages, when the test is over."""
    model = lm_with(60, 4, max_context=64)
    expected = model.generate(GOOD, max_new_tokens=5).token_ids
    yield model
    assert all_free(model)
    assert model.generate(GOOD, max_new_tokens=5).token_ids == expected


# Row 12: numbers that are none in the weights --------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 1, "top_k": 5, "top_p": 0.9}], ids=["greedy", "sampled"]
)
def test_row12_a_bad_row_of_weights_fails_the_sequences_that_meet_it(
    folder: Path, options: dict[str, Any], value: float
) -> None:
    bad = 50
    options = {"max_new_tokens": 6, **options}
    prompts = [[i for i in random_ids(seed, 9) if i != bad] for seed in range(3)]
    expected = [output.token_ids for output in LM.from_pretrained(folder).generate(prompts, **options)]
    assert all(bad not in tokens for tokens in expected)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][bad, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    lm = LM.from_pretrained(folder)
    outputs = lm.generate([[5, bad], *prompts, [bad]], **options)
    assert [output.token_ids for output in outputs[1:-1]] == expected
    for output in (outputs[0], outputs[-1]):
        assert isinstance(output.error, NonFiniteLogits)
        assert "position" in str(output.error)
    with pytest.raises(NonFiniteLogits):
        lm.generate([bad], **options)
    with pytest.raises(NonFiniteLogits):
        lm.score([bad, 5, 6])
    assert lm.generate(prompts[0], **options).token_ids == expected[0]
    assert all_free(lm)


@pytest.mark.parametrize("weight", ["model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_row12_a_model_that_is_all_nan_fails_every_request_and_nothing_else(
    folder: Path, weight: str, value: float
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[weight].fill_(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lm = LM.from_pretrained(folder)
    for options in ({}, {"do_sample": True, "top_k": 0, "seed": 1, "logprobs": 3, "prompt_logprobs": 1}):
        outputs = lm.generate([GOOD, [8]], max_new_tokens=3, **options)
        assert [type(output.error) for output in outputs] == [NonFiniteLogits] * 2
        assert [piece.finish_reason for piece in lm.stream([GOOD, [8]], max_new_tokens=3)] == ["error"] * 2
    assert all_free(lm)


# Row 14: too little, too much -----------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", [[]], torch.empty(0, dtype=torch.int64), np.array([], dtype=np.int64)], ids=repr)
def test_row14_an_empty_prompt_starts_from_bos(lm: LM, empty: Any) -> None:
    output = lm.generate(empty, max_new_tokens=5)
    output = output[0] if isinstance(output, list) else output
    assert output.prompt_token_ids == [BOS]
    assert output.token_ids == lm.generate([BOS], max_new_tokens=5).token_ids


def test_row14_an_empty_prompt_without_bos_is_an_error(tmp_path: Path) -> None:
    folder = save(tiny_llama(num_hidden_layers=1, bos_token_id=None), tmp_path, tokenizer=False)
    lm = LM.from_pretrained(folder)
    with pytest.raises(InvalidPrompt, match="the prompt is empty, and this model has no BOS token"):
        lm.generate([[]], max_new_tokens=5)
    assert len(lm.generate(GOOD, max_new_tokens=5, min_new_tokens=5).token_ids) == 5


def test_row14_no_prompts_are_no_outputs(lm: LM) -> None:
    assert (lm.generate([]), list(lm.stream([])), lm.score([])) == ([], [], [])


def test_row14_a_prompt_beyond_the_context_is_refused_with_the_numbers(lm: LM) -> None:
    for call in (lm.generate, lm.stream, lm.score, lm.sequence):
        with pytest.raises(ContextOverflow, match="the prompt has 65 tokens and the context holds 64"):
            call([5] * 65)
    for length, new in ((64, 1), (60, 5)):
        with pytest.raises(ContextOverflow, match=rf"{length}.*64|64.*{length}"):
            lm.generate([5] * length, max_new_tokens=new)
    assert len(lm.generate([5] * 60, max_new_tokens=4, min_new_tokens=4).token_ids) == 4
    assert len(lm.score([5] * 64).logprobs) == 63


@pytest.mark.parametrize("value", [0, -1, 2**63, 10**400, 1.5, math.nan, "5", True, [3]], ids=lambda v: str(v)[:20])
def test_row14_an_impossible_max_new_tokens_is_refused_with_the_numbers(lm: LM, value: Any) -> None:
    for prompt in (GOOD, "hello"):
        with pytest.raises((InvalidParam, ContextOverflow), match=r"max_new_tokens|context") as caught:
            lm.generate(prompt, max_new_tokens=value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("prompt", [None, 5, 1.5, {}, {"a": 1}, b"bytes", object, {5, 6}, range(0)], ids=repr)
def test_row14_what_is_no_prompt_is_refused_by_its_type(lm: LM, prompt: Any) -> None:
    if prompt == range(0):
        assert lm.generate(prompt, max_new_tokens=1).prompt_token_ids == [BOS]
        return
    for call in (lm.generate, lm.stream, lm.score, lm.sequence):
        with pytest.raises(InvalidPrompt, match=type(prompt).__name__):
            call(prompt)


# Row 15: values that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [-1, VOCAB_SIZE, 2**31, 2**63, 2**64, 10**5000, 1.0, math.nan, True, None, "5", [5]],
    ids=lambda v: "huge" if v == 10**5000 else repr(v),
)
def test_row15_a_token_id_outside_the_vocabulary_is_refused_by_its_place(lm: LM, bad: Any) -> None:
    for call in (lm.generate, lm.stream, lm.score):
        with pytest.raises(InvalidPrompt, match="token 2 of the prompt"):
            call([[5, 6, bad]])
    with pytest.raises(InvalidPrompt, match="token 2 of the prompt"):
        lm.sequence([5, 6, bad])


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([5, VOCAB_SIZE]),
        torch.tensor([5, -1]),
        torch.tensor([5.0, 6.0]),
        torch.tensor([True]),
        torch.tensor([1j]),
        torch.tensor([[5, VOCAB_SIZE]]),
        torch.tensor([[[5, 6]]]),
        torch.tensor(5),
        torch.tensor([5, 6]).to_sparse(),
        np.array([5, VOCAB_SIZE]),
        np.array([-1], dtype=np.int8),
        np.array([5.0]),
        np.array(["5"]),
        np.array([5, 6], dtype=object),
        np.array([[5, VOCAB_SIZE]]),
        np.array([[[5, 6]]]),
        np.ma.masked_array([5, 6], [False, True]),
        torch.nested.nested_tensor([torch.tensor([5]), torch.tensor([5, 6])], layout=torch.jagged),
    ],
    ids=lambda v: f"{type(v).__name__} {v.dtype} {'nested' if getattr(v, 'is_nested', False) else tuple(v.shape)}",
)
def test_row15_arrays_of_ids_are_checked_like_lists(lm: LM, bad: Any) -> None:
    for call in (lm.generate, lm.sequence, lm.score):
        with pytest.raises(InvalidPrompt):
            call(bad)


@pytest.mark.parametrize("batch", [torch.tensor([[5, 6]]), np.array([[5, 6]])], ids=["tensor", "array"])
def test_row15_a_batch_is_no_single_prompt(lm: LM, batch: Any) -> None:
    for call in (lm.sequence, lm.score):
        with pytest.raises(InvalidPrompt):
            call(batch)


class Unread(Sequence[int]):
    """Very many ids, none of which may be looked at."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, at: Any) -> Any:
        raise AssertionError("an id was looked at")


def test_row14_a_prompt_far_longer_than_the_context_is_refused_by_its_length(lm: LM) -> None:
    for call in (lm.generate, lm.sequence, lm.score):
        with pytest.raises(ContextOverflow, match="1000000000 tokens"):
            call(Unread())


def test_row6_template_options_cannot_take_the_place_of_arguments(lm: LM) -> None:
    for name in ("messages", "tools", "sanitize_control_tokens"):
        with pytest.raises(InvalidParam, match=f"'{name}' is reserved"):
            lm.chat([{"role": "user", "content": "Hi"}], template_options={name: []})


@pytest.mark.parametrize("options", [{5: 1}, {None: 1}, {("a",): 1}], ids=repr)
def test_options_without_names_are_refused(lm: LM, options: dict[Any, Any]) -> None:
    for call in (lambda: lm.generate("a", params=[options]), lambda: lm.generate({"input_ids": [5], **options})):
        with pytest.raises(InvalidParam, match="options have names"):
            call()


@pytest.mark.parametrize("name", ["max_running", "max_step_tokens", "spill_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "8"], ids=repr)
def test_limits_of_an_engine_are_integers(lm: LM, name: str, value: Any) -> None:
    with pytest.raises(InvalidParam, match=name):
        Engine(lm, **{name: value})


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint16", "uint32", "uint64", ">i4", ">i8"])
def test_row15_integer_arrays_of_any_kind_are_ids(lm: LM, dtype: str) -> None:
    expected = lm.generate([5, 6], max_new_tokens=3).token_ids
    assert lm.generate(np.array([5, 6], dtype=dtype), max_new_tokens=3).token_ids == expected


def test_row15_ids_of_a_tokenizer_with_more_tokens_than_the_model_are_refused(tmp_path: Path) -> None:
    lm = LM.from_pretrained(save(tiny_llama(num_hidden_layers=1, vocab_size=300), tmp_path))
    text = "Once upon a time there was a weaver"
    assert lm.tokenizer is not None
    assert max(lm.tokenizer.encode(text)) >= 300
    with pytest.raises(InvalidPrompt, match="ids go from 0 to 299"):
        lm.generate(text, max_new_tokens=3)
    lm.generate([5, 6], max_new_tokens=3)


BAD_OPTIONS: list[tuple[str, Any]] = [
    *[("temperature", v) for v in (math.nan, math.inf, -1.0, "1", True, 10**400)],
    *[("top_p", v) for v in (0, -0.5, 1.5, math.nan, "x")],
    *[("top_k", v) for v in (-1, 1.5, "x", 2**64)],
    *[("min_p", v) for v in (-0.1, 1.5, math.nan)],
    *[("repetition_penalty", v) for v in (0, -1, math.nan, math.inf)],
    *[("seed", v) for v in (-1, 2**64, 1.5, "x")],
    *[("stop_strings", v) for v in ([""], ["x"] * 10**6, ["\ud800"], [5], ["x" * 10**6])],
    *[("eos_token_id", v) for v in (-1, VOCAB_SIZE, 1.5, "x", [0, -1])],
    *[("logprobs", v) for v in (-1, 10**6, 1.5)],
    *[("prompt_logprobs", v) for v in (-1, 10**6)],
    *[("min_new_tokens", v) for v in (-1, 1.5, 10**6)],
    *[("max_time", v) for v in (-1, math.nan, 0)],
    *[("logits_processor", v) for v in (5, [5], "x")],
    *[("rng", v) for v in ("numpy", 5)],
    *[("no_such_option", v) for v in (1, None)],
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=lambda v: repr(v)[:20])
def test_row15_a_parameter_outside_its_range_is_refused_by_name(lm: LM, name: str, value: Any) -> None:
    spelled = name.replace("_", "[_ ]")
    for call in (lm.generate, lm.stream):
        with pytest.raises((InvalidParam, UnsupportedOption), match=spelled) as caught:
            call(GOOD, max_new_tokens=3, **{name: value})
        assert len(str(caught.value)) < 1000
    with pytest.raises(HandloomError, match=spelled):
        lm.generate([GOOD, GOOD], params=[{}, {name: value}], max_new_tokens=3)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok \ud83d"])
def test_row15_lone_surrogates_are_no_text(lm: LM, text: str) -> None:
    for call in (lm.generate, lm.stream, lm.score, lm.sequence):
        with pytest.raises(InvalidPrompt, match="lone surrogate"):
            call(text)


@pytest.mark.parametrize("value", [-1, 101, 1.5, True, None, 10**30])
def test_row15_score_checks_its_parameter_too(lm: LM, value: Any) -> None:
    with pytest.raises(InvalidParam, match="top_logprobs"):
        lm.score(GOOD, top_logprobs=value)


# Row 21: embeddings ---------------------------------------------------------------------------------

WIDTH = 24


def bad_embeddings() -> dict[str, Any]:
    values = torch.randn(3, WIDTH)
    nan, inf = values.clone(), values.clone()
    nan[2, 1], inf[0, 0] = math.nan, -math.inf
    return {
        "pickle": pickle.dumps(values),
        "sparse": values.to_sparse(),
        "too wide": torch.randn(3, WIDTH + 1),
        "transposed": torch.randn(WIDTH, 3),
        "one row": torch.randn(WIDTH),
        "three dimensions": torch.randn(1, 3, WIDTH),
        "no rows": torch.randn(0, WIDTH),
        "nan": nan,
        "inf": inf,
        "integers": torch.ones(3, WIDTH, dtype=torch.int64),
        "booleans": torch.ones(3, WIDTH, dtype=torch.bool),
        "complex": torch.ones(3, WIDTH, dtype=torch.complex64),
        "without data": torch.empty(3, WIDTH, device="meta"),
        "numpy nan": nan.numpy(),
        "numpy objects": np.full((3, WIDTH), None),
        "numpy text": np.full((3, WIDTH), "x"),
        "numpy structured": np.zeros((3, WIDTH), dtype=[("a", "f4")]),
        "lists": values.tolist(),
    }


@pytest.mark.parametrize("what", bad_embeddings())
def test_row21_embeddings_must_be_dense_finite_floats_of_the_right_shape(lm: LM, what: str) -> None:
    value = bad_embeddings()[what]
    for call in (lm.generate, lm.stream, lm.score, lm.sequence):
        with pytest.raises(InvalidPrompt):
            call(value)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, "f2", "f8", ">f4", "float128", "grad"])
def test_row21_good_embeddings_of_any_float_kind_run(lm: LM, kind: Any) -> None:
    ids = torch.tensor([5, 6, 7])
    values = lm.transformer.embedding[ids].half().float()
    expected = lm.generate(values, max_new_tokens=5).token_ids
    if kind == "grad":
        given: Any = values.clone().requires_grad_()
    elif isinstance(kind, str):
        given = values.numpy().astype(kind)
    else:
        given = values.to(kind)
    tokens = lm.generate(given, max_new_tokens=5).token_ids
    assert len(tokens) == len(expected) if kind == torch.bfloat16 else tokens == expected


def test_row21_embeddings_are_taken_as_they_were_when_handed_in(lm: LM) -> None:
    values = lm.transformer.embedding[torch.tensor([5, 6, 7])].clone()
    expected = lm.generate(values, max_new_tokens=5).token_ids
    sequence = lm.sequence(values)
    values.fill_(0)
    assert lm.generate(sequence, max_new_tokens=5).token_ids == expected
    sequence.free()


def test_row21_what_needs_token_ids_is_refused_for_embeddings(lm: LM) -> None:
    values = lm.transformer.embedding[torch.tensor([5, 6, 7])]
    with pytest.raises(UnsupportedOption, match="prompt_logprobs"):
        lm.generate(values, prompt_logprobs=0)
    with pytest.raises(InvalidPrompt, match="embeddings"):
        lm.score(values)


def test_row21_one_bad_embedding_in_a_list_stops_the_call_before_anything_runs(lm: LM) -> None:
    calls: list[Callable[..., Any]] = [lm.generate, lm.stream]
    for call in calls:
        with pytest.raises(InvalidPrompt, match="NaN"):
            call([GOOD, torch.full((2, WIDTH), math.nan)])
