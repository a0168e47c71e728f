"""Offsets past 2^31 and 2^32: of such matrices and pools a few pages are written; the rest are zeros without memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from handloom.checkpoint import memory
from handloom.errors import OutOfMemory
from handloom.ops import Panels, cpu
from handloom.ops.panels import PANEL
from handloom_kernels.reference import Norm

HIDDEN, LAST = 8192, 7
VOCAB = (1 << 18) + LAST
HEAD_DIM, KV_HEADS, PAGE_SIZE, TOKENS = 128, 8, 16, 40


def zeros(*shape: int) -> Tensor:
    try:
        return memory.empty(shape, torch.bfloat16)  # fresh from the system
    except OutOfMemory as error:
        pytest.skip(f"this system promises no memory that it does not have: {error}")


def test_an_embedding_and_a_head_of_more_than_four_gigabytes() -> None:
    torch.manual_seed(0)
    rows, norm = torch.randn(LAST, HIDDEN).bfloat16(), Norm("rms", torch.ones(HIDDEN), None, 0.0)
    panels = Panels(zeros(-(-VOCAB // PANEL), HIDDEN, PANEL), torch.Size((VOCAB, HIDDEN)), 1)
    panels.data[-1] = Panels.pack(rows).data[0]
    ids, nowhere = torch.tensor([VOCAB - 1, VOCAB - LAST, 5]), torch.zeros(3, dtype=torch.int64)
    expected = torch.stack((rows[-1], rows[0], torch.zeros(HIDDEN))).float()
    assert panels.data.nbytes > 1 << 32
    assert torch.equal(cpu.embed(ids, panels, 1.0, nowhere, None), expected)
    hidden = torch.randn(2, HIDDEN)
    logits = cpu.lm_head(hidden, norm, panels, None)
    exact = torch.nn.functional.rms_norm(hidden.double(), (HIDDEN,), eps=0.0) @ rows.double().T
    torch.testing.assert_close(logits[:, -LAST:].double(), exact, rtol=0, atol=1e-4)
    assert not logits[:, :-LAST].any()
    del panels
    table = zeros(VOCAB, HIDDEN)
    table[-LAST:] = rows
    assert torch.equal(cpu.embed(ids, table, 1.0, nowhere, None), expected)


def attended(pages: list[Tensor], table: list[int]) -> Tensor:
    """Attention of some tokens whose K and V are written to these pages."""
    torch.manual_seed(1)
    norm, hidden = Norm("rms", torch.ones(64), None, 1e-6), torch.randn(TOKENS, 64)
    weight = torch.randn((2 * KV_HEADS + 2 * KV_HEADS) * HEAD_DIM, 64)
    slots = torch.tensor([table[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(TOKENS)])
    q = cpu.norm_qkv(hidden, norm, weight, None, None, None, None, *pages, slots)
    lengths = torch.tensor([TOKENS])
    return cpu.paged_attention(q, *pages, torch.tensor([table]), torch.tensor([0, TOKENS]), lengths, HEAD_DIM**-0.5)


def test_a_pool_of_more_than_two_billion_numbers() -> None:
    shape = PAGE_SIZE, KV_HEADS, HEAD_DIM
    count = (1 << 31) // (PAGE_SIZE * KV_HEADS * HEAD_DIM) + 3
    few, many = ([zeros(pages, *shape) for _ in "kv"] for pages in (3, count))
    assert many[0].numel() > 1 << 31
    assert torch.equal(attended(many, [count - 1, 0, count - 2]), attended(few, [0, 1, 2]))
