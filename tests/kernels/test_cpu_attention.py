"""The CPU's attention over long contexts: as exact as the formula; the same bits however its keys are shared out."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from handloom.ops import cpu
from handloom.ops.cpu.instructions import SPLIT
from handloom_kernels import reference
from kernel_testing import assert_as_exact_as
from paged import Paged, draw

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LENGTH = 2 * SPLIT + 90


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count = [1]
    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: count[0])
    return count


@pytest.mark.parametrize("seed", range(12))
def test_long_contexts_are_as_exact_as_the_formula(seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    group, num_kv_heads = rng.choice((1, 2, 3, 5, 7, 20)), rng.choice((1, 2, 3))
    lengths = [rng.choice((1, SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT, rng.randint(1, 1500))) for _ in range(4)]
    new = [min(length, rng.choice((1, 1, 4, 70))) for length in lengths]
    head_dim, page_size = rng.choice((16, 20, 32, 64, 80, 96)), rng.choice((5, 16, 64))
    window, softcap = rng.choice((None, 7, SPLIT, 400)), rng.choice((None, 5.0))
    paged = Paged.make(
        lengths=lengths, new=new, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=page_size,
    )  # fmt: skip
    args = *paged.arguments(), head_dim**-0.5, window, softcap
    assert_as_exact_as(reference.paged_attention, *args, ours=cpu.paged_attention(*args))


@DTYPES
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (2, 20), (7, 80), (18, 32)])
@pytest.mark.parametrize("window", [None, 7, 300])
def test_a_query_has_the_same_bits_in_a_prompt_alone_and_in_company(
    dtype: torch.dtype, group: int, head_dim: int, window: int | None, threads: list[int]
) -> None:
    rng = random.Random(head_dim)
    q = draw(LENGTH, 2 * group, head_dim)
    k, v = (draw(LENGTH, 2, head_dim, dtype=dtype) for _ in "kv")

    def chunk(first: int, last: int, company: int, page_size: int, shuffle: bool) -> Tensor:
        """Of queries first..last, beside others of one to three queries each with long contexts of their own."""
        others = [(rng.randint(1, 3), rng.randint(3, LENGTH)) for _ in range(company)]
        queries = [draw(new, 2 * group, head_dim, dtype=dtype) for new, _ in others]
        keys, values = ([draw(length, 2, head_dim, dtype=dtype) for _, length in others] for _ in "kv")
        paged = Paged.lay_out([*queries, q[first:last].to(dtype)], [*keys, k[:last]], [*values, v[:last]], page_size, shuffle)  # fmt: skip # noqa: E501
        states = torch.cat([*(x.float() for x in queries), q[first:last]])
        return cpu.paged_attention(states, *paged.arguments()[1:], head_dim**-0.5, window, None)[-(last - first) :]

    whole = chunk(0, LENGTH, 0, 16, False)
    for first, last in [(LENGTH - 1, LENGTH), (LENGTH - 3, LENGTH), (SPLIT - 1, SPLIT + 1), (3, SPLIT + 7), (400, 401)]:
        for company, page_size, shuffle in ((0, 16, False), (0, 16, True), (3, 5, True), (2, 64, True), (1, 5, False)):
            threads[0] = rng.choice((1, 2, 3))
            got = chunk(first, last, company, page_size, shuffle)
            assert torch.equal(got, whole[first:last]), (first, last, company, page_size, shuffle)


def test_of_equal_keys_a_long_context_is_the_mean_and_of_one_seen_key_its_value() -> None:
    v = draw(LENGTH, 1, 32)
    paged = Paged.lay_out([torch.zeros(2, 3, 32)], [torch.zeros(LENGTH, 1, 32)], [v])
    mean = cpu.paged_attention(*paged.arguments(), 1.0)[-1]
    assert (mean - v.double().mean((0, 1)).repeat(3)).abs().max() < 1e-7
    alone = cpu.paged_attention(*paged.arguments(), 1.0, 1)
    assert torch.equal(alone, v[-2:].flatten(1).repeat(1, 3))
