"""handloom.ops.cpu means what the reference says, as exactly as it, and a row's bits depend on that row alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom.errors import UnsupportedOption
from handloom.ops import Ops, Panels, choose_backend, cpu
from handloom.ops.cpu import matrix_units
from handloom_kernels import reference
from handloom_kernels.reference import Norm, Rotary
from kernel_testing import assert_as_exact_as, assert_rows_do_not_depend_on_company
from paged import Paged, draw

SEEDS = range(30)
ROWS = (1, 2, 3, 5, 8, 13, 31, 33)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def some_norm(rng: random.Random, width: int) -> Norm:
    kind = rng.choice(("rms", "rms_unit_offset", "layer"))
    bias = draw(width) if kind == "layer" and rng.random() < 0.5 else None
    return Norm(kind, draw(width), bias, 1e-5)


def maybe(rng: random.Random, make: Callable[[], Any]) -> Any:
    return make() if rng.random() < 0.5 else None


def angles(rng: random.Random, num_tokens: int, head_dim: int) -> Rotary:
    table = torch.rand(num_tokens, rng.randint(1, head_dim // 2)) * 10
    return Rotary(table.cos(), table.sin(), rng.random() < 0.3)


def embed(rng: random.Random) -> tuple[Any, ...]:
    width, num_tokens = rng.choice((1, 16, 33, 100)), rng.choice(ROWS)
    ids, positions = torch.randint(70, (num_tokens,)), torch.randint(50, (num_tokens,))
    return ids, draw(70, width), rng.choice((1.0, 6.3)), positions, maybe(rng, lambda: draw(50, width))


def norm_qkv(rng: random.Random) -> tuple[Any, ...]:
    num_tokens, hidden_size, head_dim = rng.choice(ROWS), rng.choice((7, 64, 100, 300)), 2 * rng.randint(1, 40)
    num_kv_heads = rng.choice((1, 2, 3))
    num_rows = (num_kv_heads * rng.choice((1, 2, 4)) + 2 * num_kv_heads) * head_dim
    qk_norms = maybe(rng, lambda: [some_norm(rng, head_dim)] * 2) or [None, None]
    slots = torch.randperm(8 * 16)[:num_tokens]
    slots[0] = rng.choice((-1, int(slots[0])))
    return (
        draw(num_tokens, hidden_size),
        some_norm(rng, hidden_size),
        draw(num_rows, hidden_size),
        maybe(rng, lambda: draw(num_rows)),
        *qk_norms,
        maybe(rng, lambda: angles(rng, num_tokens, head_dim)),
        *(torch.full((8, 16, num_kv_heads, head_dim), 7.0) for _ in "kv"),
        slots,
    )


def paged_attention(rng: random.Random) -> tuple[Any, ...]:
    num_kv_heads, group, head_dim = rng.choice((1, 2, 3)), rng.choice((1, 2, 4, 8)), rng.choice((8, 11, 33, 64, 100))
    lengths = [rng.choice((1, 2, 16, 63, 64, 65, 129, 200)) for _ in range(rng.randint(1, 4))]
    new = [rng.choice((1, length, rng.randint(1, length))) for length in lengths]
    queries = [draw(n, num_kv_heads * group, head_dim) for n in new]
    keys, values = ([draw(n, num_kv_heads, head_dim) for n in lengths] for _ in "kv")
    paged = Paged.lay_out(queries, keys, values, rng.choice((1, 7, 16)))
    window, softcap = rng.choice((None, None, 1, 16, 50, 1000)), rng.choice((None, None, 3.0))
    return (*paged.arguments(), head_dim**-0.5, window, softcap)


def linear_residual(rng: random.Random) -> tuple[Any, ...]:
    num_tokens, inner, width = rng.choice(ROWS), rng.choice((1, 63, 64, 65, 200, 700)), rng.choice((1, 31, 32, 33, 300))
    bias, post_norm = maybe(rng, lambda: draw(width)), maybe(rng, lambda: some_norm(rng, width))
    return draw(num_tokens, inner), draw(width, inner), bias, post_norm, draw(num_tokens, width)


def norm_mlp(rng: random.Random) -> tuple[Any, ...]:
    num_tokens, hidden_size, gated = rng.choice(ROWS), rng.choice((7, 64, 300)), rng.random() < 0.5
    rows = rng.choice((33, 40, 520)) * (2 if gated else 1)
    norm, bias = some_norm(rng, hidden_size), maybe(rng, lambda: draw(rows))
    return draw(num_tokens, hidden_size), norm, draw(rows, hidden_size), bias, rng.choice(ACTIVATIONS), gated


def lm_head(rng: random.Random) -> tuple[Any, ...]:
    width = rng.choice((7, 64, 300))
    return draw(rng.choice((1, 5, 40)), width), some_norm(rng, width), draw(331, width), rng.choice((None, 30.0))


CASES = {case.__name__: case for case in (embed, norm_qkv, paged_attention, linear_residual, norm_mlp, lm_head)}


def with_pages(op: Callable[..., Tensor], name: str) -> Callable[..., Any]:
    """The op; norm_qkv gives the pages it wrote too, which are its own copies."""
    if name != "norm_qkv":
        return op

    def run(*args: Any) -> tuple[Tensor, ...]:
        pages = [pages.clone() for pages in args[7:9]]
        return (op(*args[:7], *pages, args[9]), *pages)

    return run


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_op_is_as_exact_as_the_reference(name: str) -> None:
    for seed in SEEDS:
        torch.manual_seed(seed)
        args = CASES[name](random.Random(seed))
        op, oracle = (with_pages(getattr(ops, name), name) for ops in (cpu, reference))
        try:
            # twice the plain formula's error, and 4 units of the largest value, which is what assert_as_exact_as allows
            assert_as_exact_as(oracle, *args, ours=op(*args))
        except AssertionError as failure:
            raise AssertionError(f"seed {seed}") from failure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_half_weights_and_pages_are_computed_on_as_they_are(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float32 states the result is float32's, of weights that are what they are; without matrix units."""
    monkeypatch.setattr(matrix_units, "usable", lambda: False)

    def narrow(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Norm):
            return Norm(*(x.to(dtype) if isinstance(x, Tensor) else x for x in value))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    for seed in SEEDS:
        torch.manual_seed(seed)
        args = list(CASES[name](random.Random(seed)))
        held = {"embed": (1, 4), "norm_qkv": (1, 2, 3, 4, 5, 7, 8), "paged_attention": (1, 2), "linear_residual": (1,)}
        halves = [narrow(x, dtype) if i in held.get(name, (1, 2)) else x for i, x in enumerate(args)]
        if name == "embed":
            halves[2] = args[2] = float(torch.tensor(args[2], dtype=dtype))
        wide = [narrow(x, torch.float32) for x in halves]
        op = with_pages(getattr(cpu, name), name)
        ours, exact = op(*halves), op(*wide)
        if name == "norm_qkv":  # the pages are rounded to their dtype, q is not
            assert torch.equal(ours[0], exact[0])
            assert all(torch.equal(a, b.to(dtype)) for a, b in zip(ours[1:], exact[1:], strict=True))
        else:
            assert ours.dtype == torch.float32
            assert torch.equal(ours, exact)


def test_states_come_back_in_the_dtype_they_had() -> None:
    weight, norm = draw(40, 24, dtype=torch.bfloat16), Norm("rms", draw(24, dtype=torch.bfloat16), None, 1e-5)
    states = draw(3, 24, dtype=torch.bfloat16)
    assert cpu.norm_mlp(states, norm, weight, None, "silu", True).dtype == torch.bfloat16
    assert cpu.linear_residual(draw(3, 24), weight, None, None, draw(3, 40)).dtype == torch.float32
    assert cpu.lm_head(states, norm, weight, None).dtype == torch.float32


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_linear_gives_a_row_the_same_bits_in_any_company(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: threads)
    for depth, width, dtype in ((700, 333, torch.float32), (96, 64, torch.bfloat16), (1, 5, torch.float32)):
        x, weight, residual = draw(70, depth), Panels.pack(draw(width, depth, dtype=dtype)), draw(70, width)

        def run(rows: slice, x: Tensor = x, weight: Panels = weight, residual: Tensor = residual) -> Tensor:
            return cpu.linear_residual(x[rows], weight, None, None, residual[rows])

        assert_rows_do_not_depend_on_company(run, 70)


def test_more_rows_than_a_chunk_holds() -> None:
    x, weight = draw(1100, 40), draw(50, 40)
    out = cpu.linear_residual(x, weight, None, None, torch.zeros(1100, 50))
    assert torch.equal(out[:3], cpu.linear_residual(x[:3], weight, None, None, torch.zeros(3, 50)))
    assert torch.equal(out[-3:], cpu.linear_residual(x[-3:], weight, None, None, torch.zeros(3, 50)))
    assert_as_exact_as(reference.linear_residual, x, weight, None, None, torch.zeros(1100, 50), ours=out)


@pytest.mark.parametrize("window", [None, 5, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_query_gets_the_same_bits_alone_in_a_chunk_and_in_a_whole_prompt(
    dtype: torch.dtype, window: int | None
) -> None:
    length, num_heads, num_kv_heads, head_dim = 210, 6, 2, 20
    q = draw(length, num_heads, head_dim)
    k, v = (draw(length, num_kv_heads, head_dim, dtype=dtype) for _ in "kv")

    def chunk(first: int, last: int) -> Tensor:
        page_size = random.Random(first).choice((3, 16))
        paged = Paged.lay_out([q[first:last].to(dtype)], [k[:last]], [v[:last]], page_size)
        rest = paged.arguments()[1:]
        return cpu.paged_attention(q[first:last], *rest, head_dim**-0.5, window, None)

    whole = chunk(0, length)
    for first, last in [(0, 1), (0, 100), (100, 101), (63, 65), (64, 210), (150, 210), (209, 210)]:
        assert torch.equal(chunk(first, last), whole[first:last]), (first, last)


def test_exponentials_of_masked_and_of_equal_scores_are_exact() -> None:
    """One visible key: its value, unchanged; many equal ones: their mean."""
    k, v = torch.zeros(130, 1, 16), draw(130, 1, 16)
    paged = Paged.lay_out([torch.zeros(130, 1, 16)], [k], [v])
    alone = cpu.paged_attention(*paged.arguments(), 1.0, 1, None)
    assert torch.equal(alone, v.flatten(1))
    mean = cpu.paged_attention(*paged.arguments(), 1.0, None, None)[-1]
    assert (mean - v.mean((0, 1))).abs().max() < 1e-6


def test_not_a_number_and_infinity_stay_in_their_row() -> None:
    hidden, norm = draw(6, 32), Norm("rms", torch.ones(32), None, 1e-5)
    hidden[1, 3], hidden[4, 0] = math.nan, math.inf
    out = cpu.norm_mlp(hidden, norm, draw(40, 32), None, "silu", False)
    assert [bool(row.isfinite().all()) for row in out] == [True, False, True, True, False, True]


def test_panels_are_the_matrix() -> None:
    for rows, columns in ((1, 1), (32, 5), (70, 33)):
        weight = draw(rows, columns, dtype=torch.bfloat16)
        panels = Panels.pack(weight)
        room = torch.full((-(-rows // 32) * 32 + 3, columns), 7.0, dtype=weight.dtype)
        room[:rows] = weight
        taken = Panels.take(room[:rows])
        assert taken.data.data_ptr() == room.data_ptr()
        assert torch.equal(taken.data, panels.data)
        assert torch.equal(Panels.take(weight.clone()).data, panels.data)
        assert torch.equal(panels.matrix(), weight)
        assert torch.equal(panels[[0, rows - 1]], weight[[0, rows - 1]])
        assert panels[0].shape == weight[0].shape
        assert (panels.shape, panels.numel(), len(panels)) == (weight.shape, weight.numel(), rows)


def test_what_the_kernels_do_not_read_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedOption, match=r"float32, bfloat16 or float16, not torch.float64; choose 'torch'"):
        Panels.pack(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(UnsupportedOption, match="runs on a CPU and the model is on meta"):
        choose_backend(torch.device("meta"), "cpu")


def test_without_numba_it_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    import handloom.ops

    for name in [name for name in sys.modules if name.startswith(("handloom.ops.cpu", "numba."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(handloom.ops, "cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setenv("HANDLOOM_CACHE", str(tmp_path))
    with pytest.raises(UnsupportedOption, match=r"needs the package numba.*install it, or choose 'torch'"):
        choose_backend(torch.device("cpu"))


def test_every_op_of_the_seam_is_tested_here() -> None:
    assert set(CASES) == {name for name in vars(Ops) if not name.startswith("_")}
    assert set(CASES) <= set(cpu.__all__)
