"""Speculative decoding gives the tokens, scores and events of decoding without it, whoever drafts and however badly."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drafting import add_with_oracle, draft_freely, other_lm, same
from engines import SMALL, Results, all_free, lm_with, run
from handloom.decoding.speculative import SpeculativeDecoder
from handloom.engine import Engine
from handloom.errors import InvalidParam, NonFiniteLogits, RequestFailed, UnsupportedOption
from handloom.lm import LM
from tiny_models import TINY, random_ids, save, tiny_llama

NEW_TOKENS = 40
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None}
SAMPLED: dict[str, Any] = {**GREEDY, "seed": 11, "temperature": 0.8}
PROMPTS = [random_ids(i, length) * 2 for i, length in enumerate((5, 12, 2, 21, 8))]
DRAFTERS: dict[str, Callable[[], dict[str, Any]]] = {
    "lookup": lambda: {"prompt_lookup_num_tokens": 6},
    "long lookup": lambda: {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 4},
    "suffix": lambda: {"speculation": "suffix"},
    "a model like it": lambda: {"assistant_model": other_lm(0.0)},
    "a model": lambda: {"assistant_model": other_lm(0.02), "assistant_confidence_threshold": 0.0},
    "a heuristic": lambda: {
        "assistant_model": other_lm(0.02), "num_assistant_tokens": 2, "num_assistant_tokens_schedule": "heuristic"
    },
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.3, "encoder_repetition_penalty": 1.1},
    "n-grams": {"no_repeat_ngram_size": 3},
    "bans": {"bad_words_ids": [[9], [30, 31]], "sequence_bias": {(40, 41): 3.0, (50,): 1.0}},
    "lengths": {
        "min_new_tokens": 9, "eos_token_id": [*range(5, 331, 9)], "exponential_decay_length_penalty": (12, 1.1)
    },
    "sampled": {"seed": 4, "temperature": 0.7},
    "filters": {"seed": 4, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
    "told": {"seed": 5, "top_k": 9, "logprobs": 2, "output_scores": True, "output_logits": True},
    "SynthID": {"seed": 6, "watermarking_config": {"ngram_len": 3, "keys": [1, 2, 3]}},
    "a processor": {"logits_processor": [lambda ids, scores: scores - 0.1 * (ids.sum() % 7) * torch.arange(331).sin()]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rules", RULES)
def test_every_drafter_beside_every_kind_of_rule_gives_the_bits_without_it(drafter: str, rules: str) -> None:
    lm, options = lm_with(800), {**GREEDY, **RULES[rules]}
    plain = lm.generate(PROMPTS, **options)
    ours = lm.generate(PROMPTS, **options, **DRAFTERS[drafter]())
    for own, expected in zip(ours, plain, strict=True):
        same(own, expected)
        assert own.drafts is not None and own.drafts.accepted <= own.drafts.drafted
        assert expected.drafts is None
    assert sum(own.drafts.drafted for own in ours) > 0
    assert all_free(lm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_in_every_dtype_and_family_the_bits_are_those_without_it(family: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lm = LM.from_pretrained(save(TINY[family](2, **SMALL[family]), Path(folder)), dtype=dtype, kv_cache_tokens=4096)
    assert lm.backend.name == "cpu"
    for options in (GREEDY, SAMPLED):
        plain = lm.generate(PROMPTS, **options, output_logits=True, logprobs=1)
        engine, outputs = Engine(lm), [output.token_ids for output in plain]
        for at, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
            add_with_oracle(engine, prompt, output, luck=at, **options)
        assert list(run(engine).tokens.values()) == outputs
        for own, expected in zip(
            lm.generate(PROMPTS, **options, output_logits=True, logprobs=1, speculation="suffix"), plain, strict=True
        ):
            same(own, expected)


@pytest.mark.parametrize("max_step_tokens", [1, 3, 7, 20, 512])
@pytest.mark.parametrize("wrong", [0.0, 0.2, 1.0])
def test_at_any_share_of_right_drafts_a_batch_has_the_tokens_it_has_alone(max_step_tokens: int, wrong: float) -> None:
    lm = lm_with()
    expected = [lm.generate(prompt, **options).token_ids for prompt, options in zip(PROMPTS, mixed(), strict=True)]
    engine = Engine(lm, max_step_tokens=max_step_tokens)
    for at, (prompt, options) in enumerate(zip(PROMPTS, mixed(), strict=True)):
        if at == 2:
            engine.add_request(prompt, **options)
        else:
            add_with_oracle(engine, prompt, expected[at], wrong=wrong, luck=at, **options)
    results, steps = Results(), 0
    while engine.has_work:
        results.take(engine.step())
        steps += 1
    assert [results.tokens[at] for at in range(len(PROMPTS))] == expected
    stats = engine.stats()
    if max_step_tokens == 512 and wrong == 0:
        assert stats.num_accepted == stats.num_drafted > 100 and steps == NEW_TOKENS  # the plain one's
    if wrong == 1:
        assert stats.num_accepted == 0
    assert all_free(lm)


def mixed() -> list[dict[str, Any]]:
    return [GREEDY, SAMPLED, GREEDY, {**GREEDY, "repetition_penalty": 1.2}, {**SAMPLED, "top_k": 5}]


def test_with_right_drafts_a_request_takes_as_many_steps_fewer() -> None:
    lm = lm_with()
    output, engine, steps = lm.generate(PROMPTS[0], **GREEDY).token_ids, Engine(lm), 0
    add_with_oracle(engine, PROMPTS[0], output, wrong=0.0, **GREEDY)
    while engine.has_work:
        engine.step()
        steps += 1
    assert steps == 1 + -(-(NEW_TOKENS - 1) // 10)  # the prompt, then nine drafted tokens and one more each time


@pytest.mark.parametrize("num_pages", [24, 34])
@pytest.mark.parametrize("spill_bytes", [0, 1 << 20])
def test_with_few_pages_requests_are_preempted_and_have_their_tokens(num_pages: int, spill_bytes: int) -> None:
    lm = lm_with(num_pages)
    expected = [lm_with().generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
    engine = Engine(lm, spill_bytes=spill_bytes)
    for at, prompt in enumerate(PROMPTS):
        add_with_oracle(engine, prompt, expected[at], luck=at, **GREEDY)
    assert list(run(engine).tokens.values()) == expected
    assert engine.stats().num_preempted and engine.stats().num_accepted
    assert all_free(lm)


def test_an_abort_frees_every_page_and_others_go_on() -> None:
    lm, assistant = lm_with(), other_lm(0.0)
    expected = lm.generate(PROMPTS[1], **GREEDY).token_ids
    engine, results = Engine(lm, prefix_cache=False), Results()
    first = engine.add_request(PROMPTS[0], **GREEDY, assistant_model=assistant)
    second = engine.add_request(PROMPTS[1], **GREEDY, assistant_model=assistant)
    for _ in range(3):
        results.take(engine.step())
    assert engine.abort(first)
    run(engine, results)
    assert results.tokens[second] == expected and all_free(lm) and all_free(assistant)


def test_pages_of_accepted_tokens_are_found_by_later_requests_and_never_those_of_wrong_ones() -> None:
    lm = lm_with()
    output = lm_with().generate(PROMPTS[0], **GREEDY).token_ids
    engine = Engine(lm)
    add_with_oracle(engine, PROMPTS[0], output, wrong=0.5, **GREEDY)
    run(engine)
    sequence = lm.encode([*PROMPTS[0], *output, 5])
    sequence.adopt_prefix()
    length = len(PROMPTS[0]) + NEW_TOKENS
    assert sequence.num_computed == (length - 1) // 4 * 4, "all full pages"
    sequence.free()
    assert lm.pool.num_cached == (length - 1) // 4, "and no others"
    again = lm.generate([*PROMPTS[0], *output], **GREEDY)
    assert again.token_ids == lm_with().generate([*PROMPTS[0], *output], **GREEDY).token_ids


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_what_ends_a_request_inside_an_accepted_draft_ends_it_there(stop: int) -> None:
    lm = lm_with()
    output = lm.generate(PROMPTS[0], **GREEDY)
    first = min(at for at in range(stop, NEW_TOKENS) if output.token_ids[at] not in output.token_ids[:at])
    text = lm.decode(output.token_ids[: first + 1])[-2:]
    ends: list[dict[str, Any]] = [
        {"eos_token_id": output.token_ids[first]},
        {"max_new_tokens": first + 1},
        {"stop_strings": [text]},
        {"stop_strings": [text], "include_stop_text": False},
        {"stopping_criteria": [lambda ids, scores: ids.shape[1] >= len(PROMPTS[0]) + first]},
        {"max_time": 1e-9},
    ]
    for end in ends:
        plain = lm.generate(PROMPTS[0], **{**GREEDY, **end})
        engine = Engine(lm)
        request = add_with_oracle(engine, PROMPTS[0], output.token_ids, wrong=0.0, **{**GREEDY, **end})
        results = run(engine)
        assert results.tokens[request] == plain.token_ids
        assert results.texts[request] == plain.text
        assert results.ends[request].reason == plain.finish_reason
        assert results.ends[request].stop_string == plain.stop_string


def test_pieces_of_a_stream_are_those_without_it() -> None:
    lm = lm_with()
    for options in (GREEDY, {**SAMPLED, "stop_strings": ["a", "e"]}):
        plain = [(piece.token_id, piece.text) for piece in lm.stream(PROMPTS[0], **options)]
        ours = [(piece.token_id, piece.text) for piece in lm.stream(PROMPTS[0], speculation="suffix", **options)]
        assert ours == plain


def test_a_sequence_of_the_callers_is_left_as_without_it() -> None:
    lm = lm_with()
    with lm.sequence(PROMPTS[0]) as plain, lm.sequence(PROMPTS[0]) as ours:
        expected = lm.generate(plain, **GREEDY)
        assert lm.generate(ours, speculation="suffix", **GREEDY).token_ids == expected.token_ids
        assert (ours.token_ids, ours.num_computed, ours.ahead) == (plain.token_ids, plain.num_computed, [])
        assert len(ours.page_table) == len(plain.page_table)
        assert torch.equal(ours.logits, plain.logits)


def test_hooks_see_no_drafted_tokens_since_none_are_drafted_while_they_are_open() -> None:
    lm = lm_with()
    with lm.capture("blocks.0.hook_resid_post") as plain:
        expected = lm.generate(PROMPTS[0], **GREEDY)
    with lm.capture("blocks.0.hook_resid_post") as ours:
        output = lm.generate(PROMPTS[0], speculation="suffix", **GREEDY)
    same(output, expected)
    assert output.drafts.drafted == 0
    assert torch.equal(ours["blocks.0.hook_resid_post"], plain["blocks.0.hook_resid_post"])


def test_an_error_counts_only_once_its_position_is_reached() -> None:
    lm = lm_with()
    output = lm.generate(PROMPTS[0], **GREEDY).token_ids

    def raises(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert ids[0, len(PROMPTS[0]) :].tolist() == output[: ids.shape[1] - len(PROMPTS[0])], "no wrong draft is seen"
        return scores if ids.shape[1] < len(PROMPTS[0]) + 12 else 1 // torch.zeros(1, dtype=torch.int64)

    engine = Engine(lm)
    failing = add_with_oracle(engine, PROMPTS[0], output, **GREEDY, logits_processor=[raises])
    beside = add_with_oracle(engine, PROMPTS[0], output, **GREEDY)
    results = run(engine)
    assert results.tokens[failing] == output[:12] and isinstance(results.ends[failing].error, RequestFailed)
    assert results.tokens[beside] == output and all_free(lm)


def test_a_model_that_gives_nan_fails_where_it_would_without_drafts() -> None:
    lm = lm_with()
    output = lm.generate(PROMPTS[0], **GREEDY).token_ids

    def nan(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * torch.nan if ids.shape[1] == len(PROMPTS[0]) + 7 else scores

    engine = Engine(lm)
    request = add_with_oracle(engine, PROMPTS[0], output, wrong=0.0, **GREEDY, logits_processor=[nan])
    results = run(engine)
    assert results.tokens[request] == output[:7] and isinstance(results.ends[request].error, NonFiniteLogits)


def test_drafts_take_no_page_from_anybody() -> None:
    lm = lm_with(12)
    engine = Engine(lm)
    decoder = engine.prepare(random_ids(1, 9), {"speculation": "suffix", "max_new_tokens": 30, "eos_token_id": None})
    assert isinstance(decoder, SpeculativeDecoder)
    decoder.sequence.grow(10)
    decoder.sequence.num_computed = 9
    decoder.sequence.append(5)
    assert decoder.most == 2, "its three pages hold twelve tokens"


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"prompt_lookup_num_tokens": 3, "speculation": "suffix"}, InvalidParam, "lookup_num_tokens and speculation"),
        ({"prompt_lookup_num_tokens": 0}, InvalidParam, "prompt_lookup_num_tokens=0"),
        ({"prompt_lookup_num_tokens": 1025}, InvalidParam, "prompt_lookup_num_tokens=1025"),
        ({"speculation": "magic"}, InvalidParam, "speculation='magic'"),
        ({"max_matching_ngram_size": 3}, InvalidParam, "max_matching_ngram_size=3 .*prompt_lookup_num_tokens"),
        ({"num_assistant_tokens": 3}, InvalidParam, "num_assistant_tokens=3 .*assistant_model or speculation"),
        ({"speculation": "suffix", "assistant_confidence_threshold": 0.1}, InvalidParam, "confidence_threshold"),
        ({"num_assistant_tokens_schedule": "sometimes"}, InvalidParam, "num_assistant_tokens_schedule"),
        ({"speculation": "suffix", "num_beams": 2}, UnsupportedOption, "speculation beside num_beams=2"),
        ({"speculation": "suffix", "do_sample": True, "num_return_sequences": 2}, UnsupportedOption, "num_return"),
        ({"speculation": "suffix", "do_sample": True, "rng": "torch"}, UnsupportedOption, "rng='torch'"),
        ({"assistant_model": 5}, InvalidParam, "assistant_model is int"),
        ({"assistant_model": tiny_llama}, InvalidParam, "assistant_model is function; expected an LM"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        lm_with().generate(PROMPTS[0], **options)


def test_text_drafters_go_on_from_embeddings() -> None:
    lm = lm_with()
    embeddings = lm.transformer.embedding[PROMPTS[0]]
    plain = lm.generate(embeddings, **GREEDY)
    ours = lm.generate(embeddings, **GREEDY, speculation="suffix")
    same(ours, plain)
