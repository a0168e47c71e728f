"""What the captured step draws, cuts included, follows the distribution of transformers' warpers: chi-square."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from chi_square import p_value
from handloom_kernels import draw as kernels
from handloom_kernels import reference, selection
from handloom_kernels.reference import Cuts
from kernel_testing import DEVICE, draw

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter

DRAWS, DRAWN_BY_KERNEL, VOCAB = 8000, 24, 24
BLOCKS = {"BLOCK": 32, "num_warps": 1}
RULES = {  # temperature, top_k, top_p, min_p
    "plain": (1.0, 0, 1.0, 0.0),
    "hot, top_k": (2.0, 9, 1.0, 0.0),
    "cold, top_p": (0.7, 0, 0.8, 0.0),
    "min_p": (1.0, 0, 1.0, 0.1),
    "all": (1.3, 14, 0.9, 0.05),
}


@pytest.fixture
def scores() -> Tensor:
    return draw(1, VOCAB, scale=1.2)


def exact(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    warpers = theirs.LogitsProcessorList([theirs.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(theirs.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(theirs.MinPLogitsWarper(min_p))
    return warpers(torch.zeros(1, 0), scores.cpu())[0].double().softmax(-1)


def drawn(
    scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, *, count: int, by_kernel: bool
) -> Tensor:
    """The tokens of `count` rows, a seed each, by cuts that the kernels found."""

    def one(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([value], dtype=dtype, device=DEVICE)

    cuts = selection.find_cuts(
        scores, one(temperature), one(top_k, torch.int32), one(top_p), one(min_p),
        blocks={"BLOCK": 64, "BINS": 64, "LIST": 128, "num_warps": 1},
    )  # fmt: skip
    rows = scores.expand(count, -1), torch.arange(count, device=DEVICE), torch.full((count,), 7, device=DEVICE)
    shared = one(temperature).repeat(count), Cuts(*(cut.repeat(count) for cut in cuts))
    if by_kernel:
        return kernels.draw(*rows, shared[0], cuts=shared[1], blocks=BLOCKS).token_ids
    return reference.draw(*rows, shared[0], cuts=shared[1]).token_ids


@pytest.mark.parametrize("name", RULES)
def test_draws_follow_the_exact_distribution(name: str, scores: Tensor) -> None:
    """Those of the reference, which are the kernel's."""
    probabilities = exact(scores, *RULES[name])
    assert int((probabilities > 0).sum()) > 3
    tokens = drawn(scores, *RULES[name], count=DRAWS, by_kernel=False)
    assert p_value(tokens.cpu().bincount(minlength=VOCAB), probabilities) > 1e-6
    few = drawn(scores, *RULES[name], count=DRAWN_BY_KERNEL, by_kernel=True)
    assert torch.equal(few, tokens[:DRAWN_BY_KERNEL])


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_draws_of_the_kernel_follow_the_exact_distribution(name: str, scores: Tensor) -> None:
    tokens = drawn(scores, *RULES[name], count=DRAWS // 10, by_kernel=True)
    assert p_value(tokens.cpu().bincount(minlength=VOCAB), exact(scores, *RULES[name])) > 1e-6


def test_the_test_sees_a_distribution_that_is_a_little_off(scores: Tensor) -> None:
    tokens = drawn(scores, 1.2, 0, 1.0, 0.0, count=DRAWS, by_kernel=False)
    assert p_value(tokens.cpu().bincount(minlength=VOCAB), exact(scores, *RULES["plain"])) < 1e-6
