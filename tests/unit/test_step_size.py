"""Steps that found no memory get smaller, and grow back when there has been enough for long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import handloom as hl
from engines import lm_with
from handloom.engine import memory
from handloom.engine.memory import GOOD_STEPS, StepSize
from handloom.errors import OutOfMemory
from tiny_models import random_ids

SHORTAGE = torch.OutOfMemoryError("CUDA out of memory.")


def good_steps_until_it_grows(size: StepSize) -> int:
    before, count = size.now, 0
    while size.now == before:
        size.ran()
        count += 1
    return count


def test_it_grows_back_to_what_was_asked_and_waits_longer_after_each_shortage() -> None:
    size = StepSize(100)
    size.shrink(100, "", SHORTAGE)
    size.shrink(50, "", SHORTAGE)
    assert size.now == 25
    assert [good_steps_until_it_grows(size) for _ in range(2)] == [2 * GOOD_STEPS] * 2
    assert size.now == 100
    for _ in range(5 * GOOD_STEPS):
        size.ran()
    assert size.now == 100
    size.shrink(90, "", SHORTAGE)
    assert (size.now, good_steps_until_it_grows(size), size.now) == (45, 4 * GOOD_STEPS, 90)
    with pytest.raises(OutOfMemory, match="a step of one token"):
        size.shrink(1, "", SHORTAGE)


def test_an_engine_short_of_memory_for_a_while_takes_large_steps_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GOOD_STEPS", 8)
    lm, prompt = lm_with(), random_ids(3, 60)
    expected = lm.generate(prompt, max_new_tokens=30).token_ids
    engine = hl.Engine(lm, max_step_tokens=64, prefix_cache=False)
    run, room, steps = engine.runner.run, 16, []

    def short(works: Any, owners: Any = None) -> Any:
        tokens = sum(work.num_tokens for work in works)
        if tokens > room:
            raise SHORTAGE
        steps.append(tokens)
        return run(works, owners)

    monkeypatch.setattr(engine.runner, "run", short)
    for _ in range(2):
        engine.add_request(prompt, max_new_tokens=30)
        tokens = [event.token_id for event in iter_events(engine) if isinstance(event, hl.TokenEvent)]
        assert tokens == expected
        room = 64
    assert max(steps[: len(steps) // 2]) <= 16 < max(steps)
    assert engine.scheduler.max_tokens == 64


def iter_events(engine: hl.Engine) -> list[Any]:
    events = []
    while engine.has_work:
        events += engine.step()
    return events
