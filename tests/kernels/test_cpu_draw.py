"""Draws by compiled code: the noise of the documented function, and the very tokens of the plain one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from handloom.ops import cpu
from handloom.sampling import rng


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    cpu.compiled_step()


def keys_of(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    return np.array([(seed & 0xFFFFFFFF, seed >> 32, at) for seed, at in zip(seeds, positions, strict=True)])


def plain(scores: Tensor, seeds: Sequence[int], positions: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`rng.sample` without compiled code."""
    with monkeypatch.context() as patch:
        patch.setattr(rng, "perturb_on_cpu", lambda: None)
        return rng.sample(scores, seeds, positions)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (2**64 - 1, 2**31 - 1), (123456789012345, 77)])
def test_noise_is_that_of_the_plain_function_to_a_hundred_thousandth(seed, position):
    count = 300_001
    key = rng.seed_words([seed], torch.device("cpu"))
    theirs = rng.gumbel_noise(key, torch.tensor([position]), torch.arange(count)).numpy()
    zeros = np.zeros((1, count), dtype=np.float32)
    ours = cpu.perturb(zeros, np.array([-1], dtype=np.float32), keys_of([seed], [position]))[0]
    assert np.abs(ours - theirs).max() < 1e-5
    assert theirs.max() > 11, "large noise, of small random numbers, is looked at too"


def test_scores_below_the_floor_become_nothing_by_sixteens_and_others_are_untouched_by_that():
    scores = np.full((2, 77), -40, dtype=np.float32)
    scores[0, 20], scores[1, 76] = 3, -np.inf
    noisy = cpu.perturb(scores, np.array([0, 0], dtype=np.float32), keys_of([1, 1], [2, 2]))
    assert np.isneginf(noisy[1]).all()
    assert np.isneginf(np.delete(noisy[0], range(16, 32))).all()
    everything = cpu.perturb(scores, np.array([-99, -99], dtype=np.float32), keys_of([1, 1], [2, 2]))
    assert np.array_equal(noisy[0, 16:32], everything[0, 16:32])


@pytest.mark.parametrize("few_scores", [0, 2**30], ids=["threads", "one thread"])
@pytest.mark.parametrize("vocab_size", [1, 15, 1000, 9001])
@pytest.mark.parametrize("ties", [False, True])
def test_tokens_are_those_of_the_plain_function(vocab_size, ties, few_scores, monkeypatch):
    monkeypatch.setattr(cpu, "FEW_SCORES", few_scores)
    rows, generator = 96, torch.Generator().manual_seed(vocab_size)
    scores = torch.randn(rows, vocab_size, generator=generator) * torch.linspace(0, 8, rows)[:, None]
    if ties:
        scores = scores.round()
    scores[::3, vocab_size // 5 + 1 :] = -torch.inf
    scores[5], scores[6] = scores[5] * 1e30, scores[6] - 1e6
    before = scores.clone()
    seeds, positions = [2**64 - 1 - 7**row for row in range(rows // 2)] * 2, [row**3 for row in range(rows)]
    seeds = [seed % 2**64 for seed in seeds]
    assert rng.sample(scores, seeds, positions) == plain(scores, seeds, positions, monkeypatch)
    assert torch.equal(scores, before)


def test_tokens_are_the_same_where_many_sums_are_in_doubt(monkeypatch):
    scores = torch.randn(64, 500, generator=torch.Generator().manual_seed(1))
    expected = plain(scores, range(64), range(64), monkeypatch)
    for margin in (0.5, 50.0):
        monkeypatch.setattr(rng, "_MARGIN", margin)
        assert rng.sample(scores, range(64), range(64)) == expected


def test_one_row_seen_as_many_is_drawn_from_by_each(monkeypatch):
    scores = torch.randn(1, 100, generator=torch.Generator().manual_seed(2)).expand(20, -1)
    assert rng.sample(scores, range(20), [3] * 20) == plain(scores, range(20), [3] * 20, monkeypatch)
