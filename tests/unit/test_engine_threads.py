"""One engine in the hands of many threads: nobody waits for a step who need not, nothing is told twice or lost, and a
request's tokens are those it has alone."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

from engines import Results, all_free, lm_in_float64, lm_with, run
from handloom.decoding.decoder import Event
from handloom.engine import Engine
from handloom.engine.events import Finished
from handloom.errors import EngineError, InvalidPrompt, RequestFailed
from tiny_models import random_ids

PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 3, 20, 6))]
TIMEOUT = 20.0


def options(which: int) -> dict[str, Any]:
    own: dict[str, Any] = {"max_new_tokens": 5 + 4 * which, "eos_token_id": []}
    return own | ({"do_sample": True, "top_k": 0, "seed": which} if which % 2 else {})


@cache
def alone(which: int) -> list[int]:
    tokens: list[int] = lm_in_float64().generate(PROMPTS[which], **options(which)).token_ids
    return tokens


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("num_pages", [200, 14], ids=["roomy", "tight"])
def test_requests_added_aborted_and_stepped_by_many_threads_have_their_own_tokens(num_pages: int) -> None:
    lm = lm_in_float64(num_pages)
    engine = Engine(lm, max_step_tokens=16, max_running=4)
    watched, gathering = engine.watch(), threading.Lock()
    asked: dict[int, int] = {}
    aborted: set[int] = set()
    asked_all = threading.Event()

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            which = rng.randrange(len(PROMPTS))
            request = engine.add_request(PROMPTS[which], priority=rng.randrange(2), **options(which))
            asked[request] = which
            if rng.random() < 0.3 and engine.abort(victim := rng.choice(list(asked))):
                aborted.add(victim)
            engine.stats()

    def step() -> None:
        while engine.has_work or not asked_all.is_set():
            events = engine.step()
            with gathering:
                told.extend(events)

    told: list[Event] = []
    with ThreadPoolExecutor(6) as pool:
        steppers = [pool.submit(step) for _ in range(2)]
        try:
            for asker in [pool.submit(ask, seed) for seed in range(4)]:
                asker.result(TIMEOUT)
        finally:
            asked_all.set()
        for stepper in steppers:
            stepper.result(TIMEOUT)
    # two threads that step note down their events in any order; a request's own are put in order by its tokens
    ends = Counter(event.request_id for event in told if hasattr(event, "reason"))
    assert set(ends.values()) <= {1}
    assert len(asked) == 48 and ends.keys() | aborted == asked.keys()
    for request, which in asked.items():
        tokens = Counter(e.token_id for e in told if e.request_id == request and hasattr(e, "token_id"))
        expected = Counter(alone(which))
        assert tokens <= expected if request in aborted else tokens == expected
    assert Counter(e.request_id for e in watched if isinstance(e, Finished)) == dict.fromkeys(asked, 1)
    assert (engine.stats().num_finished, engine.has_work) == (48, False)
    assert all_free(lm)


class Gate:
    """A logits processor that stops the step it is called in until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        assert self.opened.wait(TIMEOUT)
        return scores


def test_adding_and_aborting_wait_for_no_step_and_an_abort_frees_its_pages_when_the_step_ends() -> None:
    lm, gate = lm_in_float64(), Gate()
    engine = Engine(lm, prefix_cache=False)
    held = engine.add_request(PROMPTS[0], logits_processor=[gate], **options(0))
    gone = engine.add_request(PROMPTS[1], **options(1))
    waited: list[list[Event]] = []
    stepper = in_thread(lambda: waited.append(engine.step()))
    assert gate.reached.wait(TIMEOUT)
    free = lm.pool.num_free
    assert engine.abort(gone)
    assert not engine.abort(gone)
    late = engine.add_request(PROMPTS[2], **options(2))
    assert (engine.stats().waiting, stepper.is_alive(), lm.pool.num_free) == (1, True, free)
    gate.opened.set()
    stepper.join(TIMEOUT)
    assert lm.pool.num_free > free, "without another step"
    assert [request.id for request in engine.scheduler] == [held, late]
    results = Results()
    results.take(waited[0])
    run(engine, results)
    assert results.tokens[held] == alone(0) and results.tokens[late] == alone(2)
    assert results.ends.keys() == {held, late}
    assert all_free(lm)


def test_a_second_thread_that_steps_waits_for_the_first() -> None:
    lm, gate = lm_in_float64(), Gate()
    engine = Engine(lm)
    request = engine.add_request(PROMPTS[0], logits_processor=[gate], **options(0))
    told: list[list[Event]] = []
    first = in_thread(lambda: told.append(engine.step()))
    assert gate.reached.wait(TIMEOUT)
    second = in_thread(lambda: told.append(engine.step()))
    second.join(0.05)
    assert second.is_alive() and not told
    gate.opened.set()
    for thread in (first, second):
        thread.join(TIMEOUT)
    assert sorted(event.token_id for events in told for event in events if hasattr(event, "token_id")) == sorted(
        alone(0)[:2]
    )
    assert engine.abort(request) and all_free(lm)


def test_a_request_that_aborts_itself_inside_a_step_is_over_after_it() -> None:
    lm = lm_in_float64()
    engine = Engine(lm)

    def leave(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == len(PROMPTS[0]) + 2:
            assert engine.abort(leaver)
        return scores

    leaver = engine.add_request(PROMPTS[0], logits_processor=[leave], **options(0))
    other = engine.add_request(PROMPTS[1], **options(1))
    results = run(engine)
    assert results.tokens == {leaver: alone(0)[:3], other: alone(1)}
    assert results.ends.keys() == {other}
    assert all_free(lm)


def test_a_step_inside_a_step_is_refused_rather_than_wait_for_itself() -> None:
    lm = lm_with()
    engine = Engine(lm)

    def step(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        engine.step()
        return scores

    request = engine.add_request(PROMPTS[0], logits_processor=[step], max_new_tokens=3)
    error = run(engine).ends[request].error
    assert isinstance(error, RequestFailed) and isinstance(error.__cause__, EngineError)
    assert all_free(lm)


def test_of_threads_that_want_one_sequence_one_gets_it() -> None:
    lm = lm_with()
    engine = Engine(lm)
    sequence = lm.sequence(PROMPTS[0])

    def ask(_: int) -> bool:
        try:
            engine.add_request(sequence, max_new_tokens=2)
        except InvalidPrompt:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(32))) == 1
    run(engine)
    engine.add_request(sequence, max_new_tokens=2)
    engine.close()
    sequence.free()
    assert all_free(lm)


def test_engines_and_sequences_of_one_model_share_its_pages_from_several_threads() -> None:
    """Each thread takes, shares and gives back pages; whoever wrote to another's would change a token."""
    lm = lm_in_float64(60)

    def generate(which: int) -> bool:
        return all(lm.generate(PROMPTS[which], **options(which)).token_ids == alone(which) for _ in range(4))

    def live(which: int) -> bool:
        for _ in range(4):
            with lm.sequence(PROMPTS[which]) as sequence:
                tokens = []
                for _ in range(5):
                    fork = sequence.fork()
                    tokens.append(int(fork.logits.argmax()))
                    sequence.append(tokens[-1])
                if tokens != alone(0)[:5]:
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        futures = [*(pool.submit(generate, which) for which in (0, 1, 2)), pool.submit(live, 0)]
        assert all(future.result(TIMEOUT) for future in futures)
    assert all_free(lm)
