"""K and V in host memory: what comes back is bit for bit what went, within a limit, and edits are never lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Results, all_free, lm_in_float64, lm_with, run
from handloom.decoding.decoder import Event
from handloom.engine import Engine
from handloom.engine.events import Admitted, Preempted
from handloom.errors import InvalidParam, OutOfPages, UnsupportedOption
from handloom.live import LiveSequence
from handloom.lm import LM
from tiny_models import random_ids

PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 3, 20, 6))]
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": []}


def kept(sequence: LiveSequence) -> list[torch.Tensor]:
    return [values for layer in range(len(sequence.pool.layers)) for values in sequence.kv(layer)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def edit(sequence: LiveSequence) -> None:
    """Set K to something the model would not make of the tokens."""
    _ = sequence.logits
    k, _v = sequence.kv(0, 1, 6)
    sequence.set_kv(0, 1, k=k.flip(0) * 2)


def nothing_left(lm: LM) -> bool:
    return all_free(lm) and lm.pool.spilled_bytes == 0


# A sequence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_comes_back_is_what_went_on_other_pages(family: str) -> None:
    lm = lm_with(20, family=family)
    sequence = lm.sequence(PROMPTS[1])
    logits, before, pages = sequence.logits, kept(sequence), list(sequence.page_table)
    sequence.spill()
    assert (sequence.page_table, all_free(lm), sequence.num_computed) == ([], True, 14)
    assert lm.pool.spilled_bytes == 4 * lm.pool.page_bytes
    with lm.sequence(PROMPTS[2]) as other:
        _ = other.logits
        assert same(kept(sequence), before) and sequence.page_table != pages
        assert torch.equal(sequence.logits, logits)
    assert lm.pool.spilled_bytes == 0
    sequence.free()
    assert nothing_left(lm)


def test_a_page_has_the_bytes_of_its_keys_and_values() -> None:
    pool = lm_in_float64(7, page_size=4).pool
    k_pages, v_pages = pool.layers[0]
    assert pool.page_bytes == len(pool.layers) * (k_pages[0].nbytes + v_pages[0].nbytes)
    assert pool.page_bytes * 7 == sum(storage.nbytes for storage in pool.storages.values())


def test_forks_of_a_spilled_sequence_share_what_was_spilled_and_go_their_ways() -> None:
    lm = lm_with(20)
    sequence = lm.sequence(PROMPTS[1])
    _ = sequence.logits
    before = kept(sequence)
    sequence.spill()
    held, fork = lm.pool.spilled_bytes, sequence.fork()
    second = fork.fork()
    assert lm.pool.spilled_bytes == held
    second.rewind(5)
    assert same(kept(second), [values[:9] for values in before])
    fork.append(5)
    _ = fork.logits
    assert same([values[:14] for values in kept(fork)], before) and lm.pool.spilled_bytes == held
    assert same(kept(sequence), before) and lm.pool.spilled_bytes == 0
    for own in (sequence, fork, second):
        own.free()
    assert nothing_left(lm)


@pytest.mark.parametrize("how", ["free", "rewind", "truncate", "collect", "forget"])
def test_what_nobody_wants_any_more_is_dropped(how: str) -> None:
    lm = lm_with(20)
    sequence = lm.sequence(PROMPTS[1])
    _ = sequence.logits
    sequence.spill()
    if how == "rewind":
        sequence.rewind(len(sequence))
    elif how == "truncate":
        sequence.truncate_left(3)
    elif how == "forget":
        sequence.forget(0)
    elif how == "free":
        sequence.free()
    else:
        del sequence
    assert nothing_left(lm)


def test_a_spilled_sequence_can_be_evicted_from_saved_and_edited(tmp_path: Path) -> None:
    lm = lm_with(40)
    sequence = lm.sequence(PROMPTS[1])
    _ = sequence.logits
    twin = sequence.fork()
    for act in (
        lambda own: own.evict(3, 6),
        lambda own: own.remove(0, 2),
        lambda own: own.set_kv(1, 5, v=own.kv(1, 5, 6)[1] * 2),
        lambda own: own.save(tmp_path / "s.safetensors"),
    ):
        sequence.spill()
        act(sequence)
        act(twin)
        assert same(
            [pages.flatten(0, 1)[sequence.cached_slots(0, sequence.num_cached)] for pages in lm.pool.layers[1]],
            [pages.flatten(0, 1)[twin.cached_slots(0, twin.num_cached)] for pages in lm.pool.layers[1]],
        )
    assert torch.equal(sequence.logits, twin.logits)
    for own in (sequence, twin):
        own.free()
    assert nothing_left(lm)


def test_what_does_not_fit_stays_in_host_memory_and_nothing_changes() -> None:
    lm = lm_with(5)
    sequence = lm.sequence(PROMPTS[1])
    _ = sequence.logits
    before = kept(sequence)
    sequence.spill()
    with lm.sequence(PROMPTS[0]) as other:
        _ = other.logits
        for act in (lambda: sequence.fork().kv(0), lambda: sequence.kv(0), sequence.bring_back):
            with pytest.raises(OutOfPages):
                act()
        assert (sequence.page_table, lm.pool.num_free) == ([], 2)
    assert same(kept(sequence), before)
    sequence.free()
    assert nothing_left(lm)


# An engine ---------------------------------------------------------------------------------------------


class Limited(Engine):
    """Checks the limit on host memory after every step."""

    def step(self) -> list[Event]:
        events = super().step()
        assert self.model.pool.spilled_bytes <= self.scheduler.spill_bytes
        return events


@pytest.mark.parametrize("max_step_tokens", [512, 5])
def test_spilled_requests_compute_no_token_twice_and_keep_every_bit(max_step_tokens: int) -> None:
    roomy, tight = lm_in_float64(), lm_in_float64(12)
    alone = [roomy.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
    engine = Limited(tight, max_step_tokens=max_step_tokens, prefix_cache=False)
    told = engine.watch()
    sequences = [tight.sequence(prompt) for prompt in PROMPTS]
    requests = [engine.add_request(sequence, **GREEDY) for sequence in sequences]
    results, bits = Results(), {}
    while engine.has_work:
        results.take(engine.step())
        for sequence in sequences:
            if sequence.spilled is not None and id(sequence) not in bits:
                bits[id(sequence)] = [
                    values[:, :, : sequence.num_computed // 4].clone() for values in sequence.spilled._values
                ]
        for sequence in sequences:
            if id(sequence) in bits and sequence.spilled is None:
                went = bits.pop(id(sequence))
                pages = sequence.page_table[: went[0].shape[2]]
                assert same([storage[:, :, pages] for storage in tight.pool.storages.values()], went)
        for sequence, request in zip(sequences, requests, strict=True):
            if request in results.ends:
                sequence.free()
    assert [results.tokens[request] for request in requests] == alone
    stats = engine.stats()
    assert stats.num_spilled == stats.num_preempted > 0
    assert stats.num_computed == sum(len(prompt) + 24 - 1 for prompt in PROMPTS)
    assert (stats.hit_rate, stats.spilled_bytes) == (0, 0), "coming back is no hit"
    preempted = [event for event in told if isinstance(event, Preempted)]
    assert all(event.num_kept == event.num_computed > 0 for event in preempted)
    for event in preempted:
        back = next(
            e for e in told if isinstance(e, Admitted) and e.request_id == event.request_id and e.time > event.time
        )
        assert back.num_cached == event.num_kept
    assert nothing_left(tight)


def test_the_limit_decides_who_is_spilled_and_the_others_are_computed_again() -> None:
    tight = lm_in_float64(12)
    alone = [lm_in_float64().generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
    engine = Limited(tight, spill_bytes=3 * tight.pool.page_bytes)
    requests = [engine.add_request(prompt, **GREEDY) for prompt in PROMPTS]
    results = run(engine)
    assert [results.tokens[request] for request in requests] == alone
    stats = engine.stats()
    assert 0 < stats.num_spilled < stats.num_preempted
    assert nothing_left(tight)


@pytest.mark.parametrize("spill_bytes", [True, -1, 1.0, "all"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(spill_bytes: Any) -> None:
    with pytest.raises(InvalidParam, match="spill_bytes"):
        Engine(lm_with(), spill_bytes=spill_bytes)


def test_an_aborted_request_leaves_nothing_in_host_memory() -> None:
    lm = lm_in_float64(12)
    engine = Engine(lm)
    for prompt in PROMPTS:
        engine.add_request(prompt, **GREEDY)
    while not lm.pool.spilled_bytes:
        engine.step()
    engine.close()
    assert nothing_left(lm)


# What cannot be computed again -------------------------------------------------------------------------


def edited_alone(new_tokens: int = 24) -> list[int]:
    lm = lm_in_float64()
    with lm.sequence(PROMPTS[1]) as sequence:
        edit(sequence)
        tokens: list[int] = lm.generate(sequence, **{**GREEDY, "max_new_tokens": new_tokens}).token_ids
    assert tokens != lm.generate(PROMPTS[1], **GREEDY).token_ids[:new_tokens], "the edit changes nothing to lose"
    return tokens


def test_an_edited_sequence_that_is_preempted_keeps_its_edits() -> None:
    lm = lm_in_float64(14)
    sequence = lm.sequence(PROMPTS[1])
    edit(sequence)
    engine = Limited(lm)
    first = engine.add_request(PROMPTS[3], **GREEDY)
    second = engine.add_request(sequence, **GREEDY)
    results = run(engine)
    assert engine.stats().num_spilled > 0
    assert results.tokens[second] == edited_alone()
    assert results.tokens[first] == lm_in_float64().generate(PROMPTS[3], **GREEDY).token_ids
    sequence.free()
    assert nothing_left(lm)


def test_without_host_memory_an_edited_sequence_keeps_its_pages_and_those_before_it_wait() -> None:
    """Of 13 pages the second takes six; the first, which comes before it, would need eight after nine tokens."""
    lm = lm_in_float64(13)
    sequence = lm.sequence(PROMPTS[1])
    edit(sequence)
    engine, results = Limited(lm, spill_bytes=0), Results()
    first = engine.add_request(PROMPTS[3], **GREEDY)
    second = engine.add_request(sequence, **{**GREEDY, "max_new_tokens": 11})
    while second not in results.ends:
        results.take(engine.step())
    assert results.tokens[second] == edited_alone(11)
    assert len(results.tokens[first]) < 11
    sequence.free()
    run(engine, results)
    assert results.tokens[first] == lm_in_float64().generate(PROMPTS[3], **GREEDY).token_ids
    assert engine.stats().num_preempted == 0
    assert nothing_left(lm)


def test_where_nobody_could_go_on_the_last_edited_one_ends_and_loses_nothing() -> None:
    lm = lm_in_float64(10)
    sequence = lm.sequence(PROMPTS[1])
    edit(sequence)
    engine = Limited(lm, spill_bytes=0)
    with lm.patch("blocks.0.hook_resid_post", lambda values, at: values * 1.5):
        first = engine.add_request(PROMPTS[0], **GREEDY)
        engine.step()
    second = engine.add_request(sequence, **GREEDY)
    results = run(engine)
    error = results.ends[second].error
    assert isinstance(error, OutOfPages) and "Give the engine more spill_bytes" in str(error)
    told = results.tokens[second]
    assert told == edited_alone()[: len(told)] and sequence.token_ids == PROMPTS[1] + told
    assert first in results.ends
    rest = {**GREEDY, "max_new_tokens": 24 - len(told)}
    assert told + lm.generate(sequence, **rest).token_ids == edited_alone()
    sequence.free()
    assert nothing_left(lm)


def test_an_edited_sequence_that_waits_gives_its_pages_and_keeps_its_edits() -> None:
    lm = lm_in_float64(8)
    sequence = lm.sequence(PROMPTS[1])
    edit(sequence)
    outputs = lm.generate([PROMPTS[3], sequence], **{**GREEDY, "max_new_tokens": 11})
    assert [output.error for output in outputs] == [None, None]
    assert outputs[1].token_ids == edited_alone(11)
    sequence.free()
    assert nothing_left(lm)


def test_the_caller_can_read_a_sequence_whose_request_waits_in_host_memory() -> None:
    lm = lm_in_float64(14)
    sequence = lm.sequence(PROMPTS[1])
    edit(sequence)
    engine = Limited(lm)
    first = engine.add_request(PROMPTS[3], **GREEDY)
    second = engine.add_request(sequence, **GREEDY)
    results = Results()
    while sequence.spilled is None:
        results.take(engine.step())
    fork = sequence.fork()
    assert engine.abort(first)
    k, _v = fork.kv(0, 1, 6)
    assert sequence.spilled is not None
    assert torch.equal(sequence.kv(0, 1, 6)[0], k)
    fork.free()
    run(engine, results)
    assert results.tokens[second] == edited_alone()
    sequence.free()
    assert nothing_left(lm)


def test_prompt_logprobs_that_would_forget_edits_are_refused() -> None:
    lm = lm_with()
    with lm.sequence(PROMPTS[1]) as sequence:
        edit(sequence)
        before = kept(sequence)
        with pytest.raises(UnsupportedOption, match="pass its token_ids instead"):
            lm.generate(sequence, prompt_logprobs=0)
        assert same(kept(sequence), before)
        lm.generate(sequence.token_ids, prompt_logprobs=0, max_new_tokens=1)
