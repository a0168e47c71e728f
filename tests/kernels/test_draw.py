"""draw.py: the engine's own tokens, exact log-probabilities, failures that stay in their row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from handloom.sampling import rng, sampler
from handloom_kernels import draw as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.gumbel import gumbel_noise, noise_of_word
from handloom_kernels.reference import Choice, Cuts
from kernel_testing import DEVICE, DTYPES, draw

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**53 - 1, 2**63 + 12345, 2**64 - 1]


@triton.jit
def _noise_kernel(out, seeds, positions, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token_ids = tl.arange(0, COLUMNS)[None, :]
    noise = gumbel_noise(token_ids, tl.load(seeds + rows), tl.load(positions + rows))
    tl.store(out + rows * COLUMNS + token_ids, noise)


def noise_of(seeds: Tensor, positions: Tensor, columns: int, rows_at_a_time: int) -> Tensor:
    """What the kernels add to the scores of tokens 0 to columns: [R, columns]."""
    out = torch.empty(len(seeds), columns, device=DEVICE)
    _noise_kernel[(len(seeds) // rows_at_a_time,)](out, seeds, positions, ROWS=rows_at_a_time, COLUMNS=columns)
    return out


def words(seeds: list[int]) -> Tensor:
    """Seeds in [0, 2^64) as int64."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], device=DEVICE)


def rows_of(count: int) -> tuple[list[int], list[int]]:
    """(seeds, positions) that differ from row to row."""
    seeds = [(SEEDS[i % len(SEEDS)] + i // len(SEEDS)) % 2**64 for i in range(count)]
    return seeds, [(37 * i) % 5000 for i in range(count)]


def choose(scores: Tensor, **options: Any) -> Choice:
    seeds, positions = rows_of(len(scores))
    options.setdefault("blocks", {"BLOCK": 64, "num_warps": 1})
    return kernels.draw(scores, words(seeds), torch.tensor(positions, device=DEVICE), **options)


def by_reference(scores: Tensor, **options: Any) -> Choice:
    seeds, positions = rows_of(len(scores))
    return reference.draw(scores, words(seeds), torch.tensor(positions, device=DEVICE), **options)


def assert_same(ours: Choice, theirs: Choice) -> None:
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.top_ids, theirs.top_ids)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(ours.top_logprobs, theirs.top_logprobs, rtol=1e-6, atol=2e-6, equal_nan=True)


def test_noise_is_that_of_the_engine_up_to_the_last_bits() -> None:
    count = 1 << 15
    positions = [0, 1, 1000, 2**31 - 1, 77, 5, 6]
    ours = noise_of(words(SEEDS), torch.tensor(positions, device=DEVICE), count, 1)
    for row, (seed, position) in enumerate(zip(SEEDS, positions, strict=True)):
        key = rng.seed_words([seed], torch.device("cpu"))
        counter = (torch.arange(count), torch.tensor([position]), torch.zeros(1).long(), torch.zeros(1).long())
        uniform = ((rng.philox_4x32_10(counter, key)[0].float() + 0.5) * 2.0**-32).clamp(max=1 - 2**-24).double()
        exact = -torch.log(-torch.log1p(-uniform))
        error = (ours[row].cpu().double() - exact).abs() / exact.abs().clamp(min=1)
        assert error.max() <= 3 * 2**-23
        theirs = rng.gumbel_noise(key, torch.tensor([position]), torch.arange(count))
        torch.testing.assert_close(ours[row].cpu(), theirs, rtol=4 * 2**-23, atol=4 * 2**-23)


@triton.jit
def _noise_of_words_kernel(out, words, COUNT: tl.constexpr):  # noqa: N803
    at = tl.arange(0, COUNT)
    tl.store(out + at, noise_of_word(tl.load(words + at).to(tl.uint32)))


def test_the_noise_of_every_word_is_finite() -> None:
    """U is never 0 or 1, whose logarithms are infinite; nor is the noise of its neighbours off."""
    values = [0, 1, 2, 3, 255, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    given = torch.tensor([*values, *(2**power for power in range(13, 16))], device=DEVICE)
    out = torch.empty(len(given), device=DEVICE)
    _noise_of_words_kernel[(1,)](out, given, COUNT=len(given))
    uniform = ((given.cpu().float() + 0.5) * 2.0**-32).clamp(max=1 - 2**-24).double()
    exact = -torch.log(-torch.log1p(-uniform))
    assert torch.isfinite(out).all()
    assert ((out.cpu().double() - exact).abs() <= 3 * 2**-23 * exact.abs().clamp(min=1)).all()


def test_the_reference_draws_the_noise_of_the_engine_bit_for_bit() -> None:
    for seed in SEEDS:
        key = rng.seed_words([seed], torch.device("cpu"))
        theirs = rng.gumbel_noise(key, torch.tensor([9]), torch.arange(3000))
        ours = reference.gumbel_noise(words([seed]).cpu(), torch.tensor([9]), torch.arange(3000))
        assert torch.equal(ours, theirs)


def test_thousands_of_draws_are_those_of_the_engine_and_have_the_distribution() -> None:
    """Token for token rng.sample's, and chi-square against softmax: seeds are fixed, so that this cannot flake."""
    rows, vocab_size = 1 << 14, 32
    scores = draw(vocab_size, scale=1.3)
    seeds, positions = torch.arange(rows, device=DEVICE) % 5, torch.arange(rows, device=DEVICE)
    drawn = (scores + noise_of(seeds, positions, vocab_size, 1 << 12)).argmax(-1)
    theirs = rng.sample(scores.cpu().expand(rows, -1), seeds.tolist(), positions.tolist())
    assert drawn.tolist() == theirs
    expected = rows * scores.double().softmax(-1)
    assert expected.min() > 5
    statistic = ((drawn.bincount(minlength=vocab_size) - expected) ** 2 / expected).sum().cpu()
    assert torch.special.gammaincc(torch.tensor((vocab_size - 1) / 2, dtype=torch.float64), statistic / 2) > 0.001


def test_tokens_are_those_of_the_engine() -> None:
    scores = draw(48, 100, scale=2)
    scores[::3, 10:] = -torch.inf
    seeds, positions = rows_of(48)
    ours = choose(scores, blocks={"BLOCK": 128, "num_warps": 1})
    assert ours.token_ids.tolist() == rng.sample(scores.cpu(), seeds, positions)
    logprobs, _ = sampler.token_logprobs(scores, ours.token_ids)
    torch.testing.assert_close(ours.logprobs.tolist(), logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 100, 1000])
def test_any_vocabulary_in_tiles(vocab_size: int) -> None:
    scores = draw(2, vocab_size, scale=3)
    blocks = {"BLOCK": 64 if vocab_size < 1000 else 128, "num_warps": 1}
    assert_same(choose(scores, blocks=blocks), by_reference(scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_rows_that_lie_apart(dtype: torch.dtype) -> None:
    scores = draw(3, 200, dtype=dtype, scale=3)[:, 30:130]
    assert_same(choose(scores), by_reference(scores))


def test_temperature_and_greedy_rows_in_one_batch() -> None:
    scores = draw(6, 100, scale=3)
    temperature = torch.tensor([0.3, 1.0, 0.0, 2.5, 1.0, 0.0], device=DEVICE)
    greedy = torch.tensor([False, True, False, False, False, True], device=DEVICE)
    ours = choose(scores, temperature=temperature, greedy=greedy)
    assert_same(ours, by_reference(scores, temperature=temperature, greedy=greedy))
    assert torch.equal(ours.token_ids[[1, 2, 5]], scores.argmax(-1)[[1, 2, 5]])


def test_greedy_takes_the_lowest_id_among_equals_wherever_tiles_end() -> None:
    scores = draw(4, 200, scale=0.1)
    for row, ties in enumerate(([63, 64], [5, 199], [130, 131, 190], [64, 128])):
        scores[row, ties] = 1.0
    assert kernels.draw(scores, None, None, blocks={"BLOCK": 64}).token_ids.tolist() == [63, 5, 130, 64]
    greedy = torch.ones(4, dtype=torch.bool, device=DEVICE)
    assert choose(scores, greedy=greedy).token_ids.tolist() == [63, 5, 130, 64]


def test_logprobs_are_of_the_logits_and_not_of_the_scores() -> None:
    logits = draw(3, 150, scale=3)
    scores = logits.clone()
    scores[:, 20:] = -torch.inf
    ours = choose(scores, logits=logits, top_n=3)
    assert_same(ours, by_reference(scores, logits=logits, top_n=3))
    exact = logits.double().log_softmax(-1).gather(1, ours.token_ids[:, None])[:, 0]
    assert (ours.logprobs - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("top_n", [1, 5, 20])
def test_top_n_with_ties_to_the_lowest_id(top_n: int) -> None:
    logits = draw(2, 100).mul(2).round()
    logits[0, 3:] = -torch.inf
    logits[1, 7] = -0.0
    ours = choose(logits, top_n=top_n)
    assert_same(ours, by_reference(logits, top_n=top_n))
    _, theirs = sampler.token_logprobs(logits[1:], ours.token_ids[1:], top_n)
    torch.testing.assert_close(ours.top_logprobs[1].tolist(), [value for _, value in theirs[0]], atol=1e-6, rtol=1e-6)


def test_top_n_of_more_tiles_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MAX_KEYS", 64)
    logits = draw(1, 300).mul(2).round()
    ours = kernels.draw(logits, None, None, top_n=20, blocks={"BLOCK": 64, "num_warps": 1})
    assert_same(ours, reference.draw(logits, None, None, top_n=20))


def test_cuts_leave_out_tokens_that_were_never_written_away() -> None:
    scores = draw(4, 100)
    scores[1, [3, 50, 90]] = 4.0
    cuts = Cuts(
        torch.tensor([1.0, 4.0, -torch.inf, float(scores[3].max())], device=DEVICE),
        torch.tensor([2**31 - 1, 3, 2**31 - 1, 2**31 - 1], dtype=torch.int32, device=DEVICE),
    )
    ours = choose(scores, cuts=cuts)
    assert_same(ours, by_reference(scores, cuts=cuts))
    assert ours.token_ids[[1, 3]].tolist() == [3, int(scores[3].argmax())]


def test_a_row_that_fails_fails_alone() -> None:
    logits = draw(8, 100)
    alone = choose(logits)
    logits[1, 80] = math.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    logits[4] = math.nan
    logits[5, 1:] = -torch.inf
    ours = choose(logits)
    assert_same(ours, by_reference(logits))
    assert ours.token_ids[1:6].tolist() == [-1, -1, -1, -1, 0]
    assert ours.logprobs[1:5].isnan().all()
    for mine, before in zip(ours, alone, strict=True):
        assert torch.equal(mine[[0, 6, 7]], before[[0, 6, 7]])
    assert choose(logits[2:4, :60], top_n=2).top_ids.eq(-1).all()


def test_scores_that_fail_though_the_logits_are_well() -> None:
    logits = draw(5, 100)
    scores = logits.clone()
    scores[0, 70] = math.nan
    scores[1, 70] = torch.inf
    scores[2, 70] = torch.inf
    scores[3] = -torch.inf
    greedy = torch.tensor([False, False, True, False, False], device=DEVICE)
    ours = choose(scores, greedy=greedy, logits=logits)
    assert_same(ours, by_reference(scores, greedy=greedy, logits=logits))
    assert kernels.draw(scores[1:2], None, None, logits=logits[1:2]).token_ids.tolist() == [70]
    assert ours.token_ids[:4].tolist() == [-1, -1, 70, -1], "only greedy rows may be told their token by +inf"


def test_a_row_does_not_depend_on_its_company() -> None:
    scores = draw(4, 100)
    seeds, positions = rows_of(4)

    def run(rows: slice) -> Choice:
        given = words(seeds)[rows], torch.tensor(positions, device=DEVICE)[rows]
        return kernels.draw(scores[rows], *given, top_n=4, blocks={"BLOCK": 64})

    everything = run(slice(0, 4))
    for part in (slice(0, 1), slice(2, 4), slice(0, 4)):
        for mine, whole in zip(run(part), everything, strict=True):
            assert torch.equal(mine, whole[part])


def test_no_rows_are_fine() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert kernels.draw(draw(0, 8), none, none, top_n=3).top_ids.shape == (0, 3)


def test_what_does_not_fit_is_named() -> None:
    scores, word = draw(2, 8), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    cuts = Cuts(draw(2), word)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((scores[0], word, word), {}, r"scores has shape \[8\]"),
        ((scores.double(), word, word), {}, "scores has dtype torch.float64"),
        ((scores, word, None), {}, "seeds and positions come together"),
        ((scores, word.int(), word), {}, "seeds has dtype torch.int32"),
        ((scores, word, word[:1]), {}, r"positions has shape \[1\]; expected \[2\]"),
        ((scores, word, word), {"temperature": word}, "temperature has dtype torch.int64"),
        ((scores, word, word), {"greedy": word}, "greedy has dtype torch.int64"),
        ((scores, word, word), {"logits": draw(2, 9)}, r"logits has shape \[2, 9\]; expected \[2, 8\]"),
        ((scores, word, word), {"cuts": cuts}, "cuts.token_ids has dtype torch.int64"),
        ((scores, word, word), {"top_n": 9}, "top_n is 9; expected 0 to 8"),
        ((draw(2, 0), word, word), {}, "scores have 0 columns"),
    ]
    for args, options, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.draw(*args, **options)
