"""Greedy tokens equal transformers' generate: alone, in ragged batches, chunked, few at a time, and step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import handloom as hl
from handloom.decoding import loop
from handloom.decoding.decoder import TokenEvent
from handloom.engine.prepare import resolve
from handloom.sampling.params import GenerationParams, resolve_params
from parity_checks import BACKENDS, Pair, assert_tokens_equal, load_pair
from tiny_models import TINY, VOCAB_SIZE, ragged_prompts, random_ids, save, tiny_tokenizer

RAGGED = (1, 5, 17, 33, 64, 2, 16, 48)


def resolved(lm: hl.LM, prompt: list[int], **options: Any) -> GenerationParams:
    """What the engine makes of these options."""
    with lm.sequence(prompt) as sequence:
        return resolve(lm, sequence, options)


def run_engine(engine: hl.Engine, requests: list[int]) -> list[list[int]]:
    """The tokens of each request, in the order given."""
    tokens: dict[int, list[int]] = {request: [] for request in requests}
    for event in engine.run():
        if isinstance(event, TokenEvent):
            tokens[event.request_id].append(event.token_id)
    return [tokens[request] for request in requests]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", sorted(TINY))
def test_greedy_tokens_equal_generate(family: str, seed: int, tmp_path: Any) -> None:
    pair = load_pair(save(TINY[family](100 + seed), tmp_path, tokenizer=False))
    for backend in BACKENDS:
        for length in (1, 9, 40):
            prompt = random_ids(seed, length)
            ours = pair.lm(backend=backend).generate(prompt, max_new_tokens=24).token_ids
            assert_tokens_equal(pair.hf, prompt, ours, max_new_tokens=24)


def test_long_greedy_output_equals_generate(pair: Pair) -> None:
    """Many pages, and many windows of the sliding layers."""
    prompt = random_ids(7, 50)
    ours = pair.lm().generate(prompt, max_new_tokens=200).token_ids
    assert_tokens_equal(pair.hf, prompt, ours, max_new_tokens=200)


def test_a_ragged_batch_equals_each_prompt_alone_in_transformers(pair: Pair) -> None:
    prompts = ragged_prompts(1, RAGGED)
    counts = [3 + 4 * i for i in range(len(prompts))]
    outputs = pair.lm().generate(prompts, params=[{"max_new_tokens": count} for count in counts])
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output.error is None
        assert len(output.token_ids) == count or output.finish_reason == "eos"
        assert_tokens_equal(pair.hf, prompt, output.token_ids, max_new_tokens=count)


@pytest.mark.parametrize(
    "limits", [{"max_step_tokens": 5}, {"max_running": 2}, {"max_step_tokens": 7, "max_running": 3}]
)
def test_chunked_prefill_and_queueing_change_no_token(pair: Pair, limits: dict[str, int]) -> None:
    prompts = ragged_prompts(2, RAGGED)
    engine = hl.Engine(pair.lm(), **limits)
    requests = [engine.add_request(prompt, max_new_tokens=16) for prompt in prompts]
    for prompt, ours in zip(prompts, run_engine(engine, requests), strict=True):
        assert_tokens_equal(pair.hf, prompt, ours, max_new_tokens=16)


def test_requests_that_join_later_change_no_token(pair: Pair) -> None:
    prompts = ragged_prompts(3, RAGGED)
    engine = hl.Engine(pair.lm(), max_step_tokens=20)
    tokens: dict[int, list[int]] = {}
    waiting = list(prompts)
    while waiting or engine.has_work:
        if waiting:
            tokens[engine.add_request(waiting.pop(0), max_new_tokens=16)] = []
        for event in engine.step():
            if isinstance(event, TokenEvent):
                tokens[event.request_id].append(event.token_id)
    for prompt, ours in zip(prompts, tokens.values(), strict=True):
        assert_tokens_equal(pair.hf, prompt, ours, max_new_tokens=16)


def test_a_small_cache_makes_requests_wait_and_changes_no_token(pair: Pair) -> None:
    prompts = ragged_prompts(4, RAGGED)
    outputs = pair.lm(kv_cache_tokens=96).generate(prompts, max_new_tokens=16)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_tokens_equal(pair.hf, prompt, output.token_ids, max_new_tokens=16)


def test_a_live_sequence_is_continued_as_generate_continues(pair: Pair) -> None:
    """Generate in pieces, after a rewind, and from a fork: always the tokens generate gives for the same past."""
    prompt = random_ids(9, 20)
    with pair.lm().sequence(prompt) as sequence:
        first = pair.lm().generate(sequence, max_new_tokens=10).token_ids
        assert_tokens_equal(pair.hf, prompt, first, max_new_tokens=10)
        assert sequence.token_ids == prompt + first
        sequence.rewind(4)
        sequence.append([11, 12])
        past = list(sequence.token_ids)
        with sequence.fork() as branch:
            branch.append(13)
            ours = pair.lm().generate([sequence, branch], max_new_tokens=8)
        assert_tokens_equal(pair.hf, past, ours[0].token_ids, max_new_tokens=8)
        assert_tokens_equal(pair.hf, [*past, 13], ours[1].token_ids, max_new_tokens=8)


def test_a_prompt_longer_than_a_step_runs_in_chunks(tiny_pair: Callable[..., Pair]) -> None:
    """More tokens than the engine runs at once by default, beside a short prompt."""
    for family, overrides in (("llama", {"max_position_embeddings": 2048}), ("gpt2", {"n_positions": 2048})):
        pair = tiny_pair(family, **overrides)
        prompts = ragged_prompts(12, (1300, 9, 513))
        for prompt, output in zip(prompts, pair.lm().generate(prompts, max_new_tokens=8), strict=True):
            assert_tokens_equal(pair.hf, prompt, output.token_ids, max_new_tokens=8)


def test_more_prompts_than_run_at_once(pair: Pair) -> None:
    prompts = ragged_prompts(13, [1 + i % 11 for i in range(300)])
    outputs = pair.lm().generate(prompts, max_new_tokens=3)
    for prompt, output in list(zip(prompts, outputs, strict=True))[::15]:
        assert_tokens_equal(pair.hf, prompt, output.token_ids, max_new_tokens=3)


def test_a_vocabulary_larger_than_the_tokenizers(tiny_pair: Callable[..., Pair]) -> None:
    """Padded vocabularies are common; an id without text has none."""
    pair = tiny_pair("llama", 3, vocab_size=450)
    prompt = random_ids(1, 9)
    output = pair.lm().generate(prompt, max_new_tokens=30)
    assert max(output.token_ids) >= VOCAB_SIZE
    assert_tokens_equal(pair.hf, prompt, output.token_ids, max_new_tokens=30)
    assert output.text == tiny_tokenizer().decode(output.token_ids, skip_special_tokens=True)


# The honest loop -------------------------------------------------------------------------------


def test_the_short_loop_equals_the_engine_and_generate(pair: Pair) -> None:
    lm = pair.lm()
    for prompt in ragged_prompts(5, (1, 12, 40)):
        options = {"max_new_tokens": 20, "repetition_penalty": 1.3}
        tokens = list(loop.generate(lm.transformer, lm.pool, prompt, resolved(lm, prompt, **options)))
        assert tokens == lm.generate(prompt, **options).token_ids
        assert_tokens_equal(pair.hf, prompt, tokens, **options)


def test_the_short_loop_samples_what_the_engine_samples(pair: Pair) -> None:
    lm = pair.lm()
    prompts = ragged_prompts(6, (1, 12, 40))
    options = {"max_new_tokens": 20, "temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_new_tokens": 15}
    params = [{"seed": seed} for seed in (0, 1, 2**64 - 1)]
    together = lm.generate(prompts, params=params, **options)
    for prompt, own, output in zip(prompts, params, together, strict=True):
        tokens = list(loop.generate(lm.transformer, lm.pool, prompt, resolved(lm, prompt, **options, **own)))
        assert tokens == output.token_ids == lm.generate(prompt, **options, **own).token_ids


def test_the_short_loop_draws_the_tokens_of_generate(pair: Pair) -> None:
    lm, prompt = pair.lm(), random_ids(3, 12)
    options: dict[str, Any] = {"max_new_tokens": 25, "do_sample": True, "temperature": 0.9, "top_k": 30}
    torch.manual_seed(5)
    tokens = list(loop.generate(lm.transformer, lm.pool, prompt, resolved(lm, prompt, rng="torch", **options)))
    torch.manual_seed(5)
    assert tokens == pair.hf.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_the_short_loop_stops_at_eos_as_generate_does(pair: Pair) -> None:
    lm, prompt = pair.lm(), random_ids(3, 12)
    free = lm.generate(prompt, max_new_tokens=20).token_ids
    options = {"max_new_tokens": 20, "eos_token_id": [free[6], 330]}
    params = resolve_params(
        options, generation_config={}, prompt_length=12, max_context=256, vocab_size=lm.spec.vocab_size
    )
    tokens = list(loop.generate(lm.transformer, lm.pool, prompt, params))
    assert tokens == free[: free.index(free[6]) + 1]
    assert_tokens_equal(pair.hf, prompt, tokens, **options)


def test_sampling_is_the_requests_own_whatever_runs_beside_it(tiny_pair: Callable[..., Pair]) -> None:
    """Same prompt, params and seed: same tokens, alone, in any batch, in any chunks."""
    for family in sorted(TINY):
        lm = tiny_pair(family).lm()
        prompts = ragged_prompts(8, RAGGED)
        options = {"max_new_tokens": 12, "temperature": 0.8}
        alone = [lm.generate(prompt, seed=i, **options).token_ids for i, prompt in enumerate(prompts)]
        for limits in ({}, {"max_step_tokens": 9}, {"max_running": 3}):
            engine = hl.Engine(lm, **limits)
            order = list(reversed(range(len(prompts))))
            requests = [engine.add_request(prompts[i], seed=i, **options) for i in order]
            assert run_engine(engine, requests) == [alone[i] for i in order]
