"""A step as a table of instructions: what is computed, on which addresses, in which order.

A table is int64 [n, WIDTH]: an operation and its operands, which are addresses, counts, and float64 as bits. What
changes from step to step (the batch) stands in a frame of int64; an instruction says which entry counts its rows.

Threads that run a table meet in a control block of int64, entries a cache line apart: whether a run is open, how many
helpers are inside, the addresses of the run's table, frame and counters, and how many runs there have been.

This module does not know how anything is computed, or what a model is.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

WIDTH = 24
LINE = 64
OPEN, INSIDE, TABLE, LENGTH, FRAME, COUNTERS, RUNS = (i * LINE for i in range(7))
CONTROL_BYTES = 7 * LINE
OPENING = -1  # in place of a thread's number: open a run
ASKING = -2  # in place of a thread's number: write, where the control block is said to be, what there is code for
HAS_AMX, HAS_WORDS = 1, 2  # of which that is the sum

BLOCK = 64  # columns of k that a product sums by themselves
ROWS = 264  # of a product's item at most: a multiple of every tile
GROUP = 4  # panels of a product's item at most
PIECES = 3  # of bfloat16 that a float32 is the sum of
TILE_DEPTH = 32  # columns of k in a tile of bfloat16
DIGITS = 4  # of 8 bits that a row of x is the sum of
QUAD = 4  # rows whose digits lie together: as many as a tile holds
KEYS = 64  # of a block of attention
SPLIT = 256  # keys whose sums attention takes apart from others'
QUERY_ROWS = 64  # queries times heads of a group of which attention makes each split an item, if there are several
ITEM_ROWS = 384  # of any item of attention at most
CHUNK = 48  # of them whose scores over a split are held at once


class Frame(IntEnum):
    """Entries of a frame: numbers of tokens, sequences and rows of logits, addresses of the batch's numbers (int64) and
    of the logits; then the memory and the threads of the run."""

    TOKENS = 0
    SEQUENCES = 1
    ROWS = 2
    INPUT_IDS = 3
    POSITIONS = 4
    SLOT_MAPPING = 5
    CU_SEQLENS = 6
    CONTEXT_LENS = 7
    LOGITS_ROWS = 8
    MAX_PAGES = 9
    PAGE_TABLE = 10
    PAGE_SIZE = 11
    LOGITS = 12
    SCRATCH = 13
    SCRATCH_BYTES = 14  # of each thread
    KEPT = 15  # where something is kept between two instructions: attention's sums, or rows that are split
    THREADS = 16


class Operation(IntEnum):
    """What an instruction does."""

    EMBED = 0
    NORM = 1
    LINEAR = 2
    ACTIVATE = 3
    QKV = 4
    ATTENTION = 5
    QUANTIZE = 6
    COMBINE = 7
    PERTURB = 8
    SPLIT = 9


class Split(IntEnum):
    """What rows of x are for a product: themselves, pieces for matrix units, or whole numbers for codes: digits for
    matrix units, words for processors without (see the modules)."""

    NONE = 0
    PIECES = 1
    WHOLE = 2


class Activation(IntEnum):
    """The functions of an Activate."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    RELU2 = 4


class Embed(NamedTuple):
    """out [TOKENS, width] = weight[input_ids] * scale + positions_table[positions]"""

    weight: int
    format: int
    in_panels: int
    width: int
    scale: float
    table: int
    table_format: int
    out: int
    stride: int


class NormRows(NamedTuple):
    """out = norm(x), row by row; gather: row i is row logits_rows[i] of x; stride in bytes, of all.

    With a residual: x = norm(x), out = residual + x.
    """

    counted_by: int
    x: int
    width: int
    layer: int
    weight: int
    bias: int
    eps: float
    gather: int
    residual: int
    out: int
    stride: int


class SplitRows(NamedTuple):
    """Rows of x [depth] as a Split says, in what is kept, for the products that follow"""

    counted_by: int
    x: int
    stride: int
    depth: int
    split: int


class Linear(NamedTuple):
    """out = residual + softcap(x @ weight.T + bias); `to_logits`: out is the frame's; split: so x is kept already"""

    counted_by: int
    x: int
    x_stride: int
    format: int
    size: int
    data: int
    columns: int
    depth: int
    bias: int
    residual: int
    residual_stride: int
    softcap: float
    to_logits: int
    out: int
    out_stride: int
    split: int


class Activate(NamedTuple):
    """out [TOKENS, width] = activation(x[:, :width]), times x[:, width:] if gated"""

    x: int
    x_stride: int
    width: int
    gated: int
    kind: int
    out: int
    out_stride: int


class Qkv(NamedTuple):
    """Per-head norm and rotation of q and k in place, and the write of k and v to their pages"""

    qkv: int
    stride: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_weight: int
    q_eps: float
    k_weight: int
    k_eps: float
    cos: int
    sin: int
    half: int
    interleaved: int
    k_pages: int
    v_pages: int
    format: int
    norm_is_layer: int
    q_bias: int
    k_bias: int


class Attention(NamedTuple):
    """out [TOKENS, num_heads * v_head_dim] = attention of q over the pages; window 0, softcap 0: none

    sinks, slopes (of ALiBi): float32 [num_heads], 0: none.

    Of some sequences only the sums over splits of the keys, which the next instruction adds.
    """

    q: int
    q_stride: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    k_pages: int
    v_pages: int
    format: int
    scale: float
    window: int
    softcap: float
    sinks: int
    slopes: int
    out: int
    out_stride: int


class Quantize(NamedTuple):
    """Codes of TOKENS rows [columns], group by group; strides in bytes; failed: an int64 that is set to 1 where there
    are none"""

    x: int
    stride: int
    format: int
    columns: int
    group: int
    bits: int
    symmetric: int
    wide_scale: int
    low: int
    low_stride: int
    scale: int
    scale_stride: int
    minimum: int
    minimum_stride: int
    failed: int


class Combine(NamedTuple):
    """The rest of out, from the sums that attention kept"""

    num_heads: int
    num_kv_heads: int
    v_head_dim: int
    window: int
    sinks: int
    out: int
    out_stride: int


class Perturb(NamedTuple):
    """out [ROWS, width] = scores + Gumbel noise; floors float32 [ROWS]; keys int64 [ROWS, 3]: seed's words, position"""

    scores: int
    scores_stride: int
    width: int
    floors: int
    keys: int
    out: int
    out_stride: int


CODES: dict[type, Operation] = {
    Embed: Operation.EMBED,
    NormRows: Operation.NORM,
    Linear: Operation.LINEAR,
    Activate: Operation.ACTIVATE,
    Qkv: Operation.QKV,
    Attention: Operation.ATTENTION,
    Quantize: Operation.QUANTIZE,
    Combine: Operation.COMBINE,
    Perturb: Operation.PERTURB,
    SplitRows: Operation.SPLIT,
}


def row_of(instruction: tuple[int | float, ...]) -> list[int]:
    """The row of a table."""
    values = [value if isinstance(value, int) else float_bits(value) for value in instruction]
    return [int(CODES[type(instruction)]), *values, *[0] * (WIDTH - 1 - len(values))]


def quad_bytes(depth: int) -> int:
    """Of QUAD rows as digits, and what lies after them (see `digits`); depth is a multiple of BLOCK."""
    return depth * QUAD * DIGITS + 2 * LINE + depth // 16 * LINE + depth


def word_bytes(depth: int) -> int:
    """Of a row as words (see `words`); depth is a multiple of BLOCK."""
    return depth * 4 + (depth // 8 + LINE - 1) // LINE * LINE + LINE


def float_bits(value: float) -> int:
    """The bits of a float64 as an int64."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def counter_bytes(threads: int) -> int:
    """Counters of one instruction, a line each: items taken of each thread's own, and items done."""
    return (threads + 1) * LINE
