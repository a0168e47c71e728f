"""Mixture of experts: every token through the MLPs of its k experts, and their weighted sum (Shazeer et al. 2017).

    h[p] = act(w_up[e_p] @ x[p // k] + b_up[e_p])              p: a pair of a token and one of its k choices
    y[n] = sum over k of weight[n, k] * (w_down[e] @ h[n * k + choice] + b_down[e])

Two grouped matrix products and a sum. In a product, one program owns BLOCK_N rows of one expert's weight and one tile
of up to BLOCK_M pairs that chose this expert, and walks the whole of K in one order:

                           x or h of the pairs          out, by pair
                            p7  p9  p30  ##             p7  p9  p30  ##
    w_up[e]               [ |   |   |   0  ]
    [ gate 0 -- K --> ]   [ |   |   |   0  ]          [                 ]
    [ up 0   -------> ] x [ K   K   K   0  ]  = acc   [  act, scattered ]  BLOCK_N rows of the weight,
    [ gate 1 -------> ]   [ v   v   v   0  ]          [                 ]  half as many columns of out
    [ up 1   -------> ]        BLOCK_M                                     where gate and up rows come in pairs

The weight is the left operand, so that its BLOCK_N rows fill the tensor core's 64 whatever the number of pairs: a tile
of 16 pairs wastes little, and all sizes of tile use the same instruction.

Few pairs (decode): the tiles, of 16 pairs, are found inside the product itself. Its grid has one program per pair; the
first pair of each expert (and every 16th) leads a tile and looks up who else is in it, the others leave. That saves the
launches of a sort, and each chosen expert's weight is read once. Many pairs (prefill): `moe_routing.sort_pairs` sorts
them first, and tiles hold 16, 64 or 128; programs that run together share weights and tokens in the second-level cache.

To move: the weights of the experts that are hit, once; 2 FLOPs a pair for every weight of an expert. Bound by memory
until an expert sees some 270 pairs. The k parts of a token are written in float32, and summed in the order of its
choices.

A token's result does not depend on its company: the steps of BLOCK_K are the same for few and for many, and no sum is
split. Assumed of the hardware: the order in which a matrix instruction adds up one element does not depend on the rest
of the instruction's shape. Only wgmma and tcgen05 need that, whose shape follows the tile (m64n16k16, m64n128k16);
mma.sync and, as it is set here, AMD's mfma have one shape for all tiles, and float32 is added one by one. The compile
tests hold the launcher to it.

Sources: the table of tiles for the worst case is vLLM's idea (Kwon et al. 2023), the grouped product MegaBlocks' (Gale
et al. 2023).

This module does not know how experts are chosen. Meaning and rounding: `reference.moe_mlp`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activation import activate_tile, gate_tile
from .checks import FLOATS, INTS, check, check_device, require
from .moe_routing import MAX_EXPERTS, MAX_PAIRS, sort_pairs
from .reference.activation import ACTIVATIONS, GATED_ACTIVATIONS
from .tuning import Problem, config

FEW_PAIRS = 256


@triton.jit
def _led_tile(expert_ids, lead, pairs, experts, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, its pairs [BLOCK_M], how many) of the tile that pair `lead` leads; 0 pairs if it leads none."""
    pair = tl.arange(0, PAIRS)
    expert = tl.load(expert_ids + lead)
    same = tl.load(expert_ids + pair, mask=pair < pairs, other=-1) == expert
    before = tl.sum((same & (pair < lead)).to(tl.int32))
    place = tl.where(same, tl.cumsum(same.to(tl.int32), 0) - 1 - before, -1)
    here = place[:, None] == tl.arange(0, BLOCK_M)[None, :]
    count = tl.sum(((place >= 0) & (place < BLOCK_M)).to(tl.int32))
    leads = (expert >= 0) & (expert < experts) & (before % BLOCK_M == 0)
    return expert, tl.sum(tl.where(here, pair[:, None], 0), axis=0), tl.where(leads, count, 0)


@triton.jit
def _product(w, x, depth, w_inside, x_inside, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_M] float32: weight rows from w [BLOCK_N, 1] times activations from x [1, BLOCK_M]."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(w + k[None, :], mask=w_inside & (k[None, :] < depth), other=0.0)
        right = tl.load(x + k[:, None], mask=x_inside & (k[:, None] < depth), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _expert_kernel(
    x,
    weight,
    bias,
    out,
    expert_ids,
    order,
    tiles,
    pairs,
    experts,
    num_tiles,
    width,
    depth,
    x_stride,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SORTED: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # of a gated MLP, gate row i and up row i are neighbours in the tile: HALVES x WIDTH = BLOCK_N rows
    HALVES: tl.constexpr = 2 if GATED else 1
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    # GROUP tiles go through all columns before the next GROUP tiles begin
    program = tl.program_id(0)
    per_group = GROUP * tl.cdiv(width, WIDTH)
    first_tile = program // per_group * GROUP
    size = tl.minimum(num_tiles - first_tile, GROUP)
    tile = first_tile + program % per_group % size
    first_column = program % per_group // size * WIDTH

    if SORTED:
        expert, begin, count = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
        slot = tl.arange(0, BLOCK_M)
        pair = tl.load(order + begin + slot, mask=slot < count, other=0)
    else:
        expert, pair, count = _led_tile(expert_ids, tile, pairs, experts, PAIRS, BLOCK_M)
    if count == 0:
        return

    row = tl.arange(0, BLOCK_N)
    column = first_column + row // HALVES
    weight_row = expert.to(tl.int64) * (HALVES * width) + row % HALVES * width + column
    token = (pair // PAIRS_PER_ROW).to(tl.int64)
    taken = tl.arange(0, BLOCK_M)[None, :] < count
    w, inside = weight + weight_row[:, None] * depth, (column < width)[:, None]
    total = _product(w, x + token[None, :] * x_stride, depth, inside, taken, BLOCK_N, BLOCK_M, BLOCK_K)
    if HAS_BIAS:
        total += tl.load(bias + weight_row, mask=column < width, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (WIDTH, 2, BLOCK_M)), (0, 2, 1)))
        total = gate_tile(gate, up, ACTIVATION)
    elif ACTIVATION is not None:
        total = activate_tile(total, ACTIVATION)
    column = (first_column + tl.arange(0, WIDTH))[:, None]
    to = out + pair.to(tl.int64)[None, :] * width + column
    tl.store(to, total.to(out.dtype.element_ty), mask=(column < width) & taken)


@triton.jit
def _sum_kernel(parts, weights, expert_ids, out, experts, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(expert_ids + pair)
        kept = (expert >= 0) & (expert < experts)
        part = tl.load(parts + pair * width + n, mask=n < tl.where(kept, width, 0), other=0.0)
        total += tl.where(kept, tl.load(weights + pair), 0.0) * part
    tl.store(out + token * width + n, total.to(out.dtype.element_ty), mask=n < width)


def moe_mlp(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    gated: bool,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.moe_mlp`: x [N, H] float32, float16 or bfloat16, rows of any stride, to a new [N, H] like it.

    weights [N, k] float32 and expert_ids [N, k] int64 or int32, contiguous; w_up [E, 2 * I or I, H] and w_down
    [E, H, I] contiguous, of x's dtype, E up to 512; b_up [E, 2 * I or I], b_down [E, H] float32, float16 or bfloat16.
    A choice whose id is not among 0 .. E - 1 is dropped. blocks: overrides the block sizes, for both products.
    Takes N * k * (4 * H + itemsize * I) bytes between its launches. Raises KernelError.
    """
    device = check_device("x", x)
    check("x", x, (None, None), FLOATS, device, strided=True)
    check("expert_ids", expert_ids, (len(x), None), INTS, device)
    check("weights", weights, expert_ids.shape, torch.float32, device)
    names = GATED_ACTIVATIONS if gated else ACTIVATIONS
    require(activation in names, f"activation is {activation!r}; there are {', '.join(names)}")
    check("w_down", w_down, (None, x.shape[1], None), x.dtype, device)
    experts, hidden_size, intermediate_size = w_down.shape
    require(0 < experts <= MAX_EXPERTS, f"there are {experts} experts; this kernel takes 1 to {MAX_EXPERTS}")
    up_rows = 2 * intermediate_size if gated else intermediate_size
    check("w_up", w_up, (experts, up_rows, hidden_size), x.dtype, device)
    for name, bias, size in (("b_up", b_up, up_rows), ("b_down", b_down, hidden_size)):
        if bias is not None:
            check(name, bias, (experts, size), FLOATS, device)
    pairs, top_k = expert_ids.numel(), expert_ids.shape[1]
    require(top_k > 0, "expert_ids has no choices")
    require(pairs <= MAX_PAIRS, f"there are {pairs} pairs of a token and a choice; this kernel takes up to 2^30")
    out = torch.empty((len(x), hidden_size), dtype=x.dtype, device=device)
    if out.numel() == 0:
        return out
    between = torch.empty((pairs, intermediate_size), dtype=x.dtype, device=device)
    parts = torch.empty((pairs, hidden_size), dtype=torch.float32, device=device)
    chosen = blocks_for(x, w_up, pairs, blocks)
    few = pairs <= min(FEW_PAIRS, 8 * experts)
    tiles = None if few else sort_pairs(expert_ids, experts, chosen["BLOCK_M"])
    _launch_product(x, top_k, w_up, b_up, between, activation, gated, expert_ids, tiles, chosen)
    _launch_product(between, 1, w_down, b_down, parts, None, False, expert_ids, tiles, chosen)
    launch = config("moe_sum", device, {"BLOCK": 512, "num_warps": 4})
    grid = (len(x), triton.cdiv(hidden_size, launch["BLOCK"]))
    _sum_kernel[grid](parts, weights, expert_ids, out, experts, hidden_size, TOP_K=top_k, **launch)
    return out


def _launch_product(
    x: Tensor,
    pairs_per_row: int,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    activation: str | None,
    gated: bool,
    expert_ids: Tensor,
    tiles: tuple[Tensor, Tensor] | None,
    chosen: Mapping[str, int],
) -> None:
    """One grouped product. x: row p // pairs_per_row belongs to pair p; out [pairs, rows of a weight]."""
    pairs, width = out.shape
    if width == 0:
        return
    order, table = (expert_ids, expert_ids) if tiles is None else tiles
    num_tiles = pairs if tiles is None else len(table)
    columns = chosen["BLOCK_N"] // (2 if gated else 1)
    _expert_kernel[(num_tiles * triton.cdiv(width, columns),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        expert_ids,
        order,
        table,
        pairs,
        len(weight),
        num_tiles,
        width,
        x.shape[1],
        x.stride(0),
        PAIRS_PER_ROW=pairs_per_row,
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        SORTED=tiles is not None,
        PAIRS=32 if pairs <= 32 else FEW_PAIRS,
        **chosen,
    )


def rows_per_tile(pairs: int, experts: int) -> int:
    """BLOCK_M: 16 while an expert rarely sees more than that, 128 where it sees as many on average, between them 64."""
    if pairs <= 8 * experts:
        return 16
    return 128 if pairs >= 128 * experts else 64


def blocks_for(x: Tensor, w_up: Tensor, pairs: int, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """Block sizes and launch options. Only those that a row's sums do not depend on may change with BLOCK_M."""
    experts, up_rows, hidden_size = w_up.shape
    wide = x.dtype == torch.float32
    block_m = rows_per_tile(pairs, experts)
    default = {"BLOCK_M": block_m, "BLOCK_N": 128 if block_m == 128 else 64, "BLOCK_K": 16 if wide else 64, "GROUP": 8}
    default["num_warps"] = 8 if wide or block_m == 128 else 4
    default["num_stages"] = 2 if tuning.is_hip() else 4 if block_m == 16 else 3
    if tuning.is_hip():
        default["matrix_instr_nonkdim"] = 16
    dtype = str(x.dtype).removeprefix("torch.")
    shape: dict[str, int | str] = {"width": hidden_size, "rows": up_rows, "block_m": block_m, "dtype": dtype}
    return config("moe", x.device, default, override, **shape)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune moe` tries; at least 64 rows of weight and 4 warps, for one instruction."""
    for experts, top_k, hidden_size, inner in ((128, 8, 2048, 768), (32, 4, 2880, 2880), (8, 2, 4096, 14336)):
        w_up = torch.randn(experts, 2 * inner, hidden_size, dtype=torch.bfloat16, device=device)
        w_down = torch.randn(experts, hidden_size, inner, dtype=torch.bfloat16, device=device)
        for tokens in (4, 32 * experts // top_k, 256 * experts // top_k):
            x = torch.randn(tokens, hidden_size, dtype=torch.bfloat16, device=device)
            expert_ids = torch.randn(tokens, experts, device=device).topk(top_k).indices
            weights = torch.rand(tokens, top_k, device=device)
            block_m = rows_per_tile(tokens * top_k, experts)
            yield Problem(
                when={"width": hidden_size, "rows": 2 * inner, "block_m": block_m, "dtype": "bfloat16"},
                candidates=[
                    {"BLOCK_N": n, "num_warps": w, "num_stages": s}
                    for n in (64, 128)
                    for w in (4, 8)
                    for s in (3, 4, 5)
                ],
                run=partial(moe_mlp, x, weights, expert_ids, w_up, w_down, "silu", True),
            )
