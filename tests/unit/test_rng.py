"""The counter-based generator against the published vectors, Triton's philox, and the distribution it must draw."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from handloom.sampling import rng

ONES = 0xFFFFFFFF


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


# Known answers of philox4x32-10 in the Random123 distribution (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, result):
    assert tuple(int(word) for word in rng.philox_4x32_10(words(*counter), words(*key))) == result


def philox_in_plain_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Word 0, straight from the paper's definition, in Python's unbounded integers."""
    left, right = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * left[0], 0xCD9E8D57 * left[2]
        left = [(b >> 32) ^ left[1] ^ right[0], b & ONES, (a >> 32) ^ left[3] ^ right[1], a & ONES]
        right = [(right[0] + 0x9E3779B9) & ONES, (right[1] + 0xBB67AE85) & ONES]
    return left[0]


def test_first_word_is_that_of_the_definition_for_shared_and_for_separate_operands():
    generator = torch.Generator().manual_seed(0)
    tokens, positions, low, high = torch.randint(0, 2**31, (4, 257), generator=generator)
    low[0], high[0] = ONES, ONES
    zero = torch.zeros(1, dtype=torch.int64)
    separate = rng._first_word((tokens, positions, zero, zero), (low, high))
    shared = rng._first_word((tokens, positions[:1], zero, zero), (low[:1], high[:1]))
    for i, drawn in enumerate(separate.tolist()):
        expected = philox_in_plain_integers((int(tokens[i]), int(positions[i]), 0, 0), (int(low[i]), int(high[i])))
        assert drawn == expected
        assert int(shared[i]) == philox_in_plain_integers((int(tokens[i]), int(positions[0]), 0, 0), (ONES, ONES))


TRITON_PROGRAM = """
import json, sys
import torch, triton, triton.language as tl

@triton.jit
def kernel(out, seed_ptr, position, N: tl.constexpr):
    token = tl.arange(0, N)
    seed = tl.load(seed_ptr).to(tl.uint64)
    zero = token * 0
    word, _, _, _ = tl.philox(seed, token.to(tl.uint32), (zero + position).to(tl.uint32), zero, zero)
    tl.store(out + token, word.to(tl.int64))

@triton.jit
def kernel4(out, seed_ptr, offsets, N: tl.constexpr):
    token = tl.arange(0, N)
    word, _, _, _ = tl.randint4x(tl.load(seed_ptr).to(tl.uint64), tl.load(offsets + token))
    tl.store(out + token, word.to(tl.uint32).to(tl.int64))

answers = []
for seed, position in json.loads(sys.argv[1]):
    out, out4 = torch.empty(128, dtype=torch.int64), torch.empty(128, dtype=torch.int64)
    seed_tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    kernel[(1,)](out, seed_tensor, position, N=128)
    kernel4[(1,)](out4, seed_tensor, torch.arange(128) + (position << 32), N=128)
    answers.append([(out & 0xFFFFFFFF).tolist(), (out4 & 0xFFFFFFFF).tolist()])
print(json.dumps(answers))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux alone")
def test_first_word_is_that_of_tritons_philox_and_randint4x(tmp_path):
    cases = [(0, 0), (1, 7), (2**64 - 1, 131071), (0x0123456789ABCDEF, 2**31 - 1)]
    program = tmp_path / "philox_in_triton.py"
    program.write_text(TRITON_PROGRAM)
    run = subprocess.run(
        [sys.executable, str(program), json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    zero = torch.zeros(1, dtype=torch.int64)
    for (seed, position), (by_philox, by_randint4x) in zip(cases, json.loads(run.stdout), strict=True):
        key = rng.seed_words([seed], torch.device("cpu"))
        ours = rng._first_word((torch.arange(128), torch.tensor([position]), zero, zero), key).tolist()
        assert ours == by_philox == by_randint4x


def test_noise_is_the_documented_function_of_the_word():
    token_ids = torch.arange(5000)
    key, position = rng.seed_words([2**64 - 1], torch.device("cpu")), torch.tensor([9])
    zero = torch.zeros(1, dtype=torch.int64)
    word = rng._first_word((token_ids, position, zero, zero), key).double()
    expected = -torch.log(-torch.log1p(-(word + 0.5) * 2.0**-32))
    torch.testing.assert_close(rng.gumbel_noise(key, position, token_ids).double(), expected, atol=2e-6, rtol=2e-6)


def test_noise_is_finite_at_both_ends_of_the_word(monkeypatch):
    monkeypatch.setattr(rng, "_first_word", lambda counter, key: torch.tensor([0, ONES]))
    lowest_word, highest_word = rng.gumbel_noise(words(0, 0), torch.tensor([0]), torch.arange(2)).tolist()
    assert lowest_word == pytest.approx(33 * math.log(2), rel=1e-6)
    assert highest_word == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def test_noise_of_a_token_does_not_depend_on_which_tokens_are_asked_for_with_it():
    key, position = rng.seed_words([3], torch.device("cpu")), torch.tensor([5])
    everything = rng.gumbel_noise(key, position, torch.arange(40000))
    some = torch.tensor([0, 1, 16383, 16384, 16385, 39999])
    assert torch.equal(rng.gumbel_noise(key, position, some), everything[some])
    for token_id in some.tolist():
        assert torch.equal(rng.gumbel_noise(key, position, torch.tensor([token_id]))[0], everything[token_id])


def test_a_row_draws_the_same_alone_and_among_others_sparse_and_dense():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(12, 9000, generator=generator) * 3
    for row in range(0, 12, 2):
        scores[row, torch.randperm(9000, generator=generator)[: 8950 - 600 * row]] = -torch.inf
    seeds, positions = [2**64 - 1 - row for row in range(12)], [row * row for row in range(12)]
    together = rng.sample(scores, seeds, positions)
    assert together == [rng.sample(scores[i : i + 1], seeds[i : i + 1], positions[i : i + 1])[0] for i in range(12)]
    order = torch.randperm(12, generator=generator).tolist()
    shuffled = rng.sample(scores[order], [seeds[i] for i in order], [positions[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_sparse_and_dense_paths_choose_the_same_token(monkeypatch):
    scores = torch.randn(64, 500, generator=torch.Generator().manual_seed(2))
    scores[:, 400:] = -torch.inf
    sparse = rng.sample(scores, range(64), range(64))
    monkeypatch.setattr(rng, "_FEW", 0)
    assert rng.sample(scores, range(64), range(64)) == sparse


def test_sample_leaves_the_scores_alone_and_takes_the_only_token_left():
    scores = torch.full((2, 9), -torch.inf)
    scores[0, 8], scores[1, 0] = -50.0, 1e30
    before = scores.clone()
    assert rng.sample(scores, [1, 2], [3, 4]) == [8, 0]
    assert torch.equal(scores, before)
    assert rng.sample(torch.zeros(1, 1), [0], [0]) == [0]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic over the tokens expected at least five times, the rest pooled; and its degrees of freedom."""
    expected = probabilities.double() * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common].double(), counts[~common].sum().double()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def limit(degrees: int) -> float:
    """About the 99.99th percentile of the chi-square distribution (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("survivors", [60, 7])
def test_draws_have_the_distribution_softmax_of_scores(vary, survivors):
    draws = 20000
    scores = torch.randn(60, generator=torch.Generator().manual_seed(4)) * 2
    scores[survivors:] = -torch.inf
    seeds = list(range(draws)) if vary == "seed" else [12345] * draws
    positions = list(range(draws)) if vary == "position" else [17] * draws
    chosen = torch.tensor(rng.sample(scores.expand(draws, 60), seeds, positions))
    statistic, degrees = chi_square(torch.bincount(chosen, minlength=60), torch.softmax(scores.double(), dim=0))
    assert statistic < limit(degrees)


def test_the_chi_square_test_would_notice_a_wrong_temperature():
    scores = torch.randn(60, generator=torch.Generator().manual_seed(4)) * 2
    chosen = torch.tensor(rng.sample((scores / 1.1).expand(20000, 60), range(20000), [0] * 20000))
    statistic, degrees = chi_square(torch.bincount(chosen, minlength=60), torch.softmax(scores.double(), dim=0))
    assert statistic > limit(degrees)


def test_neighbouring_positions_are_uncorrelated():
    key = rng.seed_words([0], torch.device("cpu"))
    first, second = (rng.gumbel_noise(key, torch.tensor([position]), torch.arange(20000)) for position in (0, 1))
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(20000)


def test_fresh_seeds_differ_and_are_exact_in_json():
    seeds = {rng.fresh_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**53 for seed in seeds)
