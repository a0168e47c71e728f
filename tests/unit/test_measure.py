"""handloom.measure: numbers are those of numpy and torch, timed runs have the tokens they claim, verdicts can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.utils
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import handloom as hl
from handloom.errors import CheckpointError, ContextOverflow, MissingDependency, RequestFailed
from handloom.measure import limits, parity, speed, stats
from handloom.measure.peer import Transformers
from handloom.model.families import read_config
from parity_checks import hf_generate, hf_logits
from tiny_models import TINY, VOCAB_SIZE, random_ids, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TINY["llama"](), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def lm(folder: Path) -> hl.LM:
    return hl.LM.from_pretrained(folder)


@pytest.fixture(scope="module")
def peer(folder: Path) -> Transformers:
    return Transformers.load(folder, torch.float32, CPU)


# Numbers ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_summaries_are_numpys(values: list[float]) -> None:
    found = stats.summarize(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0.0, abs=1e-9)
    assert (found.p20, found.p50, found.p80) == pytest.approx(tuple(np.percentile(values, (20, 50, 80))))


def test_peers_take_turns_and_warm_up_rounds_are_thrown_away() -> None:
    calls: list[str] = []

    def peer_called(name: str) -> Callable[[], int]:
        return lambda: calls.append(name) or len(calls)  # type: ignore[func-returns-value]

    taken = stats.interleave({"a": peer_called("a"), "b": peer_called("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert taken == {"a": [3, 5], "b": [4, 6]}


def test_random_ids_are_fixed_and_within_the_vocabulary() -> None:
    ids = speed.random_ids(50, 1000)
    assert ids == speed.random_ids(50, 1000) != speed.random_ids(50, 1000, seed=1)
    assert set(ids) == set(range(50))


def test_rates() -> None:
    run = speed.Run(num_prompts=2, prompt_tokens=10, new_tokens=5, first=0.5, first_text=0.6, total=2.5)
    assert (run.prefill_rate, run.decode_rate, run.output_rate) == (20, 2, 4)


# Limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(TINY))
def test_operations_of_a_prompt_are_those_torch_counts(family: str) -> None:
    """torch counts every pair of query and key; ours only those that causality and the window let meet."""
    model, n = TINY[family](), 20
    model.set_attn_implementation("eager")  # what the counter can see into
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([random_ids(0, n)]), logits_to_keep=1)
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    angles = sum(count for name, count in counts.items() if name.endswith("rotary_emb"))  # in some versions a product
    _, spec = read_config(model.config.to_dict(), "config", ignore_keys=model.config.to_dict())
    pairs = [sum(min(i + 1, layer.mixer.window or n) for i in range(n)) for layer in spec.layers]
    surplus = [
        4 * (n * n - some) * layer.mixer.num_heads * layer.mixer.head_dim
        for some, layer in zip(pairs, spec.layers, strict=True)
    ]
    assert limits.prefill_flops(spec, n) == counts["Global"] - angles - sum(surplus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_matmul_rate_is_operations_over_the_best_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves one second at a look, a product takes a second."""
    ticks = iter(range(100))
    monkeypatch.setattr(limits, "SIZE", 8)
    monkeypatch.setattr(limits.time, "perf_counter", lambda: float(next(ticks)))
    assert limits.matmul_rate(dtype, CPU) == 2 * 8**3


PEAK = """
import psutil
from handloom.measure import speed

now = psutil.Process().memory_info().rss
before = speed.peak_memory()
grown = 64 << 20
held = bytearray(b"x") * (max(0, before - now) + grown)
after = speed.peak_memory()
assert before + grown // 2 < after < before + 2 * grown, (before, after)
del held
assert speed.peak_memory() > before + grown // 2
"""


def test_peak_memory_rises_with_what_is_held_and_does_not_fall() -> None:
    """In a process of its own, where nothing else comes and goes."""
    subprocess.run([sys.executable, "-c", PEAK], check=True)


# Timed runs ------------------------------------------------------------------------------------


@pytest.fixture
def ends_at_once(lm: hl.LM, peer: Transformers, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A prompt whose first new token is declared the end of every sequence."""
    ids = random_ids(3, 12)
    end = lm.generate(ids, max_new_tokens=1, do_sample=False).token_ids[0]
    monkeypatch.setitem(lm.generation_config, "eos_token_id", end)
    monkeypatch.setattr(peer.model.generation_config, "eos_token_id", end)
    assert lm.generate(ids, max_new_tokens=9).token_ids == hf_generate(peer.model, ids, max_new_tokens=9) == [end]
    yield ids
    assert peer.model.generation_config.eos_token_id == end


@pytest.mark.parametrize("who", ["handloom", "transformers"])
def test_a_run_has_every_token_it_claims_whatever_eos_says(
    lm: hl.LM, peer: Transformers, ends_at_once: list[int], who: str
) -> None:
    prompts = [ends_at_once, ends_at_once[:5]]
    for count in (1, 2):
        run = speed.run(lm, prompts[:count], 9) if who == "handloom" else peer.run(prompts[:count], 9)
        assert (run.num_prompts, run.prompt_tokens, run.new_tokens) == (count, sum(map(len, prompts[:count])), 9)
        assert 0 < run.first <= run.first_text <= run.total
        assert run.first < run.total


def test_other_numbers_of_tokens_are_refused() -> None:
    with pytest.raises(RequestFailed, match=r"somebody generated \[8, 7\] tokens; 8 were"):
        speed.check_counts("somebody", [8, 7], 8)


def test_a_run_that_does_not_fit_the_context_is_refused_with_the_numbers(lm: hl.LM) -> None:
    with pytest.raises(ContextOverflow, match=r"200 prompt tokens and 57 new .* 257.* 256"):
        speed.run(lm, [random_ids(0, 200)], 57)


# Parity ----------------------------------------------------------------------------------------


def test_the_peer_is_transformers(peer: Transformers) -> None:
    ids = random_ids(5, 17)
    tokens, scores = peer.greedy(ids, 8)
    assert tokens == hf_generate(peer.model, ids, max_new_tokens=8, do_sample=False)
    assert [int(step.argmax()) for step in scores] == tokens
    assert torch.equal(peer.last_logits(ids, 5), hf_logits(peer.model, ids)[-5:])


def test_our_logits_come_in_pieces_and_only_for_the_last_positions(
    lm: hl.LM, peer: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "CHUNK", 7)
    ids = random_ids(6, 40)
    pieces = list(parity.our_last_logits(lm, ids, 16))
    assert [len(piece) for piece in pieces] == [7, 7, 2]
    torch.testing.assert_close(torch.cat(pieces), peer.last_logits(ids, 16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [([1, 2], [1, 2], None), ([], [], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2, 3], [1, 2], 2)],
)
def test_the_first_mismatch(ours: list[int], theirs: list[int], at: int | None) -> None:
    assert parity.first_mismatch(ours, theirs) == at


class Stub:
    """A peer that says what a test wants: `tokens`, and scores in which every token has 5.0 but for `scores`."""

    def __init__(self, tokens: list[int], scores: dict[int, float], logits: torch.Tensor) -> None:
        self.tokens, self.logits = tokens, logits
        step = torch.full((1, VOCAB_SIZE), 5.0)
        for token, score in scores.items():
            step[0, token] = score
        self.scores = [step] * len(tokens)

    def greedy(self, *_: Any) -> tuple[list[int], list[torch.Tensor]]:
        return self.tokens, self.scores

    def last_logits(self, ids: list[int], count: int) -> torch.Tensor:
        return self.logits[-count:]


def judged(lm: hl.LM, tokens: list[int], scores: dict[int, float], shift: float = 0.0) -> parity.PromptParity:
    """The verdict on a prompt for which transformers is said to give `tokens`, one logit shifted by a part of scale."""
    ids = random_ids(7, 9)
    logits = torch.cat(list(parity.our_last_logits(lm, [*ids, *tokens], len(ids) + len(tokens))))
    logits[3, 50] += shift * logits.abs().max()
    return parity.compare(lm, Stub(tokens, scores, logits), [ids], len(tokens))[0]  # type: ignore[arg-type]


def test_a_tie_is_parity_and_a_clear_difference_is_not(lm: hl.LM) -> None:
    right = lm.generate(random_ids(7, 9), max_new_tokens=4, do_sample=False).token_ids
    other = (right[2] + 1) % VOCAB_SIZE
    wrong = [*right[:2], other, right[3]]
    equal = judged(lm, right, {})
    assert (equal.ok, equal.mismatch, equal.logits_difference, equal.positions) == (True, None, 0.0, 13)
    tie = judged(lm, wrong, {right[2]: 5.0, other: 5.00004})
    assert (tie.ok, tie.mismatch, tie.tied) == (True, 2, True)
    assert tie.score_gap == pytest.approx(8e-6, rel=0.02)
    clear = judged(lm, wrong, {right[2]: 5.0, other: 5.0002})
    assert (clear.ok, clear.mismatch, clear.tied) == (False, 2, False)
    shorter = judged(lm, right[:3], {})
    assert shorter.ok  # asked for three tokens, both give three
    ids = random_ids(7, 9)
    early = parity.compare(lm, Stub(right[:2], {}, torch.zeros(11, VOCAB_SIZE)), [ids], 4)[0]  # type: ignore[arg-type]
    assert (early.ok, early.mismatch, early.tied) == (False, 2, False)


def test_logits_that_differ_are_not_parity_though_the_tokens_agree(lm: hl.LM) -> None:
    right = lm.generate(random_ids(7, 9), max_new_tokens=4, do_sample=False).token_ids
    fine, off = judged(lm, right, {}, shift=5e-5), judged(lm, right, {}, shift=2e-4)
    assert (fine.ok, off.ok) == (True, False)
    assert off.logits_difference == pytest.approx(2e-4, rel=0.01)
    assert judged(lm, right, {}, shift=float("nan")).logits_difference == float("inf")


def test_half_precision_is_judged_by_its_own_rounding() -> None:
    assert parity.tolerances(torch.float32) == {"tie": 1e-5, "logits": 1e-4}
    assert parity.tolerances(torch.bfloat16)["logits"] > 2**-8


def test_gguf_without_the_package_transformers_needs_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.utils, "is_accelerate_available", lambda: False)
    with pytest.raises(MissingDependency, match="pip install accelerate"):
        Transformers.load(tmp_path / "model.gguf", torch.float32, CPU)


def test_what_transformers_does_not_load_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers does not load"):
        Transformers.load(tmp_path, torch.float32, CPU)
