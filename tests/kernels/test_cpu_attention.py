"""The CPU's attention over long contexts: as exact as the formula; the same bits however its keys are shared out."""

from __future__ import annotations

import math
import mmap
import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom.model.batch import HostBatch
from handloom.ops import cpu
from handloom.ops.cpu.instructions import SPLIT
from handloom_kernels import reference
from handloom_kernels.reference import Norm
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
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (2, 20), (7, 80), (18, 32), (5, 96), (4, 128)])
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


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say which memory it has given")
@DTYPES
@pytest.mark.parametrize("new", [1, 90])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_what_was_never_written_is_not_read(dtype: torch.dtype, new: int, page_size: int, head_dim: int) -> None:
    """The system gives memory at its first touch; a write after a read costs it more than one that comes first."""
    length, shape = 163, (4 * 64 // page_size, page_size, 5, head_dim)
    maps = [mmap.mmap(-1, math.prod(shape) * dtype.itemsize) for _ in "kv"]
    pools = [torch.frombuffer(own, dtype=dtype).view(shape) for own in maps]
    for pages in pools:
        pages.flatten(0, 1)[:length] = draw(length, 5, head_dim, dtype=dtype)
    written = [given(pages) for pages in pools]
    assert 0 < sum(written[0]) < len(written[0])
    table = torch.arange(shape[0])[None]
    cpu.paged_attention(draw(new, 15, head_dim), *pools, table, torch.tensor([0, new]), torch.tensor([length]), 1.0)
    assert [given(pages) for pages in pools] == written


def given(tensor: Tensor) -> list[bool]:
    """Whether there is memory behind each of the system's pages that a tensor lies on."""
    first, nbytes = tensor.data_ptr() // mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    count = -(-nbytes // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(8 * first)
        return [bool(entry >> 63) for entry in struct.unpack(f"{count}Q", file.read(8 * count))]


# Sinks and ALiBi ---------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["sinks", "slopes", "sinks slopes"])
@pytest.mark.parametrize("new", [1, 5, 40, LENGTH])
@pytest.mark.parametrize("window", [None, 300])
def test_sinks_and_alibi_are_as_exact_as_the_formula(features: str, new: int, window: int | None) -> None:
    torch.manual_seed(new)
    paged = Paged.make(lengths=[LENGTH, 70], new=[new, 3], num_heads=6, num_kv_heads=2, head_dim=20)
    sinks = draw(6) + 4.0 if "sinks" in features else None
    slopes = 2.0 ** -torch.arange(1.0, 7.0) if "slopes" in features else None
    for softcap in (None, 5.0):
        args = *paged.arguments(), 20**-0.5, window, softcap, sinks, slopes
        ours = cpu.paged_attention(*args)
        assert_as_exact_as(reference.paged_attention, *args, ours=ours)
        without = cpu.paged_attention(*args[:-2])
        assert (ours - without).abs().max() > 1e-2, "they change nothing"


@pytest.mark.parametrize("window", [None, 300])
def test_with_sinks_and_alibi_a_query_has_the_same_bits_alone_and_in_a_prompt(window: int | None) -> None:
    paged = Paged.make(lengths=[LENGTH], new=[LENGTH], num_heads=6, num_kv_heads=2, head_dim=64)
    features = 64**-0.5, window, None, draw(6), 2.0 ** -torch.arange(1.0, 7.0)
    q, *pages, _, _ = paged.arguments()
    whole = cpu.paged_attention(*paged.arguments(), *features)
    for first, last in ((LENGTH - 1, LENGTH), (SPLIT + 3, SPLIT + 40), (100, 400)):
        starts = torch.tensor([0, last - first])
        got = cpu.paged_attention(q[first:last], *pages, starts, torch.tensor([last]), *features)
        assert torch.equal(got, whole[first:last]), (first, last)


def test_a_sink_far_below_every_score_changes_nothing_and_one_far_above_takes_all() -> None:
    paged = Paged.make(lengths=[LENGTH, 9], new=[1, 9], num_heads=2, num_kv_heads=1, head_dim=32)
    plain = cpu.paged_attention(*paged.arguments(), 0.2)
    for low in (-math.inf, -1e4):
        assert torch.equal(cpu.paged_attention(*paged.arguments(), 0.2, sinks=torch.full((2,), low)), plain)
    taken = cpu.paged_attention(*paged.arguments(), 0.2, sinks=torch.tensor([1e4, -1e4])).unflatten(1, (2, 32))
    assert torch.equal(taken[:, 0], torch.zeros(10, 32))
    assert torch.equal(taken[:, 1], plain.unflatten(1, (2, 32))[:, 1])


@pytest.mark.parametrize("tokens", [1, 3, 90])
def test_a_recorded_step_computes_sinks_and_alibi_as_the_op_does(tokens: int) -> None:
    """As it would a model's: embedding, q k v, attention, projection and head of one layer."""
    torch.manual_seed(tokens)
    norm = Norm("rms", torch.ones(48), None, 1e-5)
    table, qkv, out = draw(50, 48), cpu.hold(0.2 * draw(64 + 2 * 32, 48)), cpu.hold(0.2 * draw(48, 64))
    head, sinks, slopes = cpu.hold(table), draw(4), 2.0 ** -torch.arange(1.0, 5.0)
    length = SPLIT + 100
    old = [draw(30, 16, 2, 16) for _ in "kv"]
    positions, pages = list(range(length - tokens, length)), torch.randperm(30).tolist()
    host = HostBatch(
        input_ids=[at % 50 for at in range(tokens)], positions=positions, cu_seqlens=[0, tokens], context_lens=[length],
        page_tables=[pages], logits_rows=list(range(tokens)), query_lens=[tokens],
        slot_mapping=[pages[at // 16] * 16 + at % 16 for at in positions],
    )  # fmt: skip
    batch = host.on(torch.device("cpu"))

    def compute(ops: Any, _: Any, kv: Any) -> Tensor:
        (pages,) = kv
        hidden = ops.embed(batch.input_ids, head, 1.0, batch.positions, None)
        q = ops.norm_qkv(hidden, norm, qkv, None, None, None, None, *pages, batch.slot_mapping)
        rest = batch.page_table, batch.cu_seqlens, batch.context_lens
        attended = ops.paged_attention(q, *pages, *rest, 0.25, None, None, sinks, slopes, query_lens=[tokens])
        result: Tensor = ops.lm_head(ops.linear_residual(attended, out, None, None, hidden), norm, head, None)
        return result

    one_by_one = compute(cpu, None, [tuple(x.clone() for x in old)])
    together = cpu.Program().run(compute, host, lambda _: [], [tuple(x.clone() for x in old)])
    assert torch.equal(together, one_by_one)
