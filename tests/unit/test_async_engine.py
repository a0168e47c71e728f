"""The engine among tasks: tokens are those of `generate`, nothing blocks a loop, nobody fills memory or keeps pages."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import handloom as hl
from engines import all_free, lm_in_float64
from handloom.decoding.decoder import Event, FinishedEvent, TokenEvent
from handloom.decoding.score import ScoreDecoder
from handloom.engine.events import Preempted
from handloom.errors import EngineError, EngineFull, InvalidParam, InvalidPrompt, NonFiniteLogits, RequestFailed
from handloom.lm import LM
from tiny_models import random_ids

T = TypeVar("T")
PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 3, 20, 6))]
TIMEOUT = 20.0


def options(which: int, new_tokens: int = 12) -> dict[str, Any]:
    own: dict[str, Any] = {"max_new_tokens": new_tokens + which, "eos_token_id": []}
    return own | ({"do_sample": True, "top_k": 0, "seed": which} if which % 2 else {})


@cache
def alone(which: int, new_tokens: int = 12) -> list[int]:
    tokens: list[int] = lm_in_float64().generate(PROMPTS[which], **options(which, new_tokens)).token_ids
    return tokens


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, TIMEOUT))


async def tokens_of(events: AsyncIterator[Event]) -> list[int]:
    tokens: list[int] = []
    async for event in events:
        if isinstance(event, TokenEvent):
            tokens.append(event.token_id)
    assert isinstance(event, FinishedEvent) and event.error is None
    return tokens


async def free_of(lm: LM) -> bool:
    """Whether all pages come back, which they do when the step that is running ends."""
    for _ in range(2000):
        if all_free(lm):
            return True
        await asyncio.sleep(0.001)
    return False


class Gate:
    """A logits processor that stops the step it is called in until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.reached.set()
        assert self.opened.wait(TIMEOUT)
        return scores


@pytest.mark.parametrize("num_pages", [200, 14], ids=["roomy", "tight"])
def test_tasks_get_the_tokens_they_get_alone_and_the_thread_goes_when_nobody_asks(num_pages: int) -> None:
    lm = lm_in_float64(num_pages)

    async def main() -> None:
        async with hl.AsyncEngine(lm, max_step_tokens=16, max_running=4) as engine:
            which = [i % len(PROMPTS) for i in range(20)]
            found = await asyncio.gather(*(tokens_of(engine.generate(PROMPTS[i], **options(i))) for i in which))
            assert found == [alone(i) for i in which]
            while engine._thread is not None:
                await asyncio.sleep(0.001)
            assert await tokens_of(engine.generate(PROMPTS[0], **options(0))) == alone(0)
            assert engine.stats().num_finished == 21

    run(main())
    assert all_free(lm)


def test_what_is_wrong_with_a_request_is_raised_or_told_and_harms_no_other() -> None:
    lm = lm_in_float64()

    async def main() -> None:
        async with hl.AsyncEngine(lm) as engine:
            other = asyncio.create_task(tokens_of(engine.generate(PROMPTS[0], **options(0))))
            for prompt, own, error in (([-1], {}, InvalidPrompt), ([5], {"top_p": 7}, InvalidParam)):
                with pytest.raises(error):
                    await anext(engine.generate(prompt, **own))
            with pytest.raises(InvalidParam, match="priority"):
                await anext(engine.generate([5], priority="high"))  # type: ignore[arg-type]
            with lm.sequence(PROMPTS[1]) as sequence:
                first = engine.generate(sequence, **options(1))
                await anext(first)
                with pytest.raises(InvalidPrompt, match="in use"):
                    await anext(engine.generate(sequence))
                await first.aclose()
            failing = {"logits_processor": [lambda ids, scores: scores * torch.nan]}
            *_, end = [event async for event in engine.generate(PROMPTS[2], **failing)]
            assert isinstance(end, FinishedEvent) and isinstance(end.error, NonFiniteLogits)
            assert await other == alone(0)

    run(main())
    assert all_free(lm)
    for limits in ({"max_waiting": 0}, {"max_events": 0}, {"max_running": 0}):
        with pytest.raises(InvalidParam, match="1 or more"):
            hl.AsyncEngine(lm, **limits)


@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "raise", "timeout"])
def test_who_leaves_ends_the_request_and_frees_its_pages(how: str) -> None:
    lm = lm_in_float64()

    async def read(events: AsyncIterator[Event]) -> None:
        async for _ in events:
            if how == "break":
                break
            if how == "raise":
                raise ZeroDivisionError

    async def main() -> None:
        engine = hl.AsyncEngine(lm)
        staying = asyncio.create_task(tokens_of(engine.generate(PROMPTS[0], **options(0, 60))))
        events = engine.generate(PROMPTS[1], max_new_tokens=200, eos_token_id=[])
        await anext(events)
        if how == "aclose":
            await events.aclose()
        elif how in ("break", "raise"):
            await asyncio.gather(read(events), return_exceptions=True)
            del events
        elif how == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read(events), 0.01)
        else:
            task = asyncio.create_task(read(events))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await staying == alone(0, 60)
        assert await free_of(lm)
        assert engine.stats().num_finished == 2

    run(main())


def test_a_request_that_is_left_while_it_waits_outside_never_runs() -> None:
    lm = lm_in_float64()

    async def main() -> None:
        async with hl.AsyncEngine(lm, max_waiting=1, max_running=1) as engine:
            running = engine.generate(PROMPTS[0], max_new_tokens=200, eos_token_id=[])
            await anext(running)
            tasks = [asyncio.create_task(tokens_of(engine.generate(PROMPTS[i], **options(i)))) for i in (1, 2, 3)]
            await asyncio.sleep(0.01)
            tasks[2].cancel()
            await running.aclose()
            assert [await task for task in tasks[:2]] == [alone(1), alone(2)]
            assert tasks[2].cancelled() and engine.stats().num_finished == 3

    run(main())
    assert all_free(lm)


# Back-pressure ---------------------------------------------------------------------------------------


def test_no_more_than_max_waiting_wait_inside_and_who_will_not_wait_outside_is_told() -> None:
    lm, gate = lm_in_float64(), Gate()

    async def main() -> None:
        async with hl.AsyncEngine(lm, max_waiting=2, max_running=1) as engine:
            most = 0

            def spy(input_ids: Tensor, scores: Tensor) -> Tensor:
                nonlocal most
                most = max(most, engine._engine.num_waiting)
                return scores

            held = asyncio.create_task(tokens_of(engine.generate(PROMPTS[0], logits_processor=[gate], **options(0))))
            await asyncio.to_thread(gate.reached.wait, TIMEOUT)
            which = [i % len(PROMPTS) for i in range(8)]
            others = [
                asyncio.create_task(tokens_of(engine.generate(PROMPTS[i], logits_processor=[spy], **options(i))))
                for i in which
            ]
            await asyncio.sleep(0.01)
            with pytest.raises(EngineFull, match="2 requests wait"):
                await anext(engine.generate(PROMPTS[1], wait=False))
            assert engine.stats().waiting == 8
            gate.opened.set()
            assert [await task for task in others] == [alone(i) for i in which]
            assert await held == alone(0)
            assert most == 2
            assert await tokens_of(engine.generate(PROMPTS[1], wait=False, **options(1))) == alone(1)

    run(main())
    assert all_free(lm)


@pytest.mark.parametrize(("num_pages", "max_running"), [(200, 8), (24, 8), (200, 1)], ids=["roomy", "pages", "places"])
def test_a_slow_reader_pauses_its_request_which_holds_up_nobody_and_ends_with_the_same_tokens(
    num_pages: int, max_running: int
) -> None:
    lm = lm_in_float64(num_pages)

    async def main() -> None:
        engine = hl.AsyncEngine(lm, max_events=4, max_running=max_running)
        told = engine.watch()
        slow = engine.generate(PROMPTS[1], **options(1, 60))
        first = await anext(slow)
        others = (0, 2, 3, 4)
        found = await asyncio.gather(*(tokens_of(engine.generate(PROMPTS[i], **options(i, 50))) for i in others))
        assert found == [alone(i, 50) for i in others]
        (stream,) = engine._streams.values()
        held = len(stream.events)
        assert held in (3, 4), "the first event was taken when four were there, or before"
        for _ in range(5):
            assert stream.paused and len(stream.events) == held
            await asyncio.sleep(0.002)
        assert any(isinstance(event, Preempted) for event in told) == (num_pages == 24 or max_running == 1)
        rest = await tokens_of(slow)
        assert isinstance(first, TokenEvent) and [first.token_id, *rest] == alone(1, 60)
        await engine.aclose()

    run(main())
    assert all_free(lm)


def test_a_request_goes_on_that_was_paused_while_the_last_of_its_events_were_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, pausing = lm_in_float64(), threading.Event()

    async def main() -> None:
        engine = hl.AsyncEngine(lm, max_events=4)
        pause = engine._engine.pause

        def late(request: int) -> bool:
            (stream,) = engine._streams.values()
            pausing.set()
            while stream.events:
                time.sleep(0.001)
            return pause(request)

        monkeypatch.setattr(engine._engine, "pause", late)
        events = engine.generate(PROMPTS[1], **options(1, 60))
        first = await anext(events)
        await asyncio.to_thread(pausing.wait)
        assert isinstance(first, TokenEvent) and [first.token_id, *await tokens_of(events)] == alone(1, 60)
        await engine.aclose()

    run(main())


def test_a_loop_goes_on_while_a_step_runs() -> None:
    lm, gate = lm_in_float64(), Gate()

    async def main() -> None:
        async with hl.AsyncEngine(lm) as engine:
            held = asyncio.create_task(tokens_of(engine.generate(PROMPTS[0], logits_processor=[gate], **options(0))))
            await asyncio.to_thread(gate.reached.wait, TIMEOUT)
            late = asyncio.create_task(tokens_of(engine.generate(PROMPTS[2], **options(2))))
            left = engine.generate(PROMPTS[1])
            leaving = asyncio.create_task(anext(left))
            for _ in range(20):
                await asyncio.sleep(0.001)
                engine.stats()
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            gate.opened.set()
            assert (await held, await late) == (alone(0), alone(2))

    run(main())
    assert all_free(lm)


# Failure and ends --------------------------------------------------------------------------------------


def test_a_step_that_raises_ends_every_request_of_it_with_the_cause_and_later_ones_are_served() -> None:
    lm = lm_in_float64()

    async def main() -> None:
        async with hl.AsyncEngine(lm) as engine:
            runner, cause = engine._engine.runner, MemoryError("none left")
            model = runner.transformer

            class Broken:
                def forward(self, *_: Any) -> Tensor:
                    raise cause

            iterators = [engine.generate(prompt, **options(1)) for prompt in PROMPTS]
            await asyncio.gather(*map(anext, iterators))
            runner.transformer = Broken()  # type: ignore[assignment]
            ends = await asyncio.gather(*map(tokens_of, iterators), return_exceptions=True)
            assert all(isinstance(end, EngineError) and end.__cause__ is cause for end in ends)
            assert len({id(end) for end in ends}) == len(PROMPTS)
            runner.transformer = model
            assert await free_of(lm)
            assert await tokens_of(engine.generate(PROMPTS[0], **options(0))) == alone(0)

    run(main())


def test_a_decoder_that_cannot_be_asked_for_anything_is_told_to_its_task_alone() -> None:
    class Dumb(ScoreDecoder):
        @property
        def max_length(self) -> int:
            raise ZeroDivisionError("mine")

    lm = lm_in_float64()

    async def main() -> None:
        async with hl.AsyncEngine(lm) as engine:
            running = engine.generate(PROMPTS[0], **options(0))
            first = await anext(running)
            with pytest.raises(RequestFailed, match=r"ZeroDivisionError.*max_length"):
                await tokens_of(engine.run(Dumb(lm.encode(PROMPTS[1]))))
            assert isinstance(first, TokenEvent) and [first.token_id, *await tokens_of(running)] == alone(0)

    run(main())
    assert all_free(lm)


def test_closing_ends_what_runs_and_what_waits_and_the_engine_serves_no_more() -> None:
    lm = lm_in_float64()

    async def main() -> None:
        engine = hl.AsyncEngine(lm, max_running=1, max_waiting=1)
        tasks = [
            asyncio.create_task(tokens_of(engine.generate(prompt, max_new_tokens=200, eos_token_id=[])))
            for prompt in PROMPTS
        ]
        while not engine.stats().num_chosen:
            await asyncio.sleep(0.001)
        await engine.aclose()
        assert all_free(lm) and engine._thread is None
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, EngineError) and "closed" in str(end) for end in ends)
        with pytest.raises(EngineError, match="closed"):
            await anext(engine.generate(PROMPTS[0]))
        await engine.aclose()

    run(main())


def test_one_engine_serves_several_loops_one_after_another_and_at_once() -> None:
    lm = lm_in_float64()
    engine = hl.AsyncEngine(lm)
    found: dict[int, list[int]] = {}

    def loop(which: int) -> None:
        found[which] = run(tokens_of(engine.generate(PROMPTS[which], **options(which))))

    loop(0)
    threads = [threading.Thread(target=loop, args=(which,)) for which in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert found == {which: alone(which) for which in range(4)}
    assert all_free(lm)


@pytest.mark.parametrize("max_events", [4, 500], ids=["paused", "running"])
def test_requests_of_a_loop_that_was_closed_under_them_end(max_events: int) -> None:
    lm = lm_in_float64()
    engine = hl.AsyncEngine(lm, max_events=max_events)
    dead = asyncio.new_event_loop()
    events = engine.generate(PROMPTS[1], max_new_tokens=200, eos_token_id=[])
    dead.run_until_complete(anext(events))
    dead.close()

    async def main() -> None:
        assert await tokens_of(engine.generate(PROMPTS[0], **options(0))) == alone(0)
        assert await free_of(lm)

    run(main())
    del events
