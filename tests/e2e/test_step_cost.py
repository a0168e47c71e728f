"""What a decode step takes beside its compiled part: planning, the batch, choosing, text, calling the threads."""

from __future__ import annotations

import statistics
import sys
import time
from array import array
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import handloom as hl
from handloom.ops.cpu.instructions import WIDTH
from handloom.ops.cpu.threads import Team
from tiny_models import save, tiny_llama

LAYERS, NEW_TOKENS, MOST_MS = 30, 60, 0.5
MOST_FUNCTIONS, MOST_OPERATORS = 102, 2
VOCAB_SIZE, MOST_SAMPLED_MS = 49152, 1.5


def test_a_step_of_thirty_layers_takes_python_less_than_half_a_millisecond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = hl.LM.from_pretrained(save(tiny_llama(num_hidden_layers=LAYERS), tmp_path), device="cpu", backend="cpu")
    assert median_ms(lm, monkeypatch, {"do_sample": False}) < MOST_MS


def test_a_step_does_as_little_of_python_and_torch_in_a_long_sequence_as_in_a_short_one(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=LAYERS, max_position_embeddings=2048)
    lm = hl.LM.from_pretrained(save(model, tmp_path), device="cpu", backend="cpu")
    short, long = (counts(lm, length) for length in (300, 1500))
    assert short == long
    assert short["functions"] <= MOST_FUNCTIONS
    assert short["operators"] <= MOST_OPERATORS


def counts(lm: hl.LM, prompt_length: int) -> dict[str, int]:
    """What a decode step of one sequence of such a length does: functions and lines of Python, operators of torch.

    Each turn of a loop is another line.
    """
    found = {"functions": 0, "lines": 0, "operators": 0}

    def trace(_: FrameType, event: str, argument: object) -> Any:
        found["functions"] += event == "call"
        found["lines"] += event == "line"
        return trace

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found["operators"] += 1
            return function(*args, **(kwargs or {}))

    engine = hl.Engine(lm)
    engine.add_request([1, 2, 3] * (prompt_length // 3), max_new_tokens=8, eos_token_id=None, do_sample=False)
    while not engine.step():
        pass
    engine.step()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        engine.step()
    finally:
        sys.settrace(before)
    with Operators():
        engine.step()
    engine.close()
    return found


@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"top_k": 50, "top_p": 0.9}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0, "min_p": 0.1}],
    ids=str,
)
def test_a_draw_from_fifty_thousand_tokens_takes_a_millisecond_more_at_most_beside_what_it_sorts(
    options: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_llama(vocab_size=VOCAB_SIZE), tmp_path)
    lm = hl.LM.from_pretrained(folder, device="cpu", backend="cpu")
    sorting = sort_ms() if "top_p" in options and not options["top_k"] else 0.0
    assert median_ms(lm, monkeypatch, {"temperature": 0.8, "seed": 0, **options}) < MOST_SAMPLED_MS + sorting


def sort_ms() -> float:
    """What numpy takes to sort that many scores: 0.4 to 1.3 ms, by processor."""
    scores, taken = np.random.default_rng(0).standard_normal(VOCAB_SIZE, dtype=np.float32), []
    for _ in range(NEW_TOKENS):
        started = time.thread_time()
        np.sort(scores)
        taken.append(1e3 * (time.thread_time() - started))
    return statistics.median(taken)


def median_ms(lm: hl.LM, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> float:
    """Milliseconds of this thread in a step, without the model's own table."""
    run, compiled = Team.run, [0.0]

    def timed(team: Team, table: array[int], frame: array[int]) -> None:
        started = time.thread_time()
        run(team, table, frame)
        compiled[0] += (time.thread_time() - started) * (len(table) > WIDTH)

    monkeypatch.setattr(Team, "run", timed)
    engine, taken = hl.Engine(lm), list[float]()
    engine.add_request([1, 2, 3], max_new_tokens=NEW_TOKENS, eos_token_id=None, **options)
    while engine.has_work:
        started, compiled[0] = time.thread_time(), 0.0  # of this thread: others may have the core meanwhile
        engine.step()
        taken.append(1e3 * (time.thread_time() - started - compiled[0]))
    assert len(taken) == NEW_TOKENS
    return statistics.median(taken)
