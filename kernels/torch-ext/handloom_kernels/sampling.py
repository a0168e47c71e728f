"""The rules that reshape logits before temperature, in one pass: penalties, bias, bans, grammar.

    s = float32(logit)
    seen:     s < 0 ? s * r : s / r            repetition penalty, once per distinct token of prompt and answer
              s - count * f - [count > 0] * p  frequency and presence penalties, over the answer
    forbidden by the grammar's bitmask, or on the row's list of bans: -inf
    s + bias at some token ids

One program owns one tile of one row; rows and vocabulary share the grid, so that one row uses the whole chip:

           <------------------ vocabulary ------------------>
    logits [ tile 0     | tile 1     | ...      | tail ####]   4 or 2 bytes a token in, 4 out
    seen   [ 1 bit each | ...                              ]   1/8 byte a token
    counts [  .      .  | .                                ]   4 bytes, read only where `seen` has its bit
    allowed[ 1 bit each | ...                              ]   1/8 byte a token
    bans   every program reads the row's short list and counts, in a histogram, those that lie in its own tile

Biases are added by a small second launch, one thread an entry, so that each reads a score that is finished: no thread
waits for another's write. It happens only where there are biases.

A dense count of each token would double the traffic (4 bytes beside a logit's 4 or 2), but a sequence holds few
distinct tokens: the bits say where a count can be other than 0, and only these are loaded, 32 bytes of memory each.
What is None moves nothing. About 10 FLOPs a token. Bound by memory. Multiplications and additions are not fused: in
float32 the scores have the bits of the reference.

This module does not know requests, grammars, or how a token is chosen. Meaning: `reference.adjust_logits`.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, INTS, KernelError, check, check_device, require
from .reference.sampling import Penalties, TokenState
from .tuning import Problem, config


@triton.jit
def _bit(words, token_ids, inside):
    """Bit token_id % 32 of word token_id // 32."""
    word = tl.load(words + (token_ids >> 5), mask=inside, other=0)
    return (word >> (token_ids & 31)) & 1


@triton.jit
def _penalized(
    scores,
    token_ids,
    inside,
    row,
    state_row,
    seen,
    counts,
    repetition,
    frequency,
    presence,
    words,
    vocab_size,
    HAS_COUNTS: tl.constexpr,
    HAS_REPETITION: tl.constexpr,
    HAS_FREQUENCY: tl.constexpr,
    HAS_PRESENCE: tl.constexpr,
):
    is_seen = _bit(seen + state_row * words, token_ids, inside) == 1
    if HAS_REPETITION:
        r = tl.zeros_like(scores) + tl.load(repetition + row)
        penalized = tl.where(scores < 0, scores * r, tl.div_rn(scores, r))
        scores = tl.where(is_seen, penalized, scores)
    if HAS_COUNTS:
        count = tl.load(counts + state_row * vocab_size + token_ids, mask=inside & is_seen, other=0)
        if HAS_FREQUENCY:
            scores -= count.to(tl.float32) * tl.load(frequency + row)
        if HAS_PRESENCE:
            scores -= tl.where(count > 0, tl.load(presence + row), 0.0)
    return scores


@triton.jit
def _is_banned(ban_ids, row, size, start, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Which tokens of the tile [BLOCK] the row's list names; CHUNK entries of it at a time."""
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, CHUNK):
        each = first + tl.arange(0, CHUNK)
        place = tl.load(ban_ids + row * size + each, mask=each < size, other=-1) - start
        mine = (place >= 0) & (place < BLOCK)
        found += tl.histogram(tl.where(mine, place, 0).to(tl.int32), BLOCK, mask=mine)
    return found > 0


@triton.jit(do_not_specialize=["ban_size"])
def _adjust_kernel(
    logits,
    out,
    rows,
    seen,
    counts,
    repetition,
    frequency,
    presence,
    ban_ids,
    allowed,
    row_stride,
    vocab_size,
    tiles,
    words,
    ban_size,
    HAS_ROWS: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_REPETITION: tl.constexpr,
    HAS_FREQUENCY: tl.constexpr,
    HAS_PRESENCE: tl.constexpr,
    HAS_BANS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = program % tiles * BLOCK
    token_ids = start + tl.arange(0, BLOCK)
    inside = token_ids < vocab_size
    scores = tl.load(logits + row * row_stride + token_ids, mask=inside, other=0.0).to(tl.float32)
    if HAS_SEEN:
        state_row = row
        if HAS_ROWS:
            state_row = tl.load(rows + row).to(tl.int64)
        scores = _penalized(
            scores, token_ids, inside, row, state_row, seen, counts, repetition, frequency, presence, words,
            vocab_size, HAS_COUNTS, HAS_REPETITION, HAS_FREQUENCY, HAS_PRESENCE,
        )  # fmt: skip
    if HAS_ALLOWED:
        scores = tl.where(_bit(allowed + row * words, token_ids, inside) == 1, scores, float("-inf"))
    if HAS_BANS:
        scores = tl.where(_is_banned(ban_ids, row, ban_size, start, BLOCK, CHUNK), float("-inf"), scores)
    tl.store(out + row * vocab_size + token_ids, scores, mask=inside)


@triton.jit(do_not_specialize=["size", "chunks"])
def _bias_kernel(scores, bias_ids, bias, vocab_size, size, chunks, CHUNK: tl.constexpr):
    """CHUNK entries of one row's list, in place; ids are distinct, so no two threads meet."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    each = program % chunks * CHUNK + tl.arange(0, CHUNK)
    token_ids = tl.load(bias_ids + row * size + each, mask=each < size, other=-1).to(tl.int64)
    inside = (token_ids >= 0) & (token_ids < vocab_size)
    old = tl.load(scores + row * vocab_size + token_ids, mask=inside, other=0.0)
    new = old + tl.load(bias + row * size + each, mask=inside, other=0.0)
    tl.store(scores + row * vocab_size + token_ids, tl.where(old == float("-inf"), old, new), mask=inside)


def adjust_logits(
    logits: Tensor,
    state: TokenState | None = None,
    penalties: Penalties | None = None,
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    ban_ids: Tensor | None = None,
    allowed: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """`reference.adjust_logits`: logits [R, V] (float32, float16 or bfloat16, rows of any stride) to new scores [R, V]
    float32.

    state.seen [S, ceil(V / 32)] int32 and state.counts [S, V] int32 (frequency and presence penalties need it);
    penalties [R] float32 each; bias_ids [R, M] int32 or int64 (ids distinct within a row, a negative one or one past
    V says nothing) with bias [R, M] float32; ban_ids [R, M'] likewise; allowed [R, ceil(V / 32)] int32; rows [R] int32
    or int64 in [0, S). All on the device; what is None costs nothing. blocks: overrides the block sizes of the tuning
    table. Raises KernelError.
    """
    penalties = penalties or Penalties()
    device, count, vocab_size = _check(logits, state, penalties, bias_ids, bias, ban_ids, allowed, rows)
    out = torch.empty(count, vocab_size, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    chosen = blocks_for(logits, blocks)
    tiles = -(-vocab_size // chosen["BLOCK"])
    require(count * tiles < 2**31, f"{count} rows of {vocab_size} logits are too many for one launch")
    penalized = any(each is not None for each in penalties)
    counted = penalties.frequency is not None or penalties.presence is not None
    _adjust_kernel[(count * tiles,)](
        logits,
        out,
        rows if penalized else None,
        state.seen if penalized and state is not None else None,
        state.counts if counted and state is not None else None,
        *penalties,
        ban_ids,
        allowed,
        logits.stride(0),
        vocab_size,
        tiles,
        -(-vocab_size // 32),
        0 if ban_ids is None else ban_ids.shape[1],
        HAS_ROWS=penalized and rows is not None,
        HAS_SEEN=penalized,
        HAS_COUNTS=counted,
        HAS_REPETITION=penalties.repetition is not None,
        HAS_FREQUENCY=penalties.frequency is not None,
        HAS_PRESENCE=penalties.presence is not None,
        HAS_BANS=ban_ids is not None,
        HAS_ALLOWED=allowed is not None,
        **chosen,
    )
    if bias_ids is not None and bias_ids.numel():
        size, chunk = bias_ids.shape[1], chosen["CHUNK"]
        chunks = -(-size // chunk)
        _bias_kernel[(count * chunks,)](out, bias_ids, bias, vocab_size, size, chunks, CHUNK=chunk, num_warps=4)
    return out


def _check(
    logits: Tensor,
    state: TokenState | None,
    penalties: Penalties,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    ban_ids: Tensor | None,
    allowed: Tensor | None,
    rows: Tensor | None,
) -> tuple[torch.device, int, int]:
    """(device, rows, vocabulary) of what `adjust_logits` is given."""
    device = check_device("logits", logits)
    check("logits", logits, (None, None), FLOATS, device, strided=True)
    count, vocab_size = logits.shape
    require(vocab_size < 2**31 - 2**16, f"logits have {vocab_size} columns; there must be fewer than 2^31 - 2^16")
    if any(each is not None for each in penalties):
        _check_penalties(count, vocab_size, device, state, penalties, rows)
    require((bias_ids is None) == (bias is None), "bias_ids and bias come together, or not at all")
    if bias_ids is not None and bias is not None:
        check("bias_ids", bias_ids, (count, None), INTS, device)
        check("bias", bias, tuple(bias_ids.shape), torch.float32, device)
    if ban_ids is not None:
        check("ban_ids", ban_ids, (count, None), INTS, device)
    if allowed is not None:
        check("allowed", allowed, (count, -(-vocab_size // 32)), torch.int32, device)
    return device, count, vocab_size


def _check_penalties(
    count: int,
    vocab_size: int,
    device: torch.device,
    state: TokenState | None,
    penalties: Penalties,
    rows: Tensor | None,
) -> None:
    if state is None:
        raise KernelError("penalties need a state: which tokens were seen")
    sequences = state.seen.shape[0] if rows is not None else count
    check("state.seen", state.seen, (sequences, -(-vocab_size // 32)), torch.int32, device)
    for name, values in zip(penalties._fields, penalties):
        if values is not None:
            check(f"penalties.{name}", values, (count,), torch.float32, device)
    if penalties.frequency is not None or penalties.presence is not None:
        if state.counts is None:
            raise KernelError("frequency and presence penalties need state.counts")
        check("state.counts", state.counts, (sequences, vocab_size), torch.int32, device)
    if rows is not None:
        check("rows", rows, (count,), INTS, device)


@triton.jit
def _count_kernel(
    seen,
    counts,
    rows,
    token_ids,
    size,
    sequences,
    words,
    vocab_size,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < size, other=-1).to(tl.int64)
    token_id = tl.load(token_ids + at, mask=at < size, other=-1).to(tl.int64)
    real = (row >= 0) & (row < sequences) & (token_id >= 0) & (token_id < vocab_size)
    bit = tl.full([BLOCK], 1, tl.int32) << (token_id & 31).to(tl.int32)
    tl.atomic_or(seen + row * words + (token_id >> 5), bit, mask=real, sem="relaxed")
    if HAS_COUNTS:
        tl.atomic_add(counts + row * vocab_size + token_id, 1, mask=real, sem="relaxed")


def count_tokens(
    state: TokenState,
    rows: Tensor,
    token_ids: Tensor,
    generated: bool = True,
    *,
    blocks: Mapping[str, int] | None = None,
) -> None:
    """`reference.count_tokens`: note in `state`, in place, that sequence rows[i] holds token_ids[i], [N] int32 or int64
    both, in one launch; pairs outside the state are passed over. Integer atomics: any order gives the same state.
    Without `generated` (a prompt) only `seen` changes. A sequence that ends: zero its rows. Raises KernelError.
    """
    device = check_device("state.seen", state.seen)
    check("state.seen", state.seen, (None, None), torch.int32, device)
    sequences, words = state.seen.shape
    vocab_size = 32 * words
    if state.counts is not None:
        vocab_size = state.counts.shape[-1]
        require(-(-vocab_size // 32) == words, f"state.seen has {words} words for {vocab_size} tokens")
        check("state.counts", state.counts, (sequences, None), torch.int32, device)
    check("rows", rows, (None,), INTS, device)
    check("token_ids", token_ids, tuple(rows.shape), INTS, device)
    if len(rows) == 0:
        return
    block = {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": True, **(blocks or {})}
    _count_kernel[(triton.cdiv(len(rows), block["BLOCK"]),)](
        state.seen,
        state.counts,
        rows,
        token_ids,
        len(rows),
        sequences,
        words,
        vocab_size,
        HAS_COUNTS=generated and state.counts is not None,
        **block,
    )


def blocks_for(logits: Tensor, override: Mapping[str, int] | None = None) -> dict[str, int]:
    """BLOCK (scores of a tile) and CHUNK (entries of a list read at a time). Nothing is fused, see above."""
    block = max(64, min(2048, triton.next_power_of_2(logits.shape[1])))
    default = {"BLOCK": block, "CHUNK": min(512, block), "num_warps": max(1, block // 256)}
    dtype = str(logits.dtype).removeprefix("torch.")
    chosen = config("sampling", logits.device, default, override, vocab_size=logits.shape[1], dtype=dtype)
    return {**chosen, "enable_fp_fusion": False}


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m handloom_kernels.tune sampling` tries."""
    for vocab_size in (49_152, 128_256, 151_936, 262_144):
        logits = torch.randn(8, vocab_size, device=device)
        seen = torch.zeros(8, -(-vocab_size // 32), dtype=torch.int32, device=device)
        counts = torch.zeros(8, vocab_size, dtype=torch.int32, device=device)
        one = torch.full((8,), 1.1, device=device)
        yield Problem(
            when={"vocab_size": vocab_size, "dtype": "float32"},
            candidates=[{"BLOCK": b, "CHUNK": 512, "num_warps": w} for b in (1024, 2048, 4096) for w in (2, 4, 8)],
            run=partial(adjust_logits, logits, TokenState(seen, counts), Penalties(one, one, one)),
        )
