"""rope.py: exact, complete, writes the pages it is given and nothing else, and independent of the other tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

from handloom_kernels import reference
from handloom_kernels import rope as kernels
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import Norm, Rotary
from kernel_testing import (
    DEVICE,
    DTYPES,
    HALF,
    ON_GPU,
    assert_as_exact_as,
    assert_rows_do_not_depend_on_company,
    draw,
    in_float64,
)

QUANTISED = [torch.int8] + [torch.float8_e4m3fn] * ON_GPU
PAGES, PAGE_SIZE = 3, 4


def rotary_of(num_tokens: int, rotary_dim: int, interleaved: bool = False, factor: float = 1.0) -> Rotary:
    angles = torch.rand(num_tokens, rotary_dim // 2).to(DEVICE) * 100
    return Rotary(angles.cos() * factor, angles.sin() * factor, interleaved)


def norm_of(kind: str | None, head_dim: int, dtype: torch.dtype, eps: float = 1e-5) -> Norm | None:
    return None if kind is None else Norm(kind, 1 + draw(head_dim, dtype=dtype, scale=0.3), None, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(2, 2), (16, 16), (64, 16), (80, 80), (80, 20), (96, 96), (112, 112), (128, 64), (256, 256), (6, 0)],
)
def test_rotate(head_dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    x, rotary = draw(2, 5, head_dim, dtype=dtype), rotary_of(2, rotary_dim, interleaved, factor=1.3)
    assert_as_exact_as(reference.rotate, x, rotary, ours=kernels.rotate(x, rotary, blocks=few_heads(2)))


def few_heads(heads: int) -> dict[str, int]:
    return {"Q_HEADS": heads, "KV_HEADS": heads, "num_warps": 1}


def test_interleaved_rotation_is_that_of_transformers() -> None:
    x, rotary = draw(7, 3, 40), rotary_of(7, 40, interleaved=True)
    cos, sin = (t.repeat_interleave(2, dim=-1)[None] for t in (rotary.cos, rotary.sin))
    theirs = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)
    assert torch.equal(reference.rotate(x, rotary), theirs)
    assert (kernels.rotate(x, rotary) - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_tokens_and_heads_may_lie_apart() -> None:
    x, rotary = draw(3, 4, 3, 48), rotary_of(3, 20)
    assert torch.equal(kernels.rotate(x[:, :, 1, 8:40], rotary), kernels.rotate(x[:, :, 1, 8:40].contiguous(), rotary))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_rotated_passes_through_untouched() -> None:
    x = draw(2, 3, 32)
    x[0, 0, 20] = torch.inf
    x[1, 2, 31] = torch.nan
    for interleaved in (False, True):
        ours = kernels.rotate(x, rotary_of(2, 16, interleaved))
        assert torch.isfinite(ours[..., :16]).all()
        assert torch.equal(ours[..., 16:].nan_to_num(nan=7.0), x[..., 16:].nan_to_num(nan=7.0))


class Step:
    """Arguments of qk_norm_rope_write, by default of 4 tokens, one of which has no slot, 5 and 3 heads."""

    def __init__(
        self,
        head_dim: int = 16,
        v_head_dim: int | None = None,
        *,
        num_heads: int = 5,
        num_kv_heads: int = 3,
        kind: str | None = None,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        dtype: torch.dtype = torch.float32,
        pages: torch.dtype | None = None,
        slots: tuple[int, ...] = (9, -1, 0, 7),
    ) -> None:
        v_head_dim, count = v_head_dim or head_dim, len(slots)
        self.qkv = draw(count, num_heads * head_dim + num_kv_heads * (head_dim + v_head_dim), dtype=dtype, scale=2)
        self.num_heads = num_heads
        self.norms = norm_of(kind, head_dim, dtype), norm_of(kind, head_dim, dtype, 0.1)
        self.rotary = None if rotary_dim is None else rotary_of(count, rotary_dim, interleaved)
        self.pages = [
            draw(PAGES, PAGE_SIZE, num_kv_heads, d, scale=20).to(pages or dtype) for d in (head_dim, v_head_dim)
        ]
        self.scales: list[Tensor] = []
        if pages in QUANTISED:
            self.scales = [draw(PAGES, PAGE_SIZE, num_kv_heads) for _ in "kv"]
        self.slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)

    def arguments(self) -> tuple[Any, ...]:
        pages, scales = ([x.clone() for x in tensors] for tensors in (self.pages, self.scales))
        return (self.qkv, self.num_heads, *self.norms, self.rotary, *pages, self.slots, *scales)

    def ours(self, **options: Any) -> list[Tensor]:
        """q, then the pages and scales as they are after the write."""
        arguments = self.arguments()
        q = kernels.qk_norm_rope_write(*arguments, **options)
        return [q, *arguments[5:7], *arguments[8:]]


def theirs(*arguments: Any) -> list[Tensor]:
    """The reference on copies, as in Step.ours."""
    pages, scales = ([x.clone() for x in tensors] for tensors in (arguments[5:7], arguments[8:]))
    q = reference.qk_norm_rope_write(*arguments[:5], *pages, arguments[7], *scales)
    return [q, *pages, *scales]


def check(step: Step, **options: Any) -> None:
    ours = step.ours(**options)
    assert_as_exact_as(theirs, *step.arguments(), ours=ours)
    written = step.slots[step.slots >= 0]
    for before, after in zip(step.pages, ours[1:3], strict=True):
        unchanged = torch.ones(PAGES * PAGE_SIZE, dtype=torch.bool, device=DEVICE)
        unchanged[written] = False
        assert torch.equal(after.flatten(0, 1)[unchanged], before.flatten(0, 1)[unchanged])
        assert not torch.equal(after.flatten(0, 1)[~unchanged], before.flatten(0, 1)[~unchanged])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", [None, "rms", "rms_unit_offset", "layer"])
def test_norm_rotation_and_write(kind: str | None, interleaved: bool, dtype: torch.dtype) -> None:
    check(Step(20, kind=kind, rotary_dim=20, interleaved=interleaved, dtype=dtype))
    check(Step(20, kind=kind, rotary_dim=12, interleaved=interleaved, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
def test_without_rotation(kind: str | None, dtype: torch.dtype) -> None:
    check(Step(20, kind=kind, dtype=dtype))
    check(Step(2, kind=kind, dtype=dtype))


@pytest.mark.parametrize("kind", [None, "rms"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
def test_real_head_dims(head_dim: int, kind: str | None) -> None:
    check(Step(head_dim, kind=kind, rotary_dim=head_dim, slots=(5,), dtype=HALF))


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(48, 32), (12, 40)])
def test_values_may_be_of_another_width(head_dim: int, v_head_dim: int) -> None:
    check(Step(head_dim, v_head_dim, kind="rms", rotary_dim=8))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (8, 1), (4, 4), (9, 3)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_number_of_heads_and_of_heads_a_program(num_heads: int, num_kv_heads: int, heads: int) -> None:
    step = Step(8, num_heads=num_heads, num_kv_heads=num_kv_heads, kind="rms", rotary_dim=8, slots=(3, 11))
    check(step, blocks=few_heads(heads))


@pytest.mark.parametrize("norm", ["q", "k"])
def test_only_q_or_only_k_may_be_normalised(norm: str) -> None:
    step = Step(kind="rms", rotary_dim=16)
    step.norms = (step.norms[0], None) if norm == "q" else (None, step.norms[1])
    check(step)


@pytest.mark.parametrize("pages", [torch.float16, torch.float32, HALF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_of_another_dtype(dtype: torch.dtype, pages: torch.dtype) -> None:
    check(Step(kind="rms", rotary_dim=16, dtype=dtype, pages=pages))


@pytest.mark.parametrize("pages", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(20, False), (20, True), (8, False), (None, False)])
def test_quantised_pages(rotary_dim: int | None, interleaved: bool, dtype: torch.dtype, pages: torch.dtype) -> None:
    step = Step(20, 36, kind="rms", rotary_dim=rotary_dim, interleaved=interleaved, dtype=dtype, pages=pages)
    step.qkv[2, -36:] = 0
    ours, plain = step.ours(), theirs(*step.arguments())
    assert torch.equal(ours[2].float(), plain[2].float()), "codes of v, which nothing was done to"
    assert torch.equal(ours[4], plain[4]), "scales of v"
    assert ours[4].view(-1, 3)[0, 2] == 0
    assert not ours[2].view(-1, 3, 36)[0, 2].float().any()
    plain_step = Step(20, 36)
    plain_step.__dict__.update(step.__dict__, scales=[], pages=[x.double() for x in step.pages])
    kept = step.slots[step.slots >= 0]
    exact = theirs(*map(in_float64, plain_step.arguments()))[1].flatten(0, 1)[kept]
    codes, scales = (x.flatten(0, 1)[kept].double() for x in (ours[1], ours[3]))
    largest = exact.abs().amax(-1, keepdim=True)
    rounding = largest / 254 if pages == torch.int8 else exact.abs() / 16 + largest / 448 / 1024
    allowed = rounding + 8 * torch.finfo(dtype).eps * largest
    assert ((codes * scales[..., None] - exact).abs() <= allowed).all()
    unchanged = torch.ones(PAGES * PAGE_SIZE, dtype=torch.bool, device=DEVICE)
    unchanged[kept] = False
    for before, after in zip((*step.pages, *step.scales), ours[1:], strict=True):
        assert torch.equal(after.flatten(0, 1)[unchanged].float(), before.flatten(0, 1)[unchanged].float())


@pytest.mark.parametrize("pages", QUANTISED, ids=str)
def test_codes_round_to_the_nearest_and_ties_to_even(pages: torch.dtype) -> None:
    step = Step(8, num_heads=1, num_kv_heads=1, pages=pages, slots=(0,))
    limit = reference.pages.largest_code(pages)
    step.qkv[0] = torch.tensor([0.0] * 8 + [limit, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49, -3.51] + [1e-44, *[0.0] * 7])
    codes = torch.tensor([limit, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49, -3.51])
    ours = step.ours()
    expected = codes.round() if pages == torch.int8 else codes.to(pages).float()
    assert ours[1][0, 0, 0].float().tolist() == expected.tolist()
    assert ours[3][0, 0, 0] == 1
    assert ours[2][0, 0, 0].float().abs().max() <= limit


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("pages", [None, *QUANTISED], ids=str)
def test_nan_and_infinity_are_not_hidden_by_codes(pages: torch.dtype | None) -> None:
    step = Step(8, num_heads=1, num_kv_heads=2, pages=pages, slots=(0, 1))
    step.qkv[0, 10] = torch.nan
    step.qkv[1, 26] = torch.inf
    ours = step.ours()
    values = [x.float().view(-1, 2, 8) for x in ours[1:3]]
    if pages is not None:
        values = [x * scales.view(-1, 2, 1) for x, scales in zip(values, ours[3:], strict=True)]
    assert values[0][0, 0].isnan().any()
    assert torch.isfinite(values[0][0, 1]).all()
    assert not torch.isfinite(values[1][1, 0]).all()


def test_a_token_does_not_depend_on_its_company() -> None:
    whole = Step(24, 40, kind="layer", rotary_dim=16, pages=torch.int8, slots=(9, 1, 0, 7, 3))

    def run(rows: slice) -> Tensor:
        part = Step(24, 40, slots=(0,))
        part.__dict__.update(whole.__dict__)
        part.qkv, part.slots = whole.qkv[rows], whole.slots[rows]
        assert whole.rotary is not None
        part.rotary = Rotary(whole.rotary.cos[rows], whole.rotary.sin[rows])
        q, *written = part.ours()
        return torch.cat((q.flatten(1), *(x.flatten(0, 1)[part.slots].flatten(1).float() for x in written)), dim=1)

    assert_rows_do_not_depend_on_company(run, 5)


def test_rows_of_qkv_may_lie_apart_and_slots_be_int32() -> None:
    step = Step(kind="rms", rotary_dim=16)
    expected = step.ours()
    wide = draw(4, step.qkv.shape[1] + 40)
    wide[:, 8:-32] = step.qkv
    step.qkv, step.slots = wide[:, 8:-32], step.slots.int()
    assert all(map(torch.equal, step.ours(), expected))


def test_no_tokens_are_fine() -> None:
    assert Step(rotary_dim=16, slots=()).ours()[0].shape == (0, 5, 16)
    assert kernels.rotate(draw(0, 3, 16), rotary_of(0, 16)).shape == (0, 3, 16)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda x: x[:, :-1], r"qkv has shape \[4, 175\]; expected \[any, 176\]"),
        (0, lambda x: x.double(), "qkv has dtype torch.float64"),
        (1, lambda x: 0, "0 query heads"),
        (2, lambda x: x._replace(bias=x.weight), "q_norm.bias is given"),
        (3, lambda x: x._replace(kind="batch"), "k_norm.kind is 'batch'"),
        (3, lambda x: x._replace(weight=draw(8)), r"k_norm.weight has shape \[8\]"),
        (4, lambda x: x._replace(cos=x.cos[:3]), "rotary.cos has shape"),
        (4, lambda x: x._replace(sin=x.sin[:, :3]), "rotary.sin has shape"),
        (4, lambda x: rotary_of(4, 18), "rotary.cos is for 18 dimensions and heads have 16"),
        (5, lambda x: x.transpose(1, 2), "k_pages has strides"),
        (5, lambda x: x[..., :15].contiguous(), "heads have 15 dimensions"),
        (6, lambda x: x[1:], "v_pages has shape"),
        (6, lambda x: x.half(), "v_pages has dtype torch.float16"),
        (7, lambda x: x[1:], "slot_mapping has shape"),
        (7, lambda x: x.float(), "slot_mapping has dtype"),
    ],
)
def test_what_does_not_fit_is_named(at: int, change: Any, message: str) -> None:
    arguments = list(Step(kind="rms", rotary_dim=16).arguments())
    arguments[at] = change(arguments[at])
    with pytest.raises(KernelError, match=message):
        kernels.qk_norm_rope_write(*arguments)


def test_scales_go_with_quantised_pages_and_with_no_others() -> None:
    plain, quantised = Step().arguments(), Step(pages=torch.int8).arguments()
    with pytest.raises(KernelError, match="k_scales is given, and the pages have dtype"):
        kernels.qk_norm_rope_write(*plain, *quantised[8:])
    with pytest.raises(KernelError, match="v_scales is missing"):
        kernels.qk_norm_rope_write(*quantised[:9])
    with pytest.raises(KernelError, match="v_scales has shape"):
        kernels.qk_norm_rope_write(*quantised[:9], quantised[9][1:])
