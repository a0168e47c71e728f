"""handloom.ops.torch_ops means what the reference says: every op, random shapes and options, float32 and bfloat16."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom.ops import Ops, torch_ops
from handloom_kernels import reference
from handloom_kernels.reference import ACTIVATIONS, Norm, Rotary
from paged import Paged, draw

SEEDS = range(40)
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Of the largest value. Both round: float32 to 2^-24, bfloat16 to 2^-9, a few times over."""

Case = Callable[[Ops, random.Random, torch.dtype], Any]


def close(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    assert torch.isfinite(ours).all()
    if ours.numel():
        scale = reference.abs().max().clamp(min=1e-3).float()
        assert (ours.float() - reference.float()).abs().max() <= TOLERANCE[reference.dtype] * scale


def odd(rng: random.Random) -> int:
    """A size: small, odd, or a little large."""
    return rng.choice((1, 2, 3, 7, 16, 33, 63, 64, 100))


def some_norm(rng: random.Random, width: int, dtype: torch.dtype) -> Norm:
    kind = rng.choice(("rms", "rms_unit_offset", "layer"))
    bias = draw(width, dtype=dtype) if kind == "layer" and rng.random() < 0.5 else None
    return Norm(kind, draw(width, dtype=dtype), bias, 1e-5)


def maybe(rng: random.Random, make: Callable[[], Any]) -> Any:
    return make() if rng.random() < 0.5 else None


def embed(ops: Ops, rng: random.Random, dtype: torch.dtype) -> Tensor:
    width, num_tokens = odd(rng), odd(rng)
    places = maybe(rng, lambda: draw(50, width, dtype=dtype))
    ids, positions = torch.randint(20, (num_tokens,)), torch.randint(50, (num_tokens,))
    return ops.embed(ids, draw(20, width, dtype=dtype), rng.choice((1.0, 6.3)), positions, places)


def norm_qkv(ops: Ops, rng: random.Random, dtype: torch.dtype) -> Tensor:
    num_tokens, hidden_size, head_dim = odd(rng), odd(rng), 2 * rng.randint(1, 20)
    num_kv_heads = rng.choice((1, 2, 3))
    num_rows = (num_kv_heads * rng.choice((1, 2, 4)) + 2 * num_kv_heads) * head_dim
    rotary = None
    if rng.random() < 0.7:
        angles = torch.rand(num_tokens, rng.randint(1, head_dim // 2)) * 10
        rotary = Rotary(angles.cos(), angles.sin(), interleaved=rng.random() < 0.5)
    qk_norms = [maybe(rng, lambda: some_norm(rng, head_dim, dtype)) for _ in "qk"]
    pages = [torch.full((8, 16, num_kv_heads, head_dim), 7.0, dtype=dtype) for _ in "kv"]
    q = ops.norm_qkv(
        draw(num_tokens, hidden_size, dtype=dtype),
        some_norm(rng, hidden_size, dtype),
        draw(num_rows, hidden_size, dtype=dtype),
        maybe(rng, lambda: draw(num_rows, dtype=dtype)),
        *qk_norms,
        rotary,
        *pages,
        torch.randperm(8 * 16)[:num_tokens],
    )
    return torch.cat([x.reshape(-1, head_dim) for x in (q, *pages)])


def paged_attention(ops: Ops, rng: random.Random, dtype: torch.dtype) -> Tensor:
    num_kv_heads, group, head_dim = rng.choice((1, 2, 3)), rng.choice((1, 2, 4, 8)), rng.choice((8, 12, 33, 64))
    lengths = [rng.choice((1, 2, 15, 16, 17, 63, 100, 129)) for _ in range(rng.randint(1, 5))]
    new = [rng.choice((1, length, rng.randint(1, length))) for length in lengths]
    queries = [draw(n, num_kv_heads * group, head_dim, dtype=dtype) for n in new]
    keys, values = ([draw(n, num_kv_heads, head_dim, dtype=dtype) for n in lengths] for _ in "kv")
    paged = Paged.lay_out(queries, keys, values, rng.choice((1, 7, 16)), shuffle=rng.random() < 0.5)
    window, softcap = rng.choice((None, None, 1, 2, 16, 50, 1000)), rng.choice((None, None, 3.0))
    return ops.paged_attention(*paged.arguments(), head_dim**-0.5, window, softcap)


def linear_residual(ops: Ops, rng: random.Random, dtype: torch.dtype) -> Tensor:
    num_tokens, inner, hidden_size = odd(rng), odd(rng), odd(rng)
    return ops.linear_residual(
        draw(num_tokens, inner, dtype=dtype),
        draw(hidden_size, inner, dtype=dtype),
        maybe(rng, lambda: draw(hidden_size, dtype=dtype)),
        maybe(rng, lambda: some_norm(rng, hidden_size, dtype)),
        draw(num_tokens, hidden_size, dtype=dtype),
    )


def norm_mlp(ops: Ops, rng: random.Random, dtype: torch.dtype) -> Tensor:
    num_tokens, hidden_size, gated = odd(rng), odd(rng), rng.random() < 0.5
    rows = odd(rng) * (2 if gated else 1)
    return ops.norm_mlp(
        draw(num_tokens, hidden_size, dtype=dtype),
        some_norm(rng, hidden_size, dtype),
        draw(rows, hidden_size, dtype=dtype),
        maybe(rng, lambda: draw(rows, dtype=dtype)),
        rng.choice(ACTIVATIONS),
        gated,
    )


def lm_head(ops: Ops, rng: random.Random, dtype: torch.dtype) -> Tensor:
    hidden_size = odd(rng)
    return ops.lm_head(
        draw(rng.choice((0, 1, 5)), hidden_size, dtype=dtype),
        some_norm(rng, hidden_size, dtype),
        draw(331, hidden_size, dtype=dtype),
        rng.choice((None, 30.0)),
    )


CASES = {case.__name__: case for case in (embed, norm_qkv, paged_attention, linear_residual, norm_mlp, lm_head)}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", sorted(CASES))
def test_op_equals_the_reference(op: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        results = []
        for ops in (torch_ops, reference):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                results.append(CASES[op](ops, random.Random(seed), dtype))  # type: ignore[arg-type]
        try:
            close(*results)
        except AssertionError as failure:
            raise AssertionError(f"seed {seed}") from failure


def test_the_inputs_of_an_op_are_left_as_they_were() -> None:
    hidden, norm = draw(5, 8), Norm("rms", draw(8), None, 1e-5)
    weight, residual = draw(6, 8), draw(5, 6)
    before = [t.clone() for t in (hidden, norm.weight, weight, residual)]
    torch_ops.norm_mlp(hidden, norm, weight, None, "silu", True)
    torch_ops.linear_residual(hidden, weight, None, None, residual)
    torch_ops.lm_head(hidden, norm, weight, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, norm.weight, weight, residual), strict=True))


def test_every_op_of_the_seam_is_compared_here() -> None:
    assert set(CASES) == {name for name in vars(Ops) if not name.startswith("_")} == set(torch_ops.__all__)
