"""The compiled step: threads walk the same table of instructions and share out the items of each.

Nobody is told what to compute. Of each instruction a thread takes items from a counter of its own, then from those of
the others until there are none, then waits until the taken ones are done. So a thread that comes late, or has lost its
core to another program, or never comes, delays nobody by more than the item it holds; and no item's result depends on
who computes it.

This module does not know Python threads or models.
"""

from __future__ import annotations

from numba.core.types import UniTuple  # type: ignore[attr-defined]

from handloom.ops.cpu import digits, pieces, words
from handloom.ops.cpu import rows as row
from handloom.ops.cpu.amx import AMX
from handloom.ops.cpu.attention import attention_item, attention_items, combine_item, combine_items, item_rows
from handloom.ops.cpu.codes import BITS, LOW
from handloom.ops.cpu.gumbel import noise_item, noise_items
from handloom.ops.cpu.instructions import (
    ASKING,
    COUNTERS,
    FRAME,
    HAS_AMX,
    HAS_WORDS,
    INSIDE,
    LENGTH,
    LINE,
    OPEN,
    OPENING,
    RUNS,
    TABLE,
    WIDTH,
    Frame,
    Operation,
    Split,
)
from handloom.ops.cpu.linear import group_of, linear_item, linear_items
from handloom.ops.cpu.matrix_linear import matrix_group, matrix_item, matrix_items
from handloom.ops.cpu.meeting import fetch_add, load_atomic, store_atomic, wait_a_little
from handloom.ops.cpu.quantizing import quantize_nibbles, quantize_octets
from handloom.ops.cpu.simd import as_float, int64, kernel, read_i64, void, write_i64
from handloom.ops.cpu.tiles import ask_for
from handloom.ops.cpu.words import WORDS
from handloom.ops.panels import PANEL
from handloom.ops.quantized_panels import QUANTIZED

LINGER = 3000  # turns of waiting for another run: one or two milliseconds
AHEAD_BYTES = 1 << 18  # of weights that a waiting thread asks for: half of a small second cache
PIECE = 16  # cache lines of them at a time
ROWS_PER_ITEM = 4
COLUMNS_PER_ITEM = 512

TOKENS, SEQUENCES, ROWS = (int(x) * 8 for x in (Frame.TOKENS, Frame.SEQUENCES, Frame.ROWS))
INPUT_IDS, POSITIONS, CU_SEQLENS, CONTEXT_LENS, PAGE_TABLE, MAX_PAGES, SLOT_MAPPING, LOGITS_ROWS = (
    int(x) * 8
    for x in (
        Frame.INPUT_IDS, Frame.POSITIONS, Frame.CU_SEQLENS, Frame.CONTEXT_LENS, Frame.PAGE_TABLE, Frame.MAX_PAGES,
        Frame.SLOT_MAPPING, Frame.LOGITS_ROWS,
    )
)  # fmt: skip
SCRATCH, SCRATCH_BYTES, THREADS, LOGITS, PAGE_SIZE, KEPT = (
    int(x) * 8 for x in (Frame.SCRATCH, Frame.SCRATCH_BYTES, Frame.THREADS, Frame.LOGITS, Frame.PAGE_SIZE, Frame.KEPT)
)
EMBED, NORM, LINEAR, ACTIVATE, QKV, ATTENTION, QUANTIZE, COMBINE, PERTURB, SPLIT = (int(x) for x in Operation)
PIECES, WHOLE = int(Split.PIECES), int(Split.WHOLE)
UNITS = HAS_AMX * AMX + HAS_WORDS * WORDS


# Instructions -----------------------------------------------------------------------------------


@kernel(int64, int64, int64)
def operand(instruction, index):
    """An operand, counted from 0."""
    return read_i64(instruction + 8 * (1 + index))


@kernel(int64, int64)
def items_of_rows(count):
    return (count + ROWS_PER_ITEM - 1) // ROWS_PER_ITEM


@kernel(int64, int64, int64)
def count_items(instruction, frame):
    """How many items an instruction has."""
    code = read_i64(instruction)
    if code == LINEAR:
        count, group = read_i64(frame + 8 * operand(instruction, 0)), linear_group(instruction, frame)
        if operand(instruction, 15) == PIECES:
            return matrix_items(operand(instruction, 6), operand(instruction, 7), count, group)
        return linear_items(operand(instruction, 6), count, group)
    if code == ATTENTION:
        group = operand(instruction, 2) // operand(instruction, 3)
        return attention_items(
            read_i64(frame + CU_SEQLENS), read_i64(frame + CONTEXT_LENS), read_i64(frame + SEQUENCES),
            operand(instruction, 3), group, operand(instruction, 10), attention_rows(instruction, frame),
        )  # fmt: skip
    if code == COMBINE:
        group = operand(instruction, 0) // operand(instruction, 1)
        return combine_items(
            read_i64(frame + CU_SEQLENS), read_i64(frame + CONTEXT_LENS), read_i64(frame + SEQUENCES),
            operand(instruction, 1), group, operand(instruction, 3),
        )  # fmt: skip
    if code in (NORM, SPLIT):
        rows = read_i64(frame + 8 * operand(instruction, 0))
        return 0 if code == SPLIT and rows == 1 and operand(instruction, 4) == PIECES else items_of_rows(rows)
    if code == PERTURB:
        return read_i64(frame + ROWS) * noise_items(operand(instruction, 2))
    tokens = read_i64(frame + TOKENS)
    if code == ACTIVATE:
        return tokens * ((operand(instruction, 2) + COLUMNS_PER_ITEM - 1) // COLUMNS_PER_ITEM)
    return items_of_rows(tokens)


@kernel(int64, int64, int64)
def linear_group(instruction, frame):
    rows, threads = read_i64(frame + 8 * operand(instruction, 0)), read_i64(frame + THREADS)
    columns, depth = operand(instruction, 6), operand(instruction, 7)
    if operand(instruction, 15) == PIECES:
        return matrix_group(columns, depth, rows, threads)
    return group_of(columns, depth, operand(instruction, 4), rows, threads)


@kernel(int64, int64, int64)
def attention_rows(instruction, frame):
    return item_rows(read_i64(frame + TOKENS), operand(instruction, 2), read_i64(frame + THREADS))


@kernel(void, *[int64] * 4)
def do_linear(i, frame, item, scratch):
    out = read_i64(frame + LOGITS) if operand(i, 12) != 0 else operand(i, 13)
    rows, kept = read_i64(frame + 8 * operand(i, 0)), read_i64(frame + KEPT)
    if operand(i, 15) == PIECES:
        matrix_item(
            item, linear_group(i, frame), operand(i, 1), kept, rows, operand(i, 5), operand(i, 6), operand(i, 7),
            operand(i, 8), operand(i, 9), operand(i, 10), as_float(operand(i, 11)), out, operand(i, 14), scratch,
        )  # fmt: skip
        return
    linear_item(
        item, operand(i, 3), operand(i, 4), linear_group(i, frame), operand(i, 1), operand(i, 2), rows, operand(i, 5),
        operand(i, 6), operand(i, 7), operand(i, 8), operand(i, 9), operand(i, 10), as_float(operand(i, 11)), out,
        operand(i, 14), kept if operand(i, 15) == WHOLE else 0, scratch,
    )  # fmt: skip


@kernel(void, *[int64] * 4)
def do_split(i, frame, at, count):
    x, depth, kept = operand(i, 1) + at * operand(i, 2), operand(i, 3), read_i64(frame + KEPT)
    if operand(i, 4) == PIECES:
        pieces.split_row(x, at, count, depth, kept)
    elif AMX:
        digits.split_row(x, at, depth, kept)
    elif WORDS:
        words.split_row(x, at, depth, kept)


@kernel(void, *[int64] * 4)
def do_attention(i, frame, item, scratch):
    attention_item(
        item, attention_rows(i, frame), operand(i, 0), operand(i, 1), operand(i, 2), operand(i, 3), operand(i, 4),
        operand(i, 5), operand(i, 6), operand(i, 7), operand(i, 8), read_i64(frame + PAGE_SIZE),
        read_i64(frame + PAGE_TABLE), read_i64(frame + MAX_PAGES), read_i64(frame + CU_SEQLENS),
        read_i64(frame + CONTEXT_LENS), read_i64(frame + SEQUENCES), as_float(operand(i, 9)), operand(i, 10),
        as_float(operand(i, 11)), operand(i, 12), operand(i, 13), operand(i, 14), operand(i, 15),
        read_i64(frame + KEPT), scratch,
    )  # fmt: skip


@kernel(void, *[int64] * 4)
def do_combine(i, frame, item, scratch):
    lengths, kept = read_i64(frame + CONTEXT_LENS), read_i64(frame + KEPT)
    combine_item(
        item, operand(i, 0), operand(i, 1), operand(i, 2), read_i64(frame + CU_SEQLENS), lengths,
        read_i64(frame + SEQUENCES), operand(i, 3), operand(i, 4), operand(i, 5), operand(i, 6), kept, scratch,
    )  # fmt: skip


@kernel(void, *[int64] * 4)
def do_embed(i, frame, token, scratch):
    out = operand(i, 7) + token * operand(i, 8)
    width, scale = operand(i, 3), as_float(operand(i, 4))
    token_id = read_i64(read_i64(frame + INPUT_IDS) + 8 * token)
    if operand(i, 1) == QUANTIZED:
        row.embed_quantized_row(operand(i, 0), token_id, width, scratch, out)
    else:
        row.embed_row(operand(i, 0), operand(i, 1), operand(i, 2), token_id, width, out)
    if scale != 1.0:
        row.scale_row(out, width, scale)
    if operand(i, 5) != 0:
        position = read_i64(read_i64(frame + POSITIONS) + 8 * token)
        row.add_table_row(operand(i, 5), operand(i, 6), position, width, out)


@kernel(void, int64, int64, int64)
def do_norm(i, frame, at):
    stride, residual = operand(i, 10), operand(i, 8)
    source = read_i64(read_i64(frame + LOGITS_ROWS) + 8 * at) if operand(i, 7) != 0 else at
    out = operand(i, 9) + at * stride
    x = operand(i, 1) + source * stride
    normed = out if residual == 0 else x
    row.normalize(x, operand(i, 2), operand(i, 3), operand(i, 4), operand(i, 5), as_float(operand(i, 6)), normed)
    if residual != 0:
        row.add_rows(residual + at * stride, normed, operand(i, 2), out)


@kernel(void, int64, int64)
def do_activate(i, item):
    width = operand(i, 2)
    chunks = (width + COLUMNS_PER_ITEM - 1) // COLUMNS_PER_ITEM
    token, first = item // chunks, item % chunks * COLUMNS_PER_ITEM
    last = min(width, first + COLUMNS_PER_ITEM)
    x, out = operand(i, 0) + token * operand(i, 1), operand(i, 5) + token * operand(i, 6)
    row.activate_row(x, first, last, width, operand(i, 3), operand(i, 4), out)


@kernel(void, int64, int64, int64)
def do_qkv(i, frame, token):
    num_heads, num_kv_heads, head_dim, v_head_dim = operand(i, 2), operand(i, 3), operand(i, 4), operand(i, 5)
    x, half, layer, form = operand(i, 0) + token * operand(i, 1), operand(i, 12), operand(i, 17), operand(i, 16)
    at_position = 4 * half * read_i64(read_i64(frame + POSITIONS) + 8 * token) if half > 0 else 0
    cos, sin = operand(i, 10) + at_position, operand(i, 11) + at_position
    for head in range(num_heads + num_kv_heads):
        at = x + 4 * head * head_dim
        if head < num_heads:
            if operand(i, 6) != 0:
                row.normalize(at, head_dim, layer, operand(i, 6), operand(i, 18), as_float(operand(i, 7)), at)
        elif operand(i, 8) != 0:
            row.normalize(at, head_dim, layer, operand(i, 8), operand(i, 19), as_float(operand(i, 9)), at)
        if half > 0:
            row.rotate_head(at, cos, sin, half, operand(i, 13))
    slot = read_i64(read_i64(frame + SLOT_MAPPING) + 8 * token)
    if slot >= 0:
        k, v = x + 4 * num_heads * head_dim, x + 4 * (num_heads + num_kv_heads) * head_dim
        k_width, v_width = num_kv_heads * head_dim, num_kv_heads * v_head_dim
        row.convert_row(k, k_width, form, operand(i, 14) + slot * k_width * row.size_of(form))
        row.convert_row(v, v_width, form, operand(i, 15) + slot * v_width * row.size_of(form))


@kernel(void, int64, int64)
def do_quantize(i, at):
    x, form, group = operand(i, 0) + at * operand(i, 1), operand(i, 2), operand(i, 4)
    low, scale = operand(i, 8) + at * operand(i, 9), operand(i, 10) + at * operand(i, 11)
    minimum, size = operand(i, 12) + at * operand(i, 13), 4 if operand(i, 7) != 0 else 2
    for number in range(operand(i, 3) // group):
        first = number * group
        if operand(i, 5) == 8:
            fine = quantize_octets(
                x + first * row.size_of(form), form, group, operand(i, 7), low + first, scale + size * number
            )
        else:
            fine = quantize_nibbles(
                x + first * row.size_of(form), form, group, operand(i, 6), low + first // 2, scale + size * number,
                minimum + number,
            )  # fmt: skip
        if fine == 0:
            write_i64(operand(i, 14), 1)


@kernel(void, *[int64] * 4)
def do_item(instruction, frame, item, scratch):
    code = read_i64(instruction)
    if code == LINEAR:
        do_linear(instruction, frame, item, scratch)
    elif code == ATTENTION:
        do_attention(instruction, frame, item, scratch)
    elif code == COMBINE:
        do_combine(instruction, frame, item, scratch)
    elif code == ACTIVATE:
        do_activate(instruction, item)
    elif code == PERTURB:
        noise_item(
            item, operand(instruction, 0), operand(instruction, 1), operand(instruction, 2), operand(instruction, 3),
            operand(instruction, 4), operand(instruction, 5), operand(instruction, 6),
        )  # fmt: skip
    else:
        own = code in (NORM, SPLIT)
        count = read_i64(frame + 8 * operand(instruction, 0)) if own else read_i64(frame + TOKENS)
        for at in range(item * ROWS_PER_ITEM, min(count, (item + 1) * ROWS_PER_ITEM)):
            if code == NORM:
                do_norm(instruction, frame, at)
            elif code == SPLIT:
                do_split(instruction, frame, at, count)
            elif code == QKV:
                do_qkv(instruction, frame, at)
            elif code == QUANTIZE:
                do_quantize(instruction, at)
            else:
                do_embed(instruction, frame, at, scratch)


# Runs -------------------------------------------------------------------------------------------


@kernel(int64, *[int64] * 3)
def first_of(total, thread, threads):
    """The first of a thread's own items; after its last come those of the next thread."""
    return (total * thread + threads - 1) // threads


@kernel(int64, *[int64] * 4)
def take(counters, thread, threads, total):
    """An item that nobody else has: one of the thread's own, or of another's who is late; -1 when there are none."""
    for turn in range(threads):
        whose = (thread + turn) % threads
        item = first_of(total, whose, threads) + fetch_add(counters + whose * LINE, 1)
        if item < first_of(total, whose + 1, threads):
            return item
    return -1


@kernel(UniTuple(int64, 2), *[int64] * 3)
def own_weights(instruction, frame, thread):
    """Of a linear: where the weights of the thread's own items begin and end."""
    data, columns, depth = operand(instruction, 5), operand(instruction, 6), operand(instruction, 7)
    group, threads = linear_group(instruction, frame), read_i64(frame + THREADS)
    total = linear_items(columns, 1, group)
    first, last = first_of(total, thread, threads) * group, first_of(total, thread + 1, threads) * group
    bits = 8 * operand(instruction, 4)
    if operand(instruction, 3) == QUANTIZED:
        data, bits = read_i64(data + LOW), min(8, 4 * (read_i64(data + BITS) // 4))
    size = depth * PANEL * bits // 8
    return data + first * size, data + min(last, (columns + PANEL - 1) // PANEL) * size


@kernel(void, int64, int64)
def walk(control, thread):
    """Take part in the open run until all of it is done.

    Who waits asks for its weights of the next linear meanwhile: they depend on nothing that is waited for.
    """
    table, length = read_i64(control + TABLE), read_i64(control + LENGTH)
    frame, counters = read_i64(control + FRAME), read_i64(control + COUNTERS)
    threads = read_i64(frame + THREADS)
    scratch = read_i64(frame + SCRATCH) + thread * read_i64(frame + SCRATCH_BYTES)
    following, asked, end = 0, 0, 0  # the next linear, and which of its weights are still to be asked for
    for at in range(length):
        instruction, counter = table + at * WIDTH * 8, counters + at * (threads + 1) * LINE
        total, done = count_items(instruction, frame), counter + threads * LINE
        item = take(counter, thread, threads, total)
        while item >= 0:
            do_item(instruction, frame, item, scratch)
            fetch_add(done, 1)
            item = take(counter, thread, threads, total)
        if following <= at:
            following = at + 1
            while following < length and read_i64(table + following * WIDTH * 8) != LINEAR:
                following += 1
            if following < length:
                asked, end = own_weights(table + following * WIDTH * 8, frame, thread)
                end = min(end, asked + AHEAD_BYTES)
        spins = 0
        while load_atomic(done) < total:
            if asked < end:
                for _ in range(PIECE):
                    ask_for(asked)
                    asked += LINE
            else:
                spins = wait_a_little(spins)


def run(control: int, thread: int) -> None:
    """Thread 0: do the open run, close it, and return when no helper is left inside. Others: help while it is open, and
    with the next run if that comes soon: who goes back to Python in between would want the interpreter's lock just when
    the caller needs it.

    OPENING opens the run, before anybody is called: a helper that is called may have the caller's core, and the caller
    not get on before it is done.
    """
    if thread == OPENING:
        store_atomic(control + OPEN, 1)
        fetch_add(control + RUNS, 1)
        return
    if thread == ASKING:
        write_i64(control, UNITS)
        return
    if thread == 0:
        walk(control, 0)
        store_atomic(control + OPEN, 0)
        spins = 0
        while load_atomic(control + INSIDE) > 0:
            spins = wait_a_little(spins)
        return
    spins = 0
    while spins < LINGER:
        runs = load_atomic(control + RUNS)
        fetch_add(control + INSIDE, 1)
        if load_atomic(control + OPEN) != 0:
            walk(control, thread)
        fetch_add(control + INSIDE, -1)
        spins = 0
        while spins < LINGER and load_atomic(control + RUNS) == runs:
            spins = wait_a_little(spins)
