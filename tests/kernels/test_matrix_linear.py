"""Products with bfloat16 weights by the matrix units: as exact as without; a row's bits depend on that row alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handloom.ops import choose_backend, cpu
from handloom.ops.cpu import matrix_units
from handloom.ops.panels import Panels
from handloom_kernels.reference import Norm

pytestmark = pytest.mark.skipif(not matrix_units.usable(), reason="this processor or system has no AMX")

SHAPES = [(576, 640), (1536, 100), (700, 333), (63, 70), (64, 32), (33, 33), (8192, 32)]


def product(x: Tensor, weight: Panels) -> Tensor:
    return cpu.linear_residual(x, weight, None, None, torch.zeros(len(x), weight.shape[0]))


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize(("depth", "width"), SHAPES)
def test_it_is_as_exact_as_without_matrix_units(depth: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(depth)
    x, weight = torch.randn(70, depth), bfloat16(width, depth)
    panels, exact = Panels.pack(weight), x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T
    ours = product(x, panels).double() - exact
    monkeypatch.setattr(matrix_units, "usable", lambda: False)
    theirs = product(x, panels).double() - exact
    assert theirs.norm() > 0
    assert not torch.equal(ours, theirs), "both went the same way"
    assert ours.norm() <= theirs.norm()
    assert (ours.abs() / bound).max() <= 2e-7


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("depth", "width"), [(576, 200), (700, 333), (63, 33), (1, 5)])
def test_a_row_gets_the_same_bits_in_any_company(
    depth: int, width: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(700, depth), Panels.pack(bfloat16(width, depth))
    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: 1)
    whole = product(x, weight)
    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: threads)
    for count in [*range(1, 34), 48, 63, 64, 65, 257, 512, 700]:
        assert torch.equal(product(x[:count], weight), whole[:count]), count
    for first in (1, 15, 16, 31, 300, 699):
        assert torch.equal(product(x[first:], weight), whole[first:]), first


@pytest.mark.parametrize("exponents", [(-149, -60), (-30, 30), (60, 127)])
def test_one_row_by_vectors_has_the_bits_of_the_matrix_units_for_numbers_of_any_size(
    exponents: tuple[int, int],
) -> None:
    """Sums that are subnormal, cancel or overflow; in blocks of any number of tiles, the last of them not full."""
    torch.manual_seed(0)
    for depth in (32, 40, 320, 333, 960):
        x, weight = (torch.randn(40, depth) * 2.0 ** torch.randint(*exponents, (40, depth)) for _ in range(2))
        panels = Panels.pack(weight.bfloat16())
        together, alone = product(x, panels), torch.cat([product(row[None], panels) for row in x])
        assert torch.equal(alone.isnan(), together.isnan())
        numbers = ~together.isnan()
        assert torch.equal(alone[numbers].view(torch.int32), together[numbers].view(torch.int32)), depth


def test_the_pieces_of_a_number_are_all_of_it() -> None:
    """Times one, in any column, each float32 comes back; below 2^-110 the lower of its bits are lost."""
    torch.manual_seed(0)
    x = torch.randn(40, 96) * 2.0 ** torch.randint(-100, 120, (40, 96))
    x[3, :4] = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 0.0, 1.0])
    x[7, :3] = torch.tensor([1 + 2**-23, 2.0 - 2**-23, 2.0**-126])
    for first in (0, 32):
        unit = torch.zeros(64, 96)
        unit[range(64), range(first, first + 64)] = 1.0
        assert torch.equal(product(x, Panels.pack(unit.bfloat16())), x[:, first : first + 64])


def test_of_numbers_too_small_to_be_normal_no_more_is_lost_than_they_are() -> None:
    tiny = torch.finfo(torch.float32).tiny
    x, weight = torch.full((3, 64), 2.0**-140), torch.full((32, 64), 2.0**-130)
    assert (product(x, Panels.pack(torch.ones(32, 64).bfloat16())).abs() <= 64 * tiny).all()
    assert (product(torch.ones(3, 64), Panels.pack(weight.bfloat16())).abs() <= 64 * tiny).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(bad: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 100), bfloat16(70, 100)
    clean = product(x, Panels.pack(weight))
    x[[2, 17, 33], [5, 31, 99]] = bad
    x[20, 4] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # a NaN by its lowest bit alone
    out, plain = product(x, Panels.pack(weight)), x @ weight.float().T
    spoilt = torch.tensor([2, 17, 20, 33])
    assert not out[spoilt].isfinite().any()
    assert torch.equal(out.isnan(), plain.isnan())
    assert torch.equal(out[out.isinf()], plain[plain.isinf()])
    rest = [row for row in range(40) if row not in spoilt]
    assert torch.equal(out[rest], clean[rest])
    weight[3, 7] = bad
    assert not product(x, Panels.pack(weight))[:, 3].isfinite().any()


def test_bias_softcap_and_residual_are_those_of_other_weights() -> None:
    torch.manual_seed(0)
    x, weight, bias, residual = torch.randn(37, 96), bfloat16(70, 96), torch.randn(70), torch.randn(37, 70)
    with_both = cpu.linear_residual(x, weight, bias, None, residual)
    assert torch.equal(with_both, (product(x, Panels.pack(weight)) + bias) + residual)
    norm = Norm("rms", torch.randn(96), None, 1e-5)
    capped, wide = (cpu.lm_head(x, norm, held, 3.0) for held in (weight, weight.float()))
    assert (capped - wide).abs().max() < 1e-5
    assert capped.abs().max() <= 3


def test_the_backend_says_which_way_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert "AMX for weights in bfloat16 and in fewer bits" in str(choose_backend(device))
    monkeypatch.setattr(matrix_units, "usable", lambda: False)
    assert "AMX" not in str(choose_backend(device))
