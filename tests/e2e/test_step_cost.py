"""What a decode step takes beside its compiled part: planning, the batch, choosing, text, calling the threads."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest

import handloom as hl
from handloom.ops.cpu.threads import Team
from tiny_models import save, tiny_llama

LAYERS, NEW_TOKENS, MOST_MS = 30, 60, 0.5


def test_a_step_of_thirty_layers_takes_python_less_than_half_a_millisecond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = hl.LM.from_pretrained(save(tiny_llama(num_hidden_layers=LAYERS), tmp_path), device="cpu", backend="cpu")
    run, compiled = Team.run, [0.0]

    def timed(team: Team, table: np.ndarray, frame: np.ndarray) -> None:
        started = time.thread_time()
        run(team, table, frame)
        compiled[0] += time.thread_time() - started

    monkeypatch.setattr(Team, "run", timed)
    engine, taken = hl.Engine(lm), list[float]()
    engine.add_request("one two three", max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    while engine.has_work:
        started, compiled[0] = time.thread_time(), 0.0  # of this thread: others may have the core meanwhile
        engine.step()
        taken.append(1e3 * (time.thread_time() - started - compiled[0]))
    assert len(taken) == NEW_TOKENS
    assert statistics.median(taken) < MOST_MS
