"""The compiled CPU backend as a whole model: one call per step, a request's bits its own, half precision, threads."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor

import handloom as hl
from handloom.cache.batch import Work
from handloom.lm import LM
from handloom.ops.cpu import blocks, compiled_step
from handloom.ops.cpu import instructions as ins
from handloom.ops.cpu.instructions import Frame
from handloom.ops.cpu.machine import run_once
from handloom.ops.cpu.threads import Team, Teams
from handloom_kernels.reference import Rotary
from parity_checks import hf_logits, load_pair, run
from tiny_models import TINY, random_ids, save

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(scope="module", params=sorted(TINY))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TINY[request.param](21), tmp_path_factory.mktemp(request.param), tokenizer=False)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads a step takes, to be changed."""
    count = [2]
    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: count[0])
    return count


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LM:
    return hl.LM.from_pretrained(folder, dtype=dtype, device="cpu", backend="cpu")


def all_logits(lm: LM, ids: list[int]) -> Tensor:
    """Logits [n, vocab_size] of all positions, in one step."""
    with lm.sequence(ids) as sequence:
        return run(lm, [Work(sequence, len(ids), "all")])


@DTYPES
def test_logits_are_the_same_bits_alone_and_in_any_company_in_one_go_and_in_chunks(
    folder: Path, dtype: torch.dtype, threads: list[int]
) -> None:
    lm, rng, ids = load(folder, dtype), random.Random(3), random_ids(1, 90)
    expected = all_logits(lm, ids)
    for company in (1, 2, 7, 16, 63):
        threads[0] = rng.choice((1, 2, 3))
        with lm.sequence(ids) as mine:
            got: list[Tensor] = []
            while len(got) < len(ids):
                with ExitStack() as stack:
                    prompts = [random_ids(rng.randrange(10**6), rng.randint(1, 12)) for _ in range(company)]
                    works = [Work(stack.enter_context(lm.sequence(p)), len(p), "none") for p in prompts]
                    count = min(len(ids) - len(got), rng.choice((1, 1, 2, 30, 70)))
                    works.insert(rng.randrange(company), Work(mine, count, "all"))
                    got += run(lm, works)
        assert torch.equal(torch.stack(got), expected), company


@DTYPES
def test_one_call_computes_what_the_ops_compute_one_by_one(folder: Path, dtype: torch.dtype) -> None:
    lm, ids = load(folder, dtype), random_ids(2, 40)
    in_one_call = all_logits(lm, ids)
    lm.transformer.program = None
    assert torch.equal(all_logits(lm, ids), in_one_call)


@DTYPES
def test_a_hooked_step_and_a_capture_change_no_bit(folder: Path, dtype: torch.dtype) -> None:
    lm, ids = load(folder, dtype), random_ids(2, 40)
    free = all_logits(lm, ids)
    with lm.capture("*") as acts, lm.sequence(ids) as sequence:
        assert torch.equal(sequence.logits, free[-1])
    assert all(acts[point].isfinite().all() for point in lm.hook_points())


def test_bfloat16_is_nearer_to_float64_than_transformers_bfloat16(folder: Path) -> None:
    pair, ids = load_pair(folder, dtype=torch.bfloat16), random_ids(5, 60)
    ours, theirs = all_logits(load(folder, torch.bfloat16), ids), hf_logits(pair.hf, ids)
    exact = hf_logits(pair.hf.double(), ids)
    assert (ours - exact).norm() < (theirs - exact).norm() / 2


def test_steps_end_though_other_programs_want_the_cores_and_threads_are_many(folder: Path, threads: list[int]) -> None:
    lm, ids = load(folder), random_ids(1, 30)
    expected, stop = all_logits(lm, ids), threading.Event()

    def burn() -> None:
        x = torch.randn(200, 200)
        while not stop.is_set():
            x @ x

    burners = [threading.Thread(target=burn) for _ in range(3)]
    for burner in burners:
        burner.start()
    try:
        for threads[0] in (1, 2, 8, 3):
            for _ in range(5):
                assert torch.equal(all_logits(lm, ids), expected)
    finally:
        stop.set()
        for burner in burners:
            burner.join()


def test_a_step_does_not_wait_for_helpers_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a fork, which takes no threads along."""
    lm, ids = load(folder), random_ids(1, 30)
    expected = all_logits(lm, ids)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: None)
        lonely = Team(compiled_step(), 4)
    monkeypatch.setattr("handloom.ops.cpu.machine._teams.of", lambda run, threads: lonely)
    assert torch.equal(all_logits(lm, ids), expected)


def test_a_helper_that_comes_before_its_caller_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it takes the caller's core while another program spins on the other one."""
    x, out = torch.randn(40, 100), torch.full((40, 100), torch.nan)
    helped, found = threading.Event(), list[Tensor]()

    def run(control: int, thread: int) -> None:
        if thread == 0:
            assert helped.wait(30)
            found.append(out.clone())
        compiled_step()(control, thread)
        if thread == 1:
            helped.set()

    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: 2)
    monkeypatch.setattr("handloom.ops.cpu.machine._teams", Teams())
    monkeypatch.setattr("handloom.ops.cpu.machine.compiled_step", lambda: run)
    run_once([blocks.activate(x, "relu", False, out)], {Frame.TOKENS: 40})
    assert torch.equal(found[0], x.relu())
    assert torch.equal(out, x.relu())


def test_an_interrupt_while_helpers_are_called_leaves_no_run_open(
    folder: Path, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, ids, team = load(folder), random_ids(1, 30), Team(compiled_step(), threads[0])
    expected = all_logits(lm, ids)

    class Interrupted(SimpleQueue[None]):
        def put(self, item: None, block: bool = True, timeout: float | None = None) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("handloom.ops.cpu.machine._teams.of", lambda run, threads: team)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(team, "_calls", [Interrupted()])
        all_logits(lm, ids)
    assert team._entries[ins.OPEN // 8] == team._entries[ins.INSIDE // 8] == 0
    assert torch.equal(all_logits(lm, ids), expected)


def test_several_models_may_run_at_once_in_several_threads(folder: Path, threads: list[int]) -> None:
    models, ids = [load(folder) for _ in range(3)], random_ids(1, 30)
    expected = all_logits(models[0], ids)
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(5) if not torch.equal(all_logits(models[i], ids), expected))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_another_pool_of_pages_is_another_recording(folder: Path) -> None:
    lm, other, ids = load(folder), load(folder), random_ids(1, 30)
    expected = all_logits(lm, ids)
    other.transformer = lm.transformer
    assert torch.equal(all_logits(other, ids), expected)
    assert torch.equal(all_logits(lm, ids), expected)


def test_a_recording_that_fails_leaves_nothing_half_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handloom.ops.cpu.program.MIN_POSITIONS", 8)
    lm, ids = load(folder), random_ids(1, 30)
    expected = all_logits(load(folder), ids)
    all_logits(lm, ids[:4])

    def no_memory(positions: Tensor) -> list[Rotary]:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(lm.transformer, "_rotaries", no_memory)
        all_logits(lm, ids)
    assert torch.equal(all_logits(lm, ids), expected)


def test_pages_of_another_dtype_in_the_same_place_are_another_recording(folder: Path) -> None:
    lm, ids = load(folder), random_ids(1, 30)
    pool = lm.pool
    all_logits(lm, ids)
    halves = [
        tuple(pages.view(torch.bfloat16).view(-1)[: pages.numel()].view(pages.shape) for pages in pair)
        for pair in pool.layers
    ]
    other = load(folder)
    other.pool.layers = tuple((k.bfloat16(), v.bfloat16()) for k, v in other.pool.layers)
    expected = all_logits(other, ids)
    pool.layers = tuple(halves)
    assert torch.equal(all_logits(lm, ids), expected)
