"""norm_qkv.py with weights of 8 and 4 bits: exact for every kind of head, however its rows lie in tiles and pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from handloom_kernels import norm_qkv as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import QuantizedWeight, Rotary
from kernel_testing import DEVICE, DTYPES, HALF, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw
from qkv_heads import Heads, arguments, with_pages

PAIRED = {"BLOCK_N": 32, "SLICES": 2, "num_warps": 2, "num_stages": 2}
APART = {**PAIRED, "BLOCK_N": 16}
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"kind": "int8"},
    "int4": {"kind": "int4", "group_size": 32},
    "int4 with zeros": {"kind": "int4", "group_size": 64, "symmetric": False},
    "fp8 by blocks": {"kind": "fp8", "group_size": 128, "scale_rows": 128},
}
KINDS = {
    "Llama": Heads(4, 2),
    "Qwen2": Heads(bias=True),
    "Qwen3": Heads(head_dim=64, v_head_dim=64, rotary_dim=64, norm="rms"),
    "Gemma 3, a tile that is not two": Heads(
        head_dim=48, v_head_dim=48, rotary_dim=48, norm="rms_unit_offset", kind="rms_unit_offset"
    ),
    "GPT-2": Heads(2, 2, rotary_dim=0, bias=True, kind="layer"),
    "Cohere": Heads(2, 2, interleaved=True, norm="layer", kind="layer"),
    "part of a head rotated": Heads(rotary_dim=8),
    "part of a head rotated in neighbours": Heads(rotary_dim=8, interleaved=True),
    "wide values": Heads(3, 1, head_dim=32, v_head_dim=96, rotary_dim=32),
    "narrow values": Heads(head_dim=48, v_head_dim=16, rotary_dim=16),
}


def quantized(name: str, form: str = "int8", dtype: torch.dtype = torch.float32, **size: int) -> list[Any]:
    args = list(arguments(KINDS[name], dtype, **size))
    args[2] = reference.quantize_weight(args[2], **FORMS[form])
    return args


def check_it(args: list[Any], **options: Any) -> None:
    ours = with_pages(kernels.quantized_norm_qkv, **options)(*args)
    assert_as_exact_as(with_pages(reference.quantized_norm_qkv), *args, ours=ours)


@pytest.mark.parametrize("blocks", [PAIRED, APART], ids=["tiles in pairs", "tiles apart"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_head(name: str, blocks: dict[str, int]) -> None:
    for dtype in DTYPES:
        check_it(quantized(name, dtype=dtype), blocks=blocks)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_every_form_of_weight(name: str, form: str) -> None:
    for dtype in DTYPES:
        check_it(quantized(name, form, dtype, width=160), blocks=PAIRED)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 63), (2, 1000)])
def test_odd_sizes_and_the_default_blocks(rows: int, width: int) -> None:
    check_it(quantized("Llama", "int4", HALF, rows=rows, width=width))
    check_it(quantized("Qwen3", "int8", HALF, rows=rows, width=width))


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "wide values"])
def test_quantised_pages(name: str) -> None:
    args = quantized(name)
    scales = [draw(*args[7].shape[:3]).abs() for _ in "kv"]
    args[7:9] = [torch.randint(-127, 128, pages.shape, dtype=torch.int8, device=DEVICE) for pages in args[7:9]]
    _, *theirs = with_pages(reference.quantized_norm_qkv)(*args, *scales)
    for blocks in (PAIRED, APART):
        _, *ours = with_pages(kernels.quantized_norm_qkv, blocks=blocks)(*args, *scales)
        for codes, their_codes in zip(ours[:2], theirs[:2], strict=True):
            assert (codes.int() - their_codes.int()).abs().max() <= 1
        for scale, their_scale in zip(ours[2:], theirs[2:], strict=True):
            torch.testing.assert_close(scale, their_scale, rtol=1e-5, atol=0)


def test_slots_of_no_token_are_left_alone() -> None:
    args = quantized("Llama")
    _, *pages = with_pages(kernels.quantized_norm_qkv, blocks=PAIRED)(*args)
    kept = torch.ones(args[7].shape[0] * 4, dtype=torch.bool, device=DEVICE)
    kept[args[9][args[9] >= 0]] = False
    for before, after in zip(args[7:9], pages, strict=True):
        assert torch.equal(before.flatten(0, 1)[kept], after.flatten(0, 1)[kept])


def test_tickets_are_left_as_they_were() -> None:
    args = quantized("Qwen3", rows=17)
    tickets = torch.zeros(kernels.tickets_needed(17, 2, 1), dtype=torch.int32, device=DEVICE)
    first = with_pages(kernels.quantized_norm_qkv, tickets=tickets, blocks=PAIRED)(*args)
    assert not tickets.any()
    again = with_pages(kernels.quantized_norm_qkv, tickets=tickets, blocks=PAIRED)(*args)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("blocks", [PAIRED, APART], ids=["tiles in pairs", "tiles apart"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_token_does_not_depend_on_its_company(name: str, blocks: dict[str, int]) -> None:
    hidden, *between, rotary, k_pages, v_pages, _ = quantized(name, "int4", rows=3)
    slots = torch.arange(3, device=DEVICE)

    def run(rows: slice) -> Tensor:
        turned = Rotary(rotary.cos[rows], rotary.sin[rows])
        q, k, v = with_pages(kernels.quantized_norm_qkv, blocks=blocks)(
            hidden[rows], *between, turned, k_pages, v_pages, slots[rows]
        )
        return torch.cat([q.flatten(1), *(x.flatten(0, 1)[rows].flatten(1) for x in (k, v))], dim=1)

    assert_rows_do_not_depend_on_company(run, 3)


def test_a_token_with_nan_does_not_touch_its_neighbours() -> None:
    args = quantized("Qwen3")
    args[9] = torch.arange(3, device=DEVICE)
    right = with_pages(kernels.quantized_norm_qkv, blocks=PAIRED)(*args)
    args[0] = args[0].clone()
    args[0][1] = torch.nan
    ours = with_pages(kernels.quantized_norm_qkv, blocks=PAIRED)(*args)
    assert ours[0][1].isnan().all()
    assert torch.equal(ours[0][::2], right[0][::2])
    for mine, other in zip(ours[1:], right[1:], strict=True):
        assert torch.equal(mine.flatten(0, 1)[[0, 2]], other.flatten(0, 1)[[0, 2]])


def test_rows_may_lie_apart_and_none_are_fine() -> None:
    args = quantized("Llama")
    apart = torch.cat((args[0], args[0]), dim=1)[:, :48]
    both = (with_pages(kernels.quantized_norm_qkv, blocks=PAIRED)(hidden, *args[1:]) for hidden in (args[0], apart))
    assert all(map(torch.equal, *both))
    none = Rotary(args[6].cos[:0], args[6].sin[:0])
    q = kernels.quantized_norm_qkv(args[0][:0], *args[1:6], none, *args[7:9], args[9][:0])
    assert q.shape == (0, 4, 32)


def test_what_does_not_fit_is_named() -> None:
    args = quantized("Llama")
    weight: QuantizedWeight = args[2]
    wrong: list[tuple[int, Any, str]] = [
        (0, args[0].double(), "hidden has dtype torch.float64"),
        (0, args[0][:, :40], r"hidden has shape \[3, 40\]; expected \[any, 48\]"),
        (1, args[1]._replace(weight=draw(47)), r"norm.weight has shape \[47\]; expected \[48\]"),
        (2, draw(256, 48), "q must be a QuantizedWeight, not Tensor"),
        (2, weight._replace(kind="int3"), "q.kind is 'int3'"),
        (2, weight._replace(scales=weight.scales[:, :-1]), "q.scales has shape"),
        (3, draw(3), r"bias has shape \[3\]; expected \[256\]"),
        (4, args[1], "q_norm and k_norm must both be given"),
        (9, args[9][:2], r"slot_mapping has shape \[2\]; expected \[3\]"),
    ]
    for position, value, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.quantized_norm_qkv(*args[:position], value, *args[position + 1 :])
    with pytest.raises(KernelError, match="BLOCK_N is 24; expected whole tiles of 16"):
        kernels.quantized_norm_qkv(*args, blocks={**PAIRED, "BLOCK_N": 24})
    odd = {
        Heads(head_dim=40, v_head_dim=32): "k_pages has heads of 40",
        Heads(v_head_dim=24): "v_pages has heads of 24; .* multiples of 16, whole tiles",
    }
    for heads, message in odd.items():
        given = list(arguments(heads, torch.float32))
        given[2] = reference.quantize_weight(given[2], "int8")
        with pytest.raises(KernelError, match=message):
            kernels.quantized_norm_qkv(*given)
