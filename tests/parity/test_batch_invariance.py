"""A request's logits and tokens are bitwise its own: whatever runs beside it, however its prompt is cut, whatever was
cached, taken away and computed again, or moved to host memory. On the CPU backend, in every dtype of its weights."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import SMALL, poison
from handloom.cache.pages import PagePool
from handloom.decoding.decoder import FinishedEvent, TokenEvent
from handloom.engine import Engine
from handloom.lm import LM
from tiny_models import TINY, random_ids, save

DTYPES = ("float32", "bfloat16", "float16")
NEW_TOKENS = 12
SHARED = random_ids(99, 24)

Request = Mapping[str, Any]
Result = tuple[list[int], list[torch.Tensor]]


@cache
def loaded(family: str, dtype: str) -> LM:
    with tempfile.TemporaryDirectory() as folder:
        path = save(TINY[family](3, **SMALL[family]), Path(folder))
        lm = LM.from_pretrained(path, dtype=dtype, kv_cache_tokens=16)
    assert lm.backend.name == "cpu"
    return lm


def lm_with(family: str, dtype: str, num_pages: int = 1024, page_size: int = 4) -> LM:
    lm = loaded(family, dtype)
    pool = PagePool(lm.spec, num_pages, page_size, dtype=lm.dtype, device=lm.device)
    poison(pool)
    return LM(lm.transformer, lm.tokenizer, pool, name=family)


def requests(count: int, seed: int) -> list[Request]:
    """Prompts of 1 to 90 tokens, a third with a beginning in common; half greedy, half sampled."""
    rng = random.Random(seed)
    drawn = []
    for i in range(count):
        prompt = (SHARED if i % 3 == 0 else []) + random_ids(1000 * seed + i, rng.randint(1, 60))
        options = {"do_sample": True, "temperature": 0.9, "top_k": 40, "seed": i} if i % 2 else {}
        drawn.append({"prompt": prompt, "max_new_tokens": rng.randint(2, NEW_TOKENS), "priority": rng.choice((0, 1))})
        drawn[-1] |= options
    return drawn


def run(lm: LM, wanted: Iterable[Request], *, stagger: int = 0, **limits: Any) -> tuple[list[Result], Engine]:
    """Tokens and raw logits of every request; `stagger` steps lie between two arrivals."""
    engine, results, order = Engine(lm, **limits), {}, []

    def step() -> None:
        for event in engine.step():
            tokens, logits = results[event.request_id]
            if isinstance(event, TokenEvent):
                tokens.append(event.token_id)
                logits.append(event.logits)
            elif isinstance(event, FinishedEvent):
                assert event.error is None

    for request in wanted:
        options = dict(request)
        order.append(engine.add_request(options.pop("prompt"), output_logits=True, eos_token_id=None, **options))
        results[order[-1]] = [], []
        for _ in range(stagger):
            step()
    while engine.has_work:
        step()
    return [results[i] for i in order], engine


def alone(lm: LM, wanted: Iterable[Request]) -> list[Result]:
    """Each request in an engine of its own, its prompt in one piece, nothing cached."""
    return [run(lm, [request], prefix_cache=False)[0][0] for request in wanted]


def assert_same_bits(ours: list[Result], expected: list[Result]) -> None:
    for at, ((tokens, logits), (own_tokens, own_logits)) in enumerate(zip(ours, expected, strict=True)):
        assert tokens == own_tokens, f"request {at}"
        assert all(torch.equal(a, b) for a, b in zip(logits, own_logits, strict=True)), f"request {at}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("count", [2, 17, 64])
def test_in_company_a_request_has_the_bits_it_has_alone(family: str, dtype: str, count: int) -> None:
    wanted = requests(count, seed=count)
    lm = lm_with(family, dtype)
    ours, _ = run(lm, wanted, stagger=count % 2)
    assert_same_bits(ours, alone(lm, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("max_step_tokens", [1, 7, 33])
def test_a_prompt_cut_into_chunks_has_the_bits_of_one_piece(family: str, dtype: str, max_step_tokens: int) -> None:
    wanted = requests(6, seed=max_step_tokens)
    lm = lm_with(family, dtype)
    ours, _ = run(lm, wanted, max_step_tokens=max_step_tokens, prefix_cache=False)
    assert_same_bits(ours, alone(lm, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", TINY)
def test_pages_taken_over_from_others_give_the_bits_of_computing_them(family: str, dtype: str) -> None:
    wanted = requests(12, seed=5)
    lm = lm_with(family, dtype)
    run(lm, wanted)
    ours, engine = run(lm, wanted, stagger=1)
    assert engine.stats().hit_rate > 0.3
    assert_same_bits(ours, alone(lm, wanted))


@pytest.mark.parametrize("spill_bytes", [0, 1 << 30], ids=["computed again", "moved to host memory"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", TINY)
def test_a_preempted_request_goes_on_with_its_bits(family: str, dtype: str, spill_bytes: int) -> None:
    wanted = [{**request, "max_new_tokens": 40} for request in requests(10, seed=8)]
    ours, engine = run(lm_with(family, dtype, num_pages=35), wanted, stagger=1, spill_bytes=spill_bytes)
    assert engine.stats().num_preempted > 2
    assert_same_bits(ours, alone(lm_with(family, dtype), wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: str) -> None:
    wanted = requests(9, seed=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        lm = lm_with("llama", dtype)
        one, _ = run(lm, wanted)
        torch.set_num_threads(2)
        lm = lm_with("llama", dtype)
        two, _ = run(lm, wanted)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(two, one)
