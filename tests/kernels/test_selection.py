"""selection.py: the tokens that transformers keeps, a rule for ties, and exact thresholds on hard rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from handloom.sampling import processors
from handloom_kernels import draw as draw_kernels
from handloom_kernels import reference
from handloom_kernels import selection as kernels
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import Cuts
from kernel_testing import DEVICE, DTYPES, draw

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter

SMALL = {"BLOCK": 64, "BINS": 64, "LIST": 128, "num_warps": 1}
NO_LIST = {**SMALL, "LIST": 2}


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def by_transformers(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One row [V] through the warpers, in the order in which `generate` applies them."""
    out, nothing = scores[None], torch.zeros(1, 0)
    if temperature != 1.0:
        out = theirs.TemperatureLogitsWarper(temperature)(nothing, out)
    if top_k:
        out = theirs.TopKLogitsWarper(top_k)(nothing, out)
    if top_p < 1.0:
        out = theirs.TopPLogitsWarper(top_p)(nothing, out)
    if min_p:
        out = theirs.MinPLogitsWarper(min_p)(nothing, out)
    return out[0]


RULES = [  # temperature, top_k, top_p, min_p
    (1.0, 5, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.7, 40, 0.95, 0.0),
    (1.7, 70, 0.3, 0.2),
    (0.2, 1, 0.5, 0.5),
    (1.0, 80, 0.999, 1e-4),
    (3.0, 7, 0.01, 1.0),
]


@pytest.mark.parametrize(("scale", "blocks"), [(0.2, SMALL), (3.0, SMALL), (3.0, NO_LIST)], ids=str)
def test_what_transformers_and_the_engine_keep(scale: float, blocks: dict[str, int]) -> None:
    scores = draw(len(RULES), 100, scale=scale)
    temperature, top_k, top_p, min_p = zip(*RULES, strict=True)
    given = floats(*temperature), ints(*top_k), floats(*top_p), floats(*min_p)
    ours = kernels.select(scores, *given, blocks=blocks)
    assert torch.equal(ours, reference.select(scores, *given))
    for row, rules in enumerate(RULES):
        assert torch.equal(ours[row], by_transformers(scores[row], *rules)), rules
    engine = scores.cpu()
    processors.temperature(engine, temperature)
    processors.top_k(engine, top_k)
    processors.top_p(engine, top_p)
    processors.min_p(engine, [p or None for p in min_p])
    assert torch.equal(ours.cpu(), engine)


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 100, 1000])
def test_any_vocabulary(vocab_size: int) -> None:
    scores = draw(2, vocab_size, scale=2)
    given = None, ints(min(20, vocab_size), 3), floats(0.8, 0.99), None
    blocks = {**SMALL, "BLOCK": 256} if vocab_size == 1000 else SMALL
    assert torch.equal(kernels.select(scores, *given, blocks=blocks), reference.select(scores, *given))


@pytest.mark.parametrize("rule", range(4), ids=["temperature", "top_k", "top_p", "min_p"])
def test_each_rule_without_the_others(rule: int) -> None:
    scores = draw(3, 100, scale=2)
    given: list[Tensor | None] = [None] * 4
    given[rule] = (floats(0.5, 1.0, 0.0), ints(0, 10, 100), floats(0.5, 1.0, 0.0), floats(0.0, 0.3, 1.0))[rule]
    assert torch.equal(kernels.select(scores, *given, blocks=SMALL), reference.select(scores, *given))


def test_k_beyond_what_is_left_cuts_nothing() -> None:
    scores = draw(3, 100)
    scores[:, 20:] = -torch.inf
    given = None, ints(50, 20, 19), None, floats(0.3, 0.0, 0.0)
    ours = kernels.select(scores, *given, blocks=SMALL)
    assert torch.equal(ours, reference.select(scores, *given))
    assert (ours > -torch.inf).sum(-1)[1:].tolist() == [20, 19]
    cuts = kernels.find_cuts(scores, *given, blocks=SMALL)
    assert cuts.scores[1] == -torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_rows_that_lie_apart(dtype: torch.dtype) -> None:
    scores = draw(3, 200, dtype=dtype, scale=3)[:, 30:130]
    given = floats(0.7, 1.0, 1.3), ints(10, 0, 50), floats(0.9, 0.8, 0.7), floats(0.0, 0.1, 0.0)
    assert torch.equal(kernels.select(scores, *given, blocks=SMALL), reference.select(scores, *given))


@pytest.mark.parametrize("blocks", [SMALL, NO_LIST], ids=["list", "row"])
def test_equal_scores(blocks: dict[str, int]) -> None:
    """top-k keeps every tie with the k-th; of ties across the p-cut the lowest ids stay, as many as transformers'."""
    scores = draw(6, 100).mul(1.5).round()
    scores[4] = 1.0
    scores[5, ::2] = -0.0
    scores[5, 1::2] = 0.0
    top_k, top_p = [20, 0, 60, 0, 0, 7], [1.0, 0.513, 0.8, 0.9, 0.353, 0.513]
    ours = kernels.select(scores, None, ints(*top_k), floats(*top_p), blocks=blocks)
    assert torch.equal(ours, reference.select(scores, None, ints(*top_k), floats(*top_p)))
    for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)):
        others, kept = by_transformers(scores[row], 1.0, k, p, 0.0) > -torch.inf, ours[row] > -torch.inf
        lowest = scores[row][kept].min()
        assert torch.equal(kept & (scores[row] != lowest), others & (scores[row] != lowest))
        assert abs(int(kept.sum()) - int(others.sum())) <= 1, "float32 sums of equal probabilities round"
        tied = (scores[row] == lowest).nonzero()[:, 0]
        assert kept[tied].tolist() == sorted(kept[tied].tolist(), reverse=True), "the lowest ids stay"


@pytest.mark.parametrize("blocks", [SMALL, NO_LIST], ids=["list", "row"])
def test_hard_rows(blocks: dict[str, int]) -> None:
    scores = draw(10, 60)
    scores[0] *= 1e-6  # all in a few bins of the float's exponent
    scores[1] += 1000
    scores[2, 1:] -= 1e30  # one token has everything, and the others span the whole range
    scores[3] *= 1e-38
    scores[4, :50] = -torch.inf
    scores[5] = torch.linspace(0, -200, 60)
    scores[6, 30:] -= 60  # k reaches what weighs nothing
    scores[7] = torch.finfo(torch.float32).max * torch.linspace(-1, 1, 60)
    given = (
        None,
        ints(10, 20, 30, 40, 20, 60, 50, 0, 59, 60),
        floats(0.9, 0.95, 0.99, 0.5, 0.9, 0.999, 1.0, 0.9, 1 - 2**-24, 1e-8),
        floats(0.0, 0.1, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0),
    )
    assert torch.equal(kernels.select(scores, *given, blocks=blocks), reference.select(scores, *given))


def test_rows_that_fail_or_are_greedy_are_left_whole() -> None:
    scores = draw(6, 100)
    scores[0, 99] = torch.nan
    scores[1, 3] = torch.inf
    scores[2] = -torch.inf
    scores[3] = torch.nan
    given = floats(2.0, 2.0, 2.0, 2.0, 0.0, 2.0), ints(*[5] * 6), floats(*[0.5] * 6), floats(*[0.1] * 6)
    ours = kernels.select(scores, *given, blocks=SMALL)
    torch.testing.assert_close(ours, reference.select(scores, *given), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours[:4], scores[:4] / 2, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours[4], scores[4])
    assert 0 < (ours[5] > -torch.inf).sum() <= 5


@pytest.mark.parametrize("blocks", [SMALL, NO_LIST], ids=["list", "row"])
def test_the_p_cut_against_float64(blocks: dict[str, int]) -> None:
    """Where float32 sums would go wrong: much of the mass in many small tokens, tokens that weigh almost nothing."""
    scores = draw(4, 250, scale=0.01)
    scores[:2, 7] = 6.0
    scores[2] = -torch.linspace(0, 30, 250).flip(0)
    scores[3] = 17 - torch.linspace(0, 45, 250) ** 0.7 * 2.5
    top_p = floats(0.9, 0.6, 1 - 2**-20, 1 - 2**-24)
    ours = kernels.select(scores, None, None, top_p, blocks={**blocks, "BLOCK": 256, "BINS": 256}) > -torch.inf
    probabilities, order = scores.double().softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    clear = (before - top_p[:, None].double()).abs() > 2**-21
    assert torch.equal((before < top_p[:, None].double())[clear], ours.gather(1, order)[clear])
    exact = (before < top_p[:, None].double()).sum(-1)
    assert (ours.sum(-1) - exact).abs().max() <= 1, "tails of almost nothing are cut within a token of where they end"


def test_cuts_say_what_stays() -> None:
    scores = draw(4, 100).mul(2).round()
    given = floats(0.5, 1.0, 2.0, 1.0), ints(9, 0, 0, 0), floats(0.9, 0.5, 1.0, 1.0), None
    ours, exact = kernels.find_cuts(scores, *given, blocks=SMALL), reference.find_cuts(scores, *given)
    assert torch.equal(ours.scores, exact.scores)
    whole = kernels.apply_cuts(scores, given[0], ours, blocks=SMALL)
    assert torch.equal(whole, kernels.select(scores, *given, blocks=SMALL))
    words = torch.arange(4, device=DEVICE)
    from_cuts = draw_kernels.draw(scores, words, words, given[0], logits=scores, cuts=ours)
    assert torch.equal(from_cuts.token_ids, draw_kernels.draw(whole, words, words, logits=scores).token_ids)


def test_a_row_does_not_depend_on_its_company() -> None:
    scores = draw(4, 150)
    given: tuple[Any, ...] = (floats(0.5, 1, 2, 1), ints(50, 0, 9, 0), floats(0.9, 0.5, 0.7, 1), floats(0, 0, 0, 0.1))

    def run(rows: slice) -> Tensor:
        return kernels.select(scores[rows], *(each[rows] for each in given), blocks=SMALL)

    everything = run(slice(0, 4))
    for part in (slice(0, 1), slice(1, 2), slice(2, 4), slice(0, 4)):
        assert torch.equal(run(part), everything[part])


def test_a_rule_that_is_not_a_number_is_off() -> None:
    """Never a silent cut: who calls the kernels has checked what the user said."""
    scores, nan, off = draw(2, 100, scale=2), floats(torch.nan, 0.5), floats(1.0, 0.5)
    ours = kernels.select(scores, None, None, nan, nan, blocks=SMALL)
    assert torch.equal(ours[0], scores[0])
    assert torch.equal(ours[1], reference.select(scores, None, None, off, off)[1])


def test_hundreds_of_equal_scores_of_no_mass_across_the_cut() -> None:
    scores = torch.full((2, 140), -200.0, device=DEVICE)
    scores[0, 70] = scores[1, 139] = 0.0
    given = None, ints(30, 0), floats(1 - 2**-24, 1.0), floats(0.0, 1e-30)
    for blocks in (SMALL, NO_LIST):
        assert torch.equal(kernels.select(scores, *given, blocks=blocks), reference.select(scores, *given))


def test_no_rows_are_fine() -> None:
    assert kernels.select(draw(0, 8), None, ints()).shape == (0, 8)


def test_what_does_not_fit_is_named() -> None:
    scores = draw(2, 8)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((scores[0],), r"scores has shape \[8\]"),
        ((scores.double(),), "scores has dtype torch.float64"),
        ((draw(2, 16)[:, ::2],), "scores has strides"),
        ((scores, ints(1, 1)), "temperature has dtype torch.int32"),
        ((scores, None, floats(1, 1)), "top_k has dtype torch.float32"),
        ((scores, None, None, floats(1)), r"top_p has shape \[1\]; expected \[2\]"),
        ((scores, None, None, None, scores), "min_p has shape"),
        ((draw(2, 0),), "scores have 0 columns"),
        ((torch.zeros(1, device=DEVICE).expand(1, 2**22 + 1).contiguous(),), "scores have 4194305 columns"),
    ]
    for args, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.select(*args)
    with pytest.raises(KernelError, match="token_ids has dtype"):
        kernels.apply_cuts(scores, None, Cuts(floats(1, 1), floats(1, 1)))
