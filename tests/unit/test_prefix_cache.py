"""The prefix cache: what begins alike is computed and stored once, and nobody's tokens change by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Results, all_free, lm_in_float64, run
from handloom.cache.sequence import Sequence
from handloom.engine import Engine
from handloom.engine.events import Admitted
from handloom.errors import InvalidParam
from handloom.lm import LM
from paged import pool_of
from tiny_models import random_ids

PAGE_SIZE = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": []}


def counted(lm: LM) -> list[int]:
    """Tokens of every forward pass of the model from now on."""
    counts: list[int] = []
    forward = lm.transformer.forward

    def count(batch: Any, *rest: Any) -> torch.Tensor:
        counts.append(len(batch.input_ids))
        return forward(batch, *rest)

    lm.transformer.forward = count  # type: ignore[method-assign]
    return counts


@pytest.fixture
def lm() -> Iterator[LM]:
    """A model whose every page must be free again after the test."""
    lm = lm_in_float64()
    yield lm
    assert all_free(lm)


def without_cache(prompt: list[int], family: str = "llama", **options: Any) -> list[int]:
    engine = Engine(lm_in_float64(family=family), prefix_cache=False)
    request = engine.add_request(prompt, **options)
    return run(engine).tokens[request]


# Hits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "temperature": 1.2, "top_k": 0, "seed": 5}])
def test_a_conversation_computes_only_what_is_new_and_says_the_same(family: str, options: dict[str, Any]) -> None:
    """Each turn is a request of its own, in an engine of its own, that begins with all the turns before it."""
    lm = lm_in_float64(family=family)
    computed = counted(lm)
    past: list[int] = []
    for turn in range(4):
        known = max(0, len(past) - 1) // PAGE_SIZE * PAGE_SIZE  # the last token was chosen, never computed
        past += random_ids(turn, 13)
        computed.clear()
        tokens = lm.generate(past, **options).token_ids
        assert tokens == without_cache(past, family, **options)
        assert computed[0] == len(past) - known
        past += tokens


def test_equal_prompts_of_one_batch_are_computed_and_stored_once(lm: LM) -> None:
    """The others wait one step for the first, then run the one token whose logits they need, or more up to a page."""
    prompt, computed = random_ids(0, 23), counted(lm)
    engine, results = Engine(lm), Results()
    requests = [engine.add_request(prompt, seed=i, do_sample=True, **OPTIONS) for i in range(6)]
    results.take(engine.step())
    results.take(engine.step())
    assert computed == [23, 1 + 5 * 3]
    tables = [request.decoder.sequences[0].page_table for request in engine.scheduler.running]
    assert len({tuple(table[:5]) for table in tables}) == 1
    run(engine, results)
    for i, request in enumerate(requests):
        assert results.tokens[request] == without_cache(prompt, seed=i, do_sample=True, **OPTIONS)


def test_a_shared_system_prompt_is_computed_once_and_each_question_by_itself(lm: LM) -> None:
    system, computed = random_ids(0, 20), counted(lm)
    prompts = [system + random_ids(i, 3 + i) for i in range(1, 6)]
    outputs = lm.generate(prompts, **OPTIONS)
    assert computed[0] == 24
    assert computed[1] == 1 + sum(3 + i for i in range(2, 6))
    assert [output.token_ids for output in outputs] == [without_cache(prompt, **OPTIONS) for prompt in prompts]


def test_a_long_shared_prompt_in_chunks_is_computed_once(lm: LM) -> None:
    engine, prompt, computed = Engine(lm, max_step_tokens=7), random_ids(0, 40), counted(lm)
    requests = [engine.add_request(prompt, **OPTIONS) for _ in range(3)]
    results = run(engine)
    assert sum(computed) == 40 + 2 * 4 + 3 * 8, "the second and third compute their last page, and 8 tokens each"
    assert all(results.tokens[request] == without_cache(prompt, **OPTIONS) for request in requests)


def test_equal_pages_that_were_computed_side_by_side_are_stored_once() -> None:
    """Two sequences that did not look for each other: whoever publishes second goes on with the pages of the first."""
    pool = pool_of(20, PAGE_SIZE)
    first, second = Sequence(pool, range(10)), Sequence(pool, range(10))
    for sequence in (first, second):
        sequence.slots(10)
        sequence.num_computed = 10
    assert pool.num_free == 14
    first.publish()
    second.publish()
    assert first.page_table[:2] == second.page_table[:2]
    assert first.page_table[2] != second.page_table[2]
    assert pool.num_free == 16


def test_a_request_that_was_stopped_finds_its_own_pages_again() -> None:
    lm = lm_in_float64(12)
    engine = Engine(lm, spill_bytes=0)  # computed again, as far as it is not cached
    requests = [engine.add_request(random_ids(i, 9), **{**OPTIONS, "max_new_tokens": 24}) for i in range(3)]
    queue = engine.watch()
    results = run(engine)
    again = [event for event in list(queue)[3:] if isinstance(event, Admitted)]
    assert (again[0].num_tokens, again[0].num_cached) == (25, 16)
    for i, request in enumerate(requests):
        assert results.tokens[request] == without_cache(random_ids(i, 9), **{**OPTIONS, "max_new_tokens": 24})


def test_nobody_waits_for_a_request_of_lower_priority_to_compute_a_page(lm: LM) -> None:
    engine, prompt = Engine(lm, max_step_tokens=4), random_ids(0, 30)
    engine.add_request(prompt, **OPTIONS)
    engine.step()
    first = engine.add_request(prompt, priority=1, **OPTIONS)
    queue = engine.watch()
    engine.step()
    assert [(event.request_id, event.num_cached) for event in queue if isinstance(event, Admitted)] == [(first, 4)]
    run(engine)


# No hits ---------------------------------------------------------------------------------------------


def test_only_requests_of_the_same_salt_share(lm: LM) -> None:
    prompt, computed = random_ids(0, 20), counted(lm)
    engine = Engine(lm)
    for salt in ("", "a", "b", "a"):
        engine.add_request(prompt, cache_salt=salt, max_new_tokens=1)
        run(engine)
    assert computed == [20, 20, 20, 4]
    with pytest.raises(InvalidParam, match="cache_salt"):
        engine.add_request(prompt, cache_salt=None)
    with lm.sequence(prompt) as sequence, pytest.raises(InvalidParam, match="its own salt"):
        engine.add_request(sequence, cache_salt="a")


@pytest.mark.parametrize("differs_at", [0, 3, 4, 11, 18])
def test_a_page_is_shared_only_where_every_token_up_to_its_end_is_equal(lm: LM, differs_at: int) -> None:
    prompt, computed = random_ids(0, 20), counted(lm)
    other = [*prompt]
    other[differs_at] += 1
    lm.generate(prompt, max_new_tokens=1)
    assert lm.generate(other, **OPTIONS).token_ids == without_cache(other, **OPTIONS)
    assert computed[1] == 20 - differs_at // PAGE_SIZE * PAGE_SIZE


def test_sequences_with_embeddings_neither_find_nor_offer_pages(lm: LM) -> None:
    computed = counted(lm)
    values = lm.transformer.embedding[torch.tensor(random_ids(0, 20))]
    for _ in range(2):
        computed.clear()
        lm.generate(values, max_new_tokens=2, eos_token_id=[])
        assert computed == [20, 1]
    assert lm.pool.num_cached == 0


def test_whose_prompt_is_scored_computes_all_of_it_and_leaves_it_to_others(lm: LM) -> None:
    prompt, computed = random_ids(0, 20), counted(lm)
    plain = lm.score(prompt).logprobs
    assert lm.score(prompt).logprobs == plain
    output = lm.generate(prompt, prompt_logprobs=0, max_new_tokens=1)
    assert output.prompt_logprobs == pytest.approx(plain)
    assert computed == [20, 20, 20]
    lm.generate(prompt, max_new_tokens=1)
    assert computed[-1] == 4


def test_an_engine_without_the_cache_neither_looks_nor_offers(lm: LM) -> None:
    prompt, computed = random_ids(0, 20), counted(lm)
    for prefix_cache in (False, True, False):
        engine = Engine(lm, prefix_cache=prefix_cache)
        engine.add_request(prompt, max_new_tokens=1)
        run(engine)
    assert computed == [20, 20, 20]
    lm.generate(prompt, max_new_tokens=1)
    lm.pool.forget_cached()
    lm.generate(prompt, max_new_tokens=1)
    assert computed[3:] == [4, 20]


def test_a_private_sequence_and_its_forks_are_found_by_nobody(lm: LM) -> None:
    """As one is whose K and V were edited."""
    prompt, computed = random_ids(0, 20), counted(lm)
    with lm.sequence(prompt) as sequence:
        sequence.private = True
        lm.generate(sequence, max_new_tokens=2, eos_token_id=[])
        fork = sequence.fork()
        assert fork.private
        fork.free()
    assert lm.pool.num_cached == 0
    computed.clear()
    lm.generate(prompt, max_new_tokens=1)
    assert computed == [20]


# Writing, and giving up ---------------------------------------------------------------------------------


def test_a_callers_sequence_that_goes_back_into_a_shared_page_leaves_it_to_the_others(lm: LM) -> None:
    prompt = random_ids(0, 19)
    with lm.sequence(prompt) as sequence:
        lm.generate(sequence, **OPTIONS)
        expected = without_cache(prompt, **OPTIONS)
        assert sequence.token_ids[19:] == expected
        other = lm.sequence(prompt)
        lm.generate(other, **OPTIONS)
        assert other.page_table[:4] == sequence.page_table[:4]
        sequence.rewind(14)
        sequence.append(random_ids(9, 6))
        steered = [*prompt, *expected][:14] + random_ids(9, 6)
        assert lm.generate(sequence, **OPTIONS).token_ids == without_cache(steered, **OPTIONS)
        assert lm.generate(prompt, **OPTIONS).token_ids == expected
        other.append(5)
        continued = lm.generate(other, **OPTIONS).token_ids
        assert continued == without_cache([*prompt, *expected, 5], **OPTIONS)
        other.free()


def test_a_page_that_its_only_holder_writes_to_is_not_found_any_more(lm: LM) -> None:
    prompt = random_ids(0, 20)
    with lm.sequence(prompt) as sequence:
        lm.generate(sequence, max_new_tokens=1)
        held = list(sequence.page_table)
        sequence.rewind(3)  # its 21st token, and the last two of its last full page
        sequence.append(random_ids(5, 6))
        assert lm.generate(sequence, **OPTIONS).token_ids == without_cache(list(sequence.token_ids[:24]), **OPTIONS)
        assert sequence.page_table[4] == held[4], "nobody else held it, so there was no need for a copy"
        assert lm.generate(prompt, **OPTIONS).token_ids == without_cache(prompt, **OPTIONS)


def test_cached_pages_give_way_the_least_recently_used_first_and_from_their_end() -> None:
    lm = lm_in_float64(10)
    first, second, third = (random_ids(i, 16) for i in range(3))
    for prompt in (first, second, first):
        lm.generate(prompt, max_new_tokens=1)
    assert (lm.pool.num_cached, lm.pool.num_empty, lm.pool.num_free) == (8, 2, 10)
    lm.generate(third, max_new_tokens=1)
    assert [len(lm.pool.prefixes.find("", prompt, 4)) for prompt in (first, second, third)] == [4, 2, 4]


def test_cached_pages_never_stand_in_the_way() -> None:
    """A pool full of cached pages has room for a request that needs all of it, and for a flood of others."""
    lm = lm_in_float64(10)
    for i in range(30):
        assert lm.generate(random_ids(i, 12), **OPTIONS).token_ids == without_cache(random_ids(i, 12), **OPTIONS)
        assert len(lm.pool.prefixes) <= 10
    assert lm.pool.num_cached > 5
    longest = random_ids(99, 31)
    assert lm.generate(longest, **OPTIONS).token_ids == without_cache(longest, **OPTIONS)


def test_a_request_that_must_wait_gives_back_the_pages_it_found() -> None:
    lm = lm_in_float64(10)
    lm.generate(random_ids(0, 16), max_new_tokens=1)
    engine = Engine(lm)
    engine.add_request(random_ids(1, 17), **{**OPTIONS, "max_new_tokens": 7})
    engine.step()
    waiting = engine.add_request(random_ids(0, 16) + random_ids(2, 12), max_new_tokens=1)
    engine.step()
    assert [request.id for request in engine.scheduler.waiting] == [waiting]
    assert lm.pool.num_cached == 4
    run(engine)
    assert all_free(lm)


# What must not be found ------------------------------------------------------------------------------------


def test_under_hooks_everything_is_computed_and_nothing_is_left_to_others(lm: LM) -> None:
    prompt, point = random_ids(0, 20), "blocks.0.hook_resid_post"
    expected = without_cache(prompt, **OPTIONS)
    assert lm.generate(prompt, **OPTIONS).token_ids == expected
    with lm.capture(point) as acts:
        assert lm.generate(prompt, **OPTIONS).token_ids == expected
    assert acts[point].shape[0] == 20 + 8
    lm.pool.forget_cached()
    with lm.patch(point, lambda values, at: values * 0):
        patched = lm.generate(prompt, **OPTIONS).token_ids
    assert lm.pool.num_cached == 0
    assert lm.generate(prompt, **OPTIONS).token_ids == expected != patched


def test_a_sequence_that_ran_under_hooks_stays_private_after_them(lm: LM) -> None:
    prompt = random_ids(0, 20)
    with lm.sequence(prompt) as sequence:
        with lm.patch("blocks.0.hook_resid_post", lambda values, at: values * 0):
            _ = sequence.logits
        lm.generate(sequence, **OPTIONS)
        assert lm.generate(prompt, **OPTIONS).token_ids == without_cache(prompt, **OPTIONS)


def test_edited_k_and_v_are_found_by_nobody(lm: LM) -> None:
    """Not even where the pages were on offer before, and their holder is the only one."""
    prompt = random_ids(0, 20)
    with lm.sequence(prompt) as sequence:
        lm.generate(sequence, max_new_tokens=1)
        _ = sequence.logits
        k, _v = sequence.kv(0, 5, 9)
        sequence.set_kv(0, 5, k=k * 3)
        assert lm.generate(prompt, **OPTIONS).token_ids == without_cache(prompt, **OPTIONS)
        lm.pool.forget_cached()
        fork = sequence.fork()
        lm.generate(fork, **OPTIONS)
        fork.free()
        assert lm.generate(prompt, **OPTIONS).token_ids == without_cache(prompt, **OPTIONS)


def test_what_came_from_a_file_is_found_by_nobody(lm: LM, tmp_path: Path) -> None:
    prompt = random_ids(0, 20)
    with lm.sequence(prompt) as sequence:
        _ = sequence.logits
        sequence.save(tmp_path / "s.safetensors")
    lm.pool.forget_cached()
    with lm.restore(tmp_path / "s.safetensors") as restored:
        lm.generate(restored, **OPTIONS)
    assert lm.pool.num_cached == 0
