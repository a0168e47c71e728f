"""lm_head.py: exact logits, and from tiles the very tokens that the logits would have given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom.sampling import rng
from handloom_kernels import draw as draw_kernels
from handloom_kernels import lm_head as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import Norm
from kernel_testing import DEVICE, DTYPES, HALF, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter

SMALL = {"BLOCK_V": 64, "BLOCK_R": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def some_head(
    rows: int, vocab_size: int, width: int, dtype: torch.dtype = torch.float32, kind: str = "rms", scale: float = 1.0
) -> tuple[Tensor, Norm, Tensor]:
    """(hidden, norm, weight) with logits of about `scale`."""
    bias = draw(width, dtype=dtype) if kind == "layer" else None
    norm = Norm(kind, 1 + draw(width, dtype=dtype, scale=0.1), bias, 1e-5)
    return draw(rows, width, dtype=dtype, scale=3), norm, draw(vocab_size, width, dtype=dtype, scale=scale / width**0.5)


def places(rows: int) -> tuple[Tensor, Tensor]:
    """(seeds, positions) that differ from row to row."""
    each = torch.arange(rows, device=DEVICE)
    return each * 0x9E3779B97F4A7C15 + 7, each % 1000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab_size", "width"), [(1, 1, 1), (3, 63, 100), (17, 130, 64), (2, 1000, 33)])
def test_logits(rows: int, vocab_size: int, width: int, dtype: torch.dtype) -> None:
    hidden, norm, weight = some_head(rows, vocab_size, width, dtype)
    ours = kernels.lm_head(hidden, norm, weight, None, blocks=SMALL)
    assert_as_exact_as(reference.lm_head, hidden, norm, weight, None, ours=ours)


@pytest.mark.parametrize("scale", [0.1, 5.0, 100.0])
@pytest.mark.parametrize("kind", ["rms_unit_offset", "layer"])
def test_softcap_and_kinds_of_norm(kind: str, scale: float) -> None:
    hidden, norm, weight = some_head(2, 100, 64, kind=kind, scale=scale)
    ours = kernels.lm_head(hidden, norm, weight, 30.0, blocks=SMALL)
    assert_as_exact_as(reference.lm_head, hidden, norm, weight, 30.0, ours=ours)


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_half_precision_logits_are_rounded_as_a_linear_layer_rounds_them(softcap: float | None) -> None:
    """So that the best two tie where they do in transformers, and the lowest id wins there as here."""
    hidden, norm, weight = some_head(4, 300, 64, HALF, scale=3)
    ours = kernels.lm_head(hidden, norm, weight, softcap, blocks=SMALL)
    assert torch.equal(ours, ours.to(HALF).float())
    theirs = reference.lm_head(hidden, norm, weight, softcap)
    assert (ours == theirs).float().mean() > (0.97 if softcap is None else 0.8)
    assert (ours - theirs).abs().max() <= 2 * torch.finfo(HALF).eps * theirs.abs().max()


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tokens_are_those_of_the_logits(dtype: torch.dtype, softcap: float | None) -> None:
    hidden, norm, weight = some_head(20, 150, 64, dtype, scale=3)
    seeds, positions = places(20)
    temperature = torch.linspace(0, 3, 20, device=DEVICE)
    greedy = torch.arange(20, device=DEVICE) % 3 == 0
    token_ids, logprobs = kernels.lm_head_choose(
        hidden, norm, weight, softcap, temperature, greedy, seeds, positions, blocks=SMALL
    )
    logits = kernels.lm_head(hidden, norm, weight, softcap, blocks=SMALL)
    expected = draw_kernels.draw(logits, seeds, positions, temperature, greedy)
    assert torch.equal(token_ids, expected.token_ids)
    exact = logits.double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    assert (logprobs - exact).abs().max() <= 3e-6


def test_the_reference_agrees() -> None:
    hidden, norm, weight = some_head(4, 100, 64, scale=3)
    args = hidden, norm, weight, None, floats(0.5, 1.0, 0.0, 2.0), None, *places(4)
    ours, expected = kernels.lm_head_choose(*args, blocks=SMALL), reference.lm_head_choose(*args)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-5)


def test_greedy_alone_needs_no_seeds() -> None:
    hidden, norm, weight = some_head(3, 200, 64)
    weight[130] = weight[70]  # a tie with every token's twin in another tile
    weight[:70] *= 0.01
    weight[71:130] *= 0.01
    weight[131:] *= 0.01
    token_ids, _ = kernels.lm_head_choose(hidden, norm, weight, None, None, None, None, None, blocks=SMALL)
    logits = kernels.lm_head(hidden, norm, weight, None, blocks=SMALL)
    assert token_ids.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


def test_many_draws_are_those_of_the_engine() -> None:
    rows = 256
    hidden, norm, weight = some_head(1, 24, 16, scale=1.2)
    seeds, positions = places(rows)
    blocks = {**SMALL, "BLOCK_R": 128, "BLOCK_V": 32, "BLOCK_K": 16}
    args = norm, weight, None, None, None, seeds, positions
    token_ids, _ = kernels.lm_head_choose(hidden.expand(rows, -1), *args, blocks=blocks)
    logits = kernels.lm_head(hidden, norm, weight, None, blocks=SMALL).cpu().expand(rows, -1)
    unsigned = [seed % 2**64 for seed in seeds.tolist()]
    assert token_ids.tolist() == rng.sample(logits, unsigned, positions.tolist())


def test_a_row_that_fails_fails_alone() -> None:
    hidden, norm, weight = some_head(4, 100, 32)
    hidden[1, 5] = math.nan
    args = norm, weight, None, None, None
    token_ids, logprobs = kernels.lm_head_choose(hidden, *args, *places(4), blocks=SMALL)
    alone, _ = kernels.lm_head_choose(hidden[2:], *args, *(each[2:] for each in places(4)), blocks=SMALL)
    assert token_ids[1] == -1
    assert logprobs[1].isnan()
    assert token_ids[2:].tolist() == alone.tolist()


def test_a_row_does_not_depend_on_its_company() -> None:
    hidden, norm, weight = some_head(18, 100, 64)
    assert_rows_do_not_depend_on_company(
        lambda rows: kernels.lm_head(hidden[rows], norm, weight, 9.0, blocks=SMALL), 18
    )
    seeds, positions = places(18)

    def choose(rows: slice) -> Tensor:
        given = seeds[rows], positions[rows]
        both = kernels.lm_head_choose(hidden[rows], norm, weight, 9.0, None, None, *given, blocks=SMALL)
        return torch.stack((both[0].double(), both[1].double()), dim=1)

    everything = choose(slice(0, 18))
    for part in (slice(0, 1), slice(5, 17), slice(17, 18), slice(0, 18)):
        assert torch.equal(choose(part), everything[part])


def test_rows_that_lie_apart_and_no_rows() -> None:
    hidden, norm, weight = some_head(4, 70, 32)
    apart = torch.cat((hidden, hidden), dim=1)[:, :32]
    assert torch.equal(
        kernels.lm_head(apart, norm, weight, None, blocks=SMALL),
        kernels.lm_head(hidden, norm, weight, None, blocks=SMALL),
    )
    assert kernels.lm_head(hidden[:0], norm, weight, None).shape == (0, 70)
    assert kernels.lm_head_choose(hidden[:0], norm, weight, None, None, None, None, None)[0].shape == (0,)


def test_what_does_not_fit_is_named() -> None:
    hidden, norm, weight = some_head(2, 70, 32)
    word = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((hidden[0], norm, weight, None), r"hidden has shape \[32\]"),
        ((hidden, norm, weight[:, :31], None), r"weight has shape \[70, 31\]; expected \[any, 32\]"),
        ((hidden, norm, weight.half(), None), "weight has dtype torch.float16"),
        ((hidden, norm, weight.T.contiguous().T, None), "weight has strides"),
        ((hidden, norm, weight[:0], None), "it must have elements"),
        ((hidden, norm, weight, 0.0), "softcap is 0.0"),
        ((hidden, norm._replace(kind="batch"), weight, None), "norm.kind is 'batch'"),
    ]
    for args, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.lm_head(*args)
    with pytest.raises(KernelError, match="seeds and positions come together"):
        kernels.lm_head_choose(hidden, norm, weight, None, None, None, word, None)
    with pytest.raises(KernelError, match="temperature has dtype"):
        kernels.lm_head_choose(hidden, norm, weight, None, word, None, word, word)
