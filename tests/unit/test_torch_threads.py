"""Choosing tokens on a CPU leaves torch's threads asleep, whatever the rule, and their number as it was."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from handloom.ops.torch_threads import callers_threads, one_thread

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torch's library has no such function there")

THREADS_BUSY = """
import os, sys, time
import torch
from handloom.sampling.params import resolve_params
from handloom.sampling.rules import Row
from handloom.sampling.sampler import choose
from transformers import WatermarkingConfig

V = 40_000  # more than what one thread is given without asking

def busy():
    others = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    return sum(int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in others)

def run(name, do):
    do()
    before = busy()
    do()
    time.sleep(0.02)
    print(name, busy() - before, sep=":")

torch.set_num_threads(2)
logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0)) * 3
run("torch", lambda: logits / 2)
options = {
    "greedy": {"do_sample": False, "top_k": None},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "top_h": {"top_h": 0.5},
    "typical_p": {"typical_p": 0.9},
    "epsilon_cutoff": {"epsilon_cutoff": 1e-3},
    "eta_cutoff": {"eta_cutoff": 1e-3},
    "rng": {"rng": "torch", "seed": None},
    "renormalize_logits": {"renormalize_logits": True},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "logprobs": {"logprobs": 5},
    "output_scores and output_logits": {"output_scores": True, "output_logits": True},
    "watermarking_config": {"watermarking_config": WatermarkingConfig()},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (0, 1.1)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "suppress_tokens": {"suppress_tokens": [3, 4]},
    "bad_words_ids": {"bad_words_ids": [[3], [4, 5]]},
    "min_new_tokens": {"min_new_tokens": 3},
}
prompt = list(range(100, 200))
for name, own in options.items():
    params = resolve_params(
        {"do_sample": True, "top_k": 0, "seed": 1, "max_new_tokens": 9, **own}, generation_config={}, prompt_length=100,
        max_context=1000, vocab_size=V, eos_token_id=1,
    )
    rows = [Row(params, prompt, 100), Row(params, prompt[1:], 99)]
    run(name, lambda: choose(logits, rows))
assert torch.get_num_threads() == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads how long each thread has run from Linux")
def test_no_rule_wakes_torchs_threads() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS_BUSY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    took = {name: int(spent) for name, spent in (line.split(":") for line in done.stdout.splitlines())}
    assert took.pop("torch") > 0, "a division of this size does not wake threads any more: take more scores"
    assert {name for name, spent in took.items() if spent} == set()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seen_by_another() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_is_one_here_alone_and_comes_back():
    with pytest.raises(ZeroDivisionError), one_thread():
        assert (torch.get_num_threads(), seen_by_another()) == (1, 2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert (torch.get_num_threads(), seen_by_another()) == (2, 2)


@pytest.mark.usefixtures("two_threads")
def test_a_function_of_the_callers_sees_and_sets_its_own_number():
    with callers_threads():
        assert torch.get_num_threads() == 2
    with one_thread():
        with callers_threads():
            assert torch.get_num_threads() == 2
            torch.set_num_threads(3)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("two_threads")
def test_two_threads_may_be_inside_and_leave_in_any_order():
    entered, leave, after = threading.Event(), threading.Event(), list[int]()

    def first() -> None:
        torch.set_num_threads(2)
        with one_thread():
            entered.set()
            leave.wait()
        after.append(torch.get_num_threads())

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with one_thread():
        leave.set()
        thread.join()
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), after) == (2, [2])
