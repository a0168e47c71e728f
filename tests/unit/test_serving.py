"""Serving many requests: times by their definitions, tokens counted, pages bounded, and peers on the same requests."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import handloom as hl
from engines import lm_with
from handloom import machine
from handloom.errors import ContextOverflow, MissingDependency, RequestFailed
from handloom.measure import limits, peer_serving, prefixes, serving, workload
from handloom.measure.peer import Transformers
from handloom.measure.peer_serving import continuous, in_turn, padded
from handloom.measure.serving import Served, ServingRun, serve
from handloom.measure.workload import Asked, Lengths
from parity_checks import hf_generate
from tiny_models import TINY, random_ids, save

REQUESTS = workload.draw(96, 9, Lengths(3, 20), Lengths(1, 12), seed=2)
NEW = sum(request.new_tokens for request in REQUESTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TINY["llama"](), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def peer(folder: Path) -> Transformers:
    return Transformers.load(folder, torch.float32, torch.device("cpu"))


# Definitions -----------------------------------------------------------------------------------


def test_times_are_those_of_the_definitions() -> None:
    request = Served(arrived=10.0, first_text=10.5, tokens=[10.4, 10.5, 11.0, 12.5])
    assert (request.ttft, request.latency) == (0.5, 2.5)
    assert request.tpot == pytest.approx((2.5 - 0.5) / 3)
    assert request.gaps == pytest.approx([0.1, 0.5, 1.5])
    silent = Served(arrived=1.0, tokens=[1.25])
    assert (silent.ttft, silent.tpot, silent.gaps) == (0.25, None, [])


def test_rates_and_goodput_are_per_second_of_the_whole_run() -> None:
    fast, slow = Served(0.0, None, [0.1, 0.2]), Served(0.0, None, [1.0, 4.0])
    run = ServingRun(2, 20, 4, 4.0, [fast, slow], 3, 9, 0.0, 0, 0)
    assert (run.output_rate, run.total_rate, run.request_rate) == (1.0, 6.0, 0.5)
    assert [run.goodput(*slo) for slo in ((None, None), (0.5, None), (None, 0.1), (1.0, 2.9), (0.05, None))] == [
        0.5, 0.25, 0.25, 0.25, 0.0,
    ]  # fmt: skip


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_limit_is_the_slower_of_all_operations_and_all_bytes(family: str) -> None:
    lm = lm_with(family=family)
    spec = lm.spec
    sizes = [(7, 1), (3, 5), (11, 2)]
    prefill = sum(limits.prefill_flops(spec, prompt) for prompt, _ in sizes)
    one = 2 * spec.vocab_size * spec.hidden_size  # the head, which prefill_flops counts once
    steps = sum(
        limits.prefill_flops(spec, prompt + at) - limits.prefill_flops(spec, prompt + at - 1) + one
        for prompt, new in sizes
        for at in range(1, new)
    )
    assert limits.serving_seconds(lm, torch.float32, sizes, 1e30, 100.0) == pytest.approx((prefill + steps) / 100)
    read = 5 * machine.weight_bytes_per_token(lm, torch.float32)
    for prompt, new in sizes:
        read += sum(machine.kv_bytes_read(spec, torch.float32, prompt + at) for at in range(1, new))
    assert limits.serving_seconds(lm, torch.float32, sizes, 50.0, 1e30) == pytest.approx(read / 50)


# Serving ---------------------------------------------------------------------------------------


def test_every_request_gets_its_tokens_in_time_order_and_progress_ends_at_their_number() -> None:
    seen: list[int] = []
    run = serve(lm_with(), REQUESTS, progress=seen.append)
    assert [len(request.tokens) for request in run.served] == [request.new_tokens for request in REQUESTS]
    assert all(request.tokens == sorted(request.tokens) for request in run.served)
    assert all(0 < request.tokens[0] <= request.tokens[-1] <= run.seconds for request in run.served)
    assert seen == sorted(seen) and seen[-1] == NEW == run.new_tokens
    assert run.prompt_tokens == sum(len(request.prompt) for request in REQUESTS)


def test_nobody_is_served_before_arriving_and_waiting_for_the_engine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Asked(random_ids(1, 5), 3, at=0.3), Asked(random_ids(2, 5), 2, at=0.0)
    run = serve(lm_with(), [first, second], max_running=1)
    assert run.served[0].arrived == 0.3 < run.served[0].tokens[0]
    assert run.served[1].tokens[-1] < 0.3
    lm = lm_with()
    forward = lm.transformer.forward

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.05)
        return forward(*arguments)

    monkeypatch.setattr(lm.transformer, "forward", slow)
    late = [Asked(random_ids(1, 5), 6), Asked(random_ids(2, 5), 2, at=0.01)]
    run = serve(lm, late, max_running=1)
    assert run.queued == 1
    assert run.served[1].ttft > 5 * 0.05, "it arrived in the first of six steps, and waited for the others"


def test_pages_stay_within_the_pool_and_preemptions_are_counted() -> None:
    long = [Asked(random_ids(i, 9), 24) for i in range(4)]
    roomy, tight = serve(lm_with(), long), serve(lm_with(num_pages=12), long)
    assert roomy.num_preempted == 0 < tight.num_preempted
    assert 0 < tight.peak_pages <= tight.num_pages == 12 < roomy.peak_pages


def test_eos_does_not_end_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_with()
    end = lm.generate(REQUESTS[0].prompt, max_new_tokens=1, do_sample=False).token_ids[0]
    lm.generation_config["eos_token_id"] = end
    assert serve(lm, REQUESTS).new_tokens == NEW


def test_what_cannot_be_served_is_an_error() -> None:
    lm = lm_with()
    with pytest.raises(ContextOverflow, match="250 prompt tokens and 20 new ones"):
        serve(lm, [*REQUESTS, Asked([1] * 250, 20)])
    with pytest.raises(hl.HandloomError, match="KV cache holds 3 pages"):
        serve(lm_with(num_pages=3), [Asked([1] * 12, 2)])
    with pytest.raises(RequestFailed, match="somebody generated 3 tokens for request 1; it asked for 4"):
        serving.check_served("somebody", [Asked([1], 2), Asked([1], 4)], [2, 3])


# Peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_padded_batches_have_the_tokens_that_each_prompt_has_alone(peer: Transformers, batch_size: int) -> None:
    rows = peer.generate_padded([request.prompt for request in REQUESTS[:3]], 6)
    for request, row in zip(REQUESTS, rows, strict=False):
        assert row == hf_generate(peer.model, request.prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    seen: list[int] = []
    run = padded(peer, REQUESTS, batch_size, seen.append)
    assert (run.num_requests, run.new_tokens, seen[-1]) == (len(REQUESTS), NEW, NEW)
    assert run.output_rate == NEW / run.seconds


def test_padded_batches_that_stop_early_are_refused(peer: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "generate_padded", lambda prompts, new: [[1] * (new - 1)] * len(prompts))
    with pytest.raises(RequestFailed, match="were asked for"):
        padded(peer, REQUESTS, 4)


def test_continuous_batching_of_transformers_serves_every_request_and_leaves_the_model_as_it_was(
    peer: Transformers,
) -> None:
    expected = peer.generate_padded([REQUESTS[0].prompt], 5)
    run = continuous(peer, REQUESTS)
    assert (run.num_requests, run.new_tokens) == (len(REQUESTS), NEW)
    assert peer.generate_padded([REQUESTS[0].prompt], 5) == expected
    assert peer.model.config._attn_implementation == "sdpa"
    assert threading.active_count() < 20


def test_a_transformers_without_continuous_batching_is_named(
    peer: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    with pytest.raises(MissingDependency, match="needs a newer transformers"):
        continuous(peer, REQUESTS)


def test_a_peer_that_fails_is_noted_and_the_others_are_measured(
    peer: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no such device")

    monkeypatch.setattr(peer.model, "continuous_batching_context_manager", broken)
    found = in_turn(lm_with(), REQUESTS, quiet, repeat=2, load_peer=lambda: peer, batch_sizes=[9])
    assert {name: len(runs) for name, runs in found.theirs.items()} == {"transformers, batches of 9": 2}
    assert list(found.failed) == ["transformers, continuous"]
    assert "no such device" in found.failed["transformers, continuous"]


@pytest.mark.parametrize(("error", "running", "why"), [("out of blocks", True, "out of blocks"), (None, False, "stop")])
def test_continuous_batching_that_fails_or_stops_is_an_error_not_a_wait(
    error: str | None, running: bool, why: str
) -> None:
    results = iter([SimpleNamespace(error=None), SimpleNamespace(error=error) if error else None])
    manager = SimpleNamespace(get_result=lambda timeout: next(results), is_running=lambda: running)
    with pytest.raises(RequestFailed, match=f"after 1 of 3 requests: .*{why}"):
        list(peer_serving._results(manager, 3))


@contextmanager
def quiet(who: str, total: int) -> Iterator[serving.Progress]:
    yield lambda done: None


def test_engines_take_turns_and_the_peer_is_loaded_after_the_first_run(
    folder: Path, peer: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    @contextmanager
    def watch(who: str, total: int) -> Iterator[serving.Progress]:
        assert total == NEW
        order.append(who)
        yield lambda done: None

    def load() -> Transformers:
        order.append("load")
        return peer

    found = in_turn(hl.LM.from_pretrained(folder), REQUESTS, watch, repeat=2, load_peer=load, batch_sizes=[4])
    peers = ["transformers, batches of 4", "transformers, continuous"]
    assert order == ["handloom", "load", *peers, "handloom", *peers]
    assert list(found.theirs) == peers
    assert [len(runs) for runs in (found.ours, *found.theirs.values())] == [2, 2, 2]
    assert found.peak_memory > 0


# Prefixes --------------------------------------------------------------------------------------


def test_prefixes_are_found_where_they_are_shared_and_nowhere_else() -> None:
    lm = lm_with(page_size=4)
    found = prefixes.measure(lm, count=3, shared=10, own=6, new_tokens=2, rounds=2)
    assert [run.hit_rate for run in (*found.on, *found.off)] == [0] * 4
    assert [run.hit_rate for runs in found.cold for run in runs] == [0] * 6
    assert [[run.hit_rate for run in runs] for runs in found.warm] == [[8 / 16] * 2] * 2, "two of four pages"
    assert found.hit_rate == 0.5
    assert len(found.costs) == 2
    assert found.costs[1] == found.on[1].seconds / found.off[1].seconds - 1
    assert lm.pool.num_cached == 0


def test_prefixes_that_do_not_fit_the_context_are_refused_before_anything_runs() -> None:
    with pytest.raises(ContextOverflow):
        prefixes.measure(lm_with(), count=2, shared=250, own=6, new_tokens=2, rounds=1)


def test_the_peers_names_are_those_of_the_sizes(peer: Transformers) -> None:
    assert list(peer_serving._peers(peer, [2, 16], with_continuous=False)) == [
        "transformers, batches of 2",
        "transformers, batches of 16",
    ]
