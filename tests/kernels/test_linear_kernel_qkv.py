"""norm_qkv.py: exact for every kind of head, writes what it should and nothing else, independent of other tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from handloom_kernels import norm_qkv as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import Rotary
from kernel_testing import DEVICE, DTYPES, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw
from qkv_heads import KINDS, arguments, with_pages

SMALL = {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_head(name: str, dtype: torch.dtype) -> None:
    args = arguments(KINDS[name], dtype)
    ours = with_pages(kernels.norm_qkv, blocks=SMALL)(*args)
    assert_as_exact_as(with_pages(reference.norm_qkv), *args, ours=ours)
    kept = torch.ones(args[7].shape[0] * 4, dtype=torch.bool, device=DEVICE)
    kept[args[9][args[9] >= 0]] = False
    for before, after in zip(args[7:9], ours[1:], strict=True):
        assert torch.equal(before.flatten(0, 1)[kept], after.flatten(0, 1)[kept])


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma 3"])
def test_the_pieces_of_a_head_make_no_difference(name: str) -> None:
    args = arguments(KINDS[name], torch.float32, rows=2)
    whole = with_pages(kernels.norm_qkv, blocks={**SMALL, "BLOCK_N": 64})(*args)
    pieces = with_pages(kernels.norm_qkv, blocks=SMALL)(*args)
    for each, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 63), (2, 100), (2, 1000)])
def test_odd_sizes(name: str, rows: int, width: int) -> None:
    args = arguments(KINDS[name], torch.float32, rows, width)
    assert_as_exact_as(with_pages(reference.norm_qkv), *args, ours=with_pages(kernels.norm_qkv)(*args))


def test_pages_may_have_another_dtype() -> None:
    args = list(arguments(KINDS["Qwen3"], torch.float32))
    args[7:9] = [pages.half() for pages in args[7:9]]
    ours = with_pages(kernels.norm_qkv, blocks=SMALL)(*args)
    assert_as_exact_as(with_pages(reference.norm_qkv), *args, ours=ours)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "wide values"])
def test_quantised_pages(name: str) -> None:
    """Codes may differ by one where a value lies between two; what they stand for is as exact as the reference's."""
    args = list(arguments(KINDS[name], torch.float32))
    scales = [draw(*args[7].shape[:3]).abs() for _ in "kv"]
    args[7:9] = [torch.randint(-127, 128, pages.shape, dtype=torch.int8, device=DEVICE) for pages in args[7:9]]
    _, *theirs = with_pages(reference.norm_qkv)(*args, *scales)
    _, *ours = with_pages(kernels.norm_qkv, blocks=SMALL)(*args, *scales)
    for codes, their_codes in zip(ours[:2], theirs[:2], strict=True):
        assert (codes.int() - their_codes.int()).abs().max() <= 1
    for scale, their_scale in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(scale, their_scale, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_dimension_that_is_not_rotated_keeps_infinity_to_itself() -> None:
    args = list(arguments(KINDS["part of a head rotated"], torch.float32))
    args[3] = torch.zeros(len(args[2]), device=DEVICE)
    args[3][8] = torch.inf  # of the first head, the first beyond the rotated ones
    q = with_pages(kernels.norm_qkv, blocks=SMALL)(*args)[0]
    assert q.isinf()[:, 0, 8].all()
    assert (~q.isfinite()).sum() == len(q)


def test_heads_of_nothing_are_refused() -> None:
    args = list(arguments(KINDS["Llama"], torch.float32))
    args[7:9] = [pages[..., :0].contiguous() for pages in args[7:9]]
    with pytest.raises(KernelError, match="there is nothing to write"):
        kernels.norm_qkv(*args)


def test_tickets_are_left_as_they_were() -> None:
    args = arguments(KINDS["Qwen3"], torch.float32, rows=17)
    tickets = torch.zeros(kernels.tickets_needed(17, 2, 1), dtype=torch.int32, device=DEVICE)
    first = with_pages(kernels.norm_qkv, tickets=tickets, blocks=SMALL)(*args)
    assert not tickets.any()
    for one, other in zip(first, with_pages(kernels.norm_qkv, tickets=tickets, blocks=SMALL)(*args), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(KernelError, match="tickets has 7 elements; 8 are needed"):
        kernels.norm_qkv(*args, tickets=tickets[:7], blocks=SMALL)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Cohere"])
def test_a_token_does_not_depend_on_its_company(name: str) -> None:
    hidden, *between, rotary, k_pages, v_pages, _ = arguments(KINDS[name], torch.float32, rows=3)
    slots = torch.arange(3, device=DEVICE)

    def run(rows: slice) -> Tensor:
        turned = Rotary(rotary.cos[rows], rotary.sin[rows], rotary.interleaved)
        q, k, v = with_pages(kernels.norm_qkv, blocks=SMALL)(
            hidden[rows], *between, turned, k_pages, v_pages, slots[rows]
        )
        return torch.cat([q.flatten(1), *(x.flatten(0, 1)[rows].flatten(1) for x in (k, v))], dim=1)

    assert_rows_do_not_depend_on_company(run, 3)


def test_rows_may_lie_apart() -> None:
    args = arguments(KINDS["Llama"], torch.float32)
    apart = torch.cat((args[0], args[0]), dim=1)[:, :48]
    assert not apart.is_contiguous()
    for one, other in zip(
        with_pages(kernels.norm_qkv)(*args), with_pages(kernels.norm_qkv)(apart, *args[1:]), strict=True
    ):
        assert torch.equal(one, other)


def test_no_tokens_are_fine() -> None:
    hidden, *between, rotary, k_pages, v_pages, slots = arguments(KINDS["Qwen3"], torch.float32)
    none = Rotary(rotary.cos[:0], rotary.sin[:0])
    assert kernels.norm_qkv(hidden[:0], *between, none, k_pages, v_pages, slots[:0]).shape == (0, 2, 32)


def test_what_does_not_fit_is_named() -> None:
    args = arguments(KINDS["Qwen3"], torch.float32)
    q_norm, rotary, k_pages = args[4], args[6], args[7]
    wrong: list[tuple[int, Any, str]] = [
        (0, args[0].double(), "hidden has dtype torch.float64"),
        (0, args[0][:, :40], "hidden has strides|weight has shape"),
        (1, args[1]._replace(kind="batch"), "norm.kind is 'batch'"),
        (2, args[2][:-1], "127 rows, of which 63 are left for q after 1 heads of k and v; expected a multiple of 32"),
        (3, draw(3), r"bias has shape \[3\]; expected \[128\]"),
        (4, None, "must both be given"),
        (4, q_norm._replace(kind="layer"), "q_norm is of kind layer and k_norm of kind rms"),
        (5, q_norm._replace(weight=draw(31)), r"k_norm.weight has shape \[31\]"),
        (6, rotary._replace(cos=rotary.cos.half()), "rotary.cos has dtype torch.float16"),
        (6, Rotary(draw(3, 17), draw(3, 17)), "rotary.cos is for 34 dimensions and heads have 32"),
        (7, k_pages[:, :, :, :16], "k_pages has strides"),
        (8, args[8].half(), "v_pages has dtype torch.float16"),
        (9, args[9][:2], r"slot_mapping has shape \[2\]; expected \[3\]"),
        (9, args[9].float(), "slot_mapping has dtype torch.float32"),
    ]
    for position, value, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.norm_qkv(*args[:position], value, *args[position + 1 :])
    with pytest.raises(KernelError, match="k_scales is given"):
        kernels.norm_qkv(*args, draw(*k_pages.shape[:3]))
