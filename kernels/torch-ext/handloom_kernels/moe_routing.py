"""Which experts see which tokens: the choice (`route`), and the pairs (token, choice) sorted by expert (`sort_pairs`).

Choice: one program owns one token, all of whose E logits fit in registers, as a matrix of groups x members:

    logits [ e0 e1 e2 e3 | e4 e5 e6 e7 | ... ]  -> score -> + bias -> the groups whose two best sum highest
                                                -> top_k times: take the highest -> weights, expert ids

A score and its expert are one 64-bit integer, the score's bits above, the expert's complement below, so that one
maximum finds the highest score and, of equals, the lowest expert. To move: E logits in, 12 bytes a choice out.

Sorting: a grouped matrix product wants the tokens of an expert next to each other, in tiles of BLOCK_M. This is a
counting sort without atomics, so that its order is fixed: program e owns expert e and reads all P = N * k pairs, twice.

    expert ids  2 0 2 1 | 0 2 2 .      count:  expert 0: 2   1: 1   2: 4
    order       1 4 | 3 | 0 2 5 6      place:  pairs of expert e from the sum of the counts before it, in rising order
    tiles of 2  ( 0   )(1)( 2 )( 2 )           and its tiles: (expert, first place in `order`, pairs)

Nobody on the host knows how many tiles there are; the table has room for the worst case, and the rest are empty.
To move: 2 * E * P ids, from the second-level cache. Bound by latency.

This module does not know what an expert does. Meaning: `reference.route`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, INTS, check, check_device, require
from .reference.moe import SCORING_FUNCS, Routing
from .tuning import Problem, config

MAX_EXPERTS = 512
MAX_TOP_K = 16
MAX_PAIRS = 2**30  # so that the ends of loops and tiles, past the last pair, fit in 32 bits
MIN_TILE = 16
SORT_BLOCK = 4096

LOWEST = tl.constexpr(-(2**63))
HIGH_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _pack(x, index):
    """An int64 that is higher where x is, and of equal x where the index is lower; NaN counts as -infinity."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & HIGH_INDEX
    return (bits.to(tl.int64) << 32) | (index ^ HIGH_INDEX).to(tl.int64)


@triton.jit
def _unpack_value(packed):
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & HIGH_INDEX)).to(tl.float32, bitcast=True)


@triton.jit
def _unpack_index(packed):
    return (packed & HIGH_INDEX) ^ HIGH_INDEX


@triton.jit
def _best_groups(packed, group, n_group, TOPK_GROUP: tl.constexpr):
    """Is a row of `packed` [groups, members] one of the TOPK_GROUP whose two highest sum highest?"""
    first = tl.max(packed, axis=1)
    second = tl.max(tl.where(packed == first[:, None], LOWEST, packed), axis=1)
    left = tl.where(group < n_group, _pack(_unpack_value(first) + _unpack_value(second), group), LOWEST)
    kept = group < 0
    for _ in range(TOPK_GROUP):
        here = left == tl.max(left, axis=0)
        kept = kept | here
        left = tl.where(here, LOWEST, left)
    return kept


@triton.jit
def _route_kernel(
    logits,
    bias,
    weights,
    expert_ids,
    logits_stride,
    n_group,
    group_size,
    scale,
    SCORING: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS), tl.arange(0, MEMBERS)
    expert = group[:, None] * group_size + member[None, :]
    inside = (group[:, None] < n_group) & (member[None, :] < group_size)
    logit = tl.load(logits + row * logits_stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        score = tl.exp(logit - tl.max(logit))
        score = score / tl.sum(score)
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32)
    elif not GROUPED:
        choice = logit
    left = tl.where(inside, _pack(choice, expert), LOWEST)
    if GROUPED:
        left = tl.where(_best_groups(left, group, n_group, TOPK_GROUP)[:, None], left, LOWEST)

    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.float32)
    ids = tl.zeros((SLOTS,), tl.int64)
    for k in range(TOP_K):
        highest = tl.max(left)
        here = left == highest
        chosen = tl.where(slot == k, tl.sum(tl.where(here, score, 0.0)), chosen)
        ids = tl.where(slot == k, _unpack_index(highest), ids)
        left = tl.where(here, LOWEST, left)
    if NORM:
        chosen = chosen / (tl.sum(chosen) + 1e-20)
    tl.store(weights + row * TOP_K + slot, chosen * scale, mask=slot < TOP_K)
    tl.store(expert_ids + row * TOP_K + slot, ids, mask=slot < TOP_K)


def route(logits: Tensor, routing: Routing, *, blocks: Mapping[str, int] | None = None) -> tuple[Tensor, Tensor]:
    """`reference.route`: logits [N, E] float32, float16 or bfloat16, rows of any stride, E up to 512, top_k up to 16.

    Returns (weights [N, top_k] float32, expert_ids [N, top_k] int64). routing.correction_bias [E] may have any of these
    dtypes. A NaN counts as the lowest logit in the choice, so that ids are always experts. blocks: overrides the launch
    options of the tuning table. Raises KernelError.
    """
    device = check_device("logits", logits)
    check("logits", logits, (None, None), FLOATS, device, strided=True)
    rows, experts = logits.shape
    _check_routing(routing, experts, device)
    top_k, n_group = routing.top_k, routing.n_group
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=device)
    expert_ids = torch.empty((rows, top_k), dtype=torch.int64, device=device)
    if rows == 0:
        return weights, expert_ids
    bias = routing.correction_bias
    chosen = config("moe_routing", device, {"num_warps": 1}, blocks, experts=experts, top_k=top_k)
    _route_kernel[(rows,)](
        logits,
        logits if bias is None else bias,
        weights,
        expert_ids,
        logits.stride(0),
        n_group,
        experts // n_group,
        routing.routed_scaling_factor,
        SCORING=routing.scoring_func,
        NORM=routing.norm_topk_prob,
        HAS_BIAS=bias is not None,
        GROUPED=n_group > 1,
        TOP_K=top_k,
        TOPK_GROUP=routing.topk_group,
        GROUPS=triton.next_power_of_2(n_group),
        MEMBERS=triton.next_power_of_2(experts // n_group),
        SLOTS=triton.next_power_of_2(top_k),
        **chosen,
    )
    return weights, expert_ids


def _check_routing(routing: Routing, experts: int, device: torch.device) -> None:
    top_k, n_group, topk_group = routing.top_k, routing.n_group, routing.topk_group
    require(0 < experts <= MAX_EXPERTS, f"logits are of {experts} experts; this kernel takes 1 to {MAX_EXPERTS}")
    require(
        routing.scoring_func in SCORING_FUNCS,
        f"routing.scoring_func is {routing.scoring_func!r}; there are {', '.join(SCORING_FUNCS)}",
    )
    require(n_group > 0 and experts % n_group == 0, f"{experts} experts do not make {n_group} equal groups")
    size = experts // n_group
    require(n_group == 1 or size > 1, f"{n_group} groups of one expert: a group's score is the sum of its best two")
    require(0 < topk_group <= n_group, f"routing.topk_group is {topk_group}; there are {n_group} groups")
    most = min(MAX_TOP_K, topk_group * size)
    require(0 < top_k <= most, f"routing.top_k is {top_k}; 1 to {most} can be chosen here")
    if routing.correction_bias is not None:
        check("routing.correction_bias", routing.correction_bias, (experts,), FLOATS, device)


@triton.jit
def _count_kernel(expert_ids, counts, pairs, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        found += (tl.load(expert_ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found))


@triton.jit
def _place_kernel(
    expert_ids,
    counts,
    order,
    tiles,
    pairs,
    experts,
    table_size,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    count = tl.load(counts + every, mask=every < experts, other=0)
    needed = (count + BLOCK_M - 1) // BLOCK_M
    before = every < expert
    place, tile = tl.sum(tl.where(before, count, 0)), tl.sum(tl.where(before, needed, 0))
    mine, my_tiles = tl.sum(tl.where(every == expert, count, 0)), tl.sum(tl.where(every == expert, needed, 0))

    # the last expert also empties what is left of the table
    last = tl.where(expert == experts - 1, table_size, tile + my_tiles)
    for start in range(tile, last, ROOM):
        row = start + tl.arange(0, ROOM)
        done = (row - tile) * BLOCK_M
        entry = tiles + 3 * row
        tl.store(entry, expert, mask=row < last)
        tl.store(entry + 1, place + done, mask=row < last)
        tl.store(entry + 2, tl.minimum(tl.maximum(mine - done, 0), BLOCK_M), mask=row < last)

    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        is_mine = tl.load(expert_ids + pair, mask=pair < pairs, other=-1) == expert
        rank = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(order + place + rank - 1, pair, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32))


def table_size(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles that `pairs` pairs can make: every expert that is hit may leave one tile all but empty."""
    return (pairs + min(pairs, experts) * (block_m - 1)) // block_m


def sort_pairs(expert_ids: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Sort pairs (token, choice) by expert, and cut each expert's into tiles of block_m.

    expert_ids [N, k] int64 or int32, contiguous, N * k from 1 to 2^30; pair p is choice p % k of token p // k. Ids that
    are not among 0 .. num_experts - 1 are left out; num_experts up to 512, block_m at least 16. Returns (order [N * k]
    int32, the pairs of expert 0 in rising order, then those of expert 1, ...; tiles [T, 3] int32, of each tile its
    expert, where in `order` it begins, and its number of pairs, which is 0 for what is left of the worst case's T).
    Nothing is read on the host. Raises KernelError.
    """
    device = check_device("expert_ids", expert_ids)
    check("expert_ids", expert_ids, (None, None), INTS, device)
    pairs = expert_ids.numel()
    require(0 < pairs <= MAX_PAIRS, f"there are {pairs} pairs of a token and a choice; this kernel takes 1 to 2^30")
    require(0 < num_experts <= MAX_EXPERTS, f"num_experts is {num_experts}; this kernel takes 1 to {MAX_EXPERTS}")
    require(block_m >= MIN_TILE, f"block_m is {block_m}; tiles hold at least {MIN_TILE} pairs")
    order = torch.empty((pairs,), dtype=torch.int32, device=device)
    tiles = torch.empty((table_size(pairs, num_experts, block_m), 3), dtype=torch.int32, device=device)
    counts = torch.empty((num_experts,), dtype=torch.int32, device=device)
    block = min(SORT_BLOCK, max(32, triton.next_power_of_2(pairs)))
    chosen = config("sort_pairs", device, {"num_warps": max(1, block // 512)})
    _count_kernel[(num_experts,)](expert_ids, counts, pairs, BLOCK=block, **chosen)
    _place_kernel[(num_experts,)](
        expert_ids,
        counts,
        order,
        tiles,
        pairs,
        num_experts,
        len(tiles),
        BLOCK_M=block_m,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROOM=32,
        BLOCK=block,
        **chosen,
    )
    return order, tiles


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune moe_routing` tries."""
    for experts, top_k in ((8, 2), (32, 4), (128, 8)):
        logits = torch.randn(64, experts, dtype=torch.bfloat16, device=device)
        yield Problem(
            when={"experts": experts, "top_k": top_k},
            candidates=[{"num_warps": w} for w in (1, 2, 4)],
            run=partial(route, logits, Routing(top_k, norm_topk_prob=True)),
        )
