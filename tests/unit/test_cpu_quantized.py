"""The CPU's kernels on quantised weights: made floats, bit for bit what they compute on the floats of the codes; as
whole numbers, in matrix units (AMX) or in vectors (VNNI), as near to float64 as that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Storage
from torch import Tensor

import handloom as hl
from gguf_files import MIXED, QUANTIZABLE, WIDE, export, random_matrix
from handloom.checkpoint.gguf_dequant import take_apart
from handloom.checkpoint.quantization import FORMATS, QuantizedMatrix, QuantizedRows
from handloom.checkpoint.quantize import Scheme, quantize_rows
from handloom.errors import CheckpointError
from handloom.ops import cpu
from handloom.ops.cpu import blocks, matrix_units
from tiny_models import ragged_prompts, save, tiny_gemma3, tiny_gpt2, tiny_llama

SCHEMES = ["int8", "int8:32", "int8:64", "int8:128", "int4", "int4:64", "int4:128", "int4-sym"]
ROWS = [1, 2, 3, 7, 8, 14, 31, 70]


def rows_in(name: str, rows: int, columns: int) -> QuantizedRows:
    """Random rows in a format of GGUF's, or quantised by a scheme."""
    if name in FORMATS:
        out = QuantizedRows.empty(FORMATS[name], rows, columns)
        take_apart(Storage[name], bytearray(random_matrix(name, rows, columns, seed=rows).tobytes()), out)
        return out
    out = QuantizedRows.empty(Scheme.parse(name).format, rows, columns)
    quantize_rows(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)), out)
    return out


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are made floats, whatever else the processor could do."""
    monkeypatch.setattr(blocks, "has_whole_numbers", lambda: False)


needs_whole_numbers = pytest.mark.skipif(not blocks.has_whole_numbers(), reason="neither AMX nor VNNI here")


def stacked(*formats: str, rows: int, columns: int) -> QuantizedMatrix:
    return QuantizedMatrix([rows_in(name, rows + i, columns) for i, name in enumerate(formats)])


def product(x: Tensor, weight: Any) -> Tensor:
    out: Tensor = cpu.linear_residual(x, weight, None, None, torch.zeros(len(x), weight.shape[0]))
    return out


SPECIAL = (0.0, -0.0, 1e-45, 6e-8, -6e-8, 1e-7, 65504.0, -3.5, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [*SCHEMES, "int4-sym:64", "int4-sym:128"])
def test_compiled_codes_are_those_of_the_formulas_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    source, format = torch.Generator().manual_seed(len(name)), Scheme.parse(name).format
    for rows, columns in ((1, 128), (301, 384), (7, 640)):
        weights = torch.randn(rows, columns, generator=source) * 10 ** torch.randn(rows, 1, generator=source)
        weights[:, ::7] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (rows, 1), generator=source)]
        weights[rows // 3, : columns // 2] = 0.0
        wanted = QuantizedRows.empty(format, rows, columns)
        guarded = {name: torch.full((plane.nbytes + 128,), 0xA5, dtype=torch.uint8) for name, plane in wanted.planes()}
        got = wanted.with_planes(
            {name: guarded[name][64:-64].view(plane.dtype).view(plane.shape) for name, plane in wanted.planes()}
        )
        quantize_rows(weights.to(dtype), wanted)
        cpu.quantize_rows(weights.to(dtype), got)
        for (plane, one), (_, other) in zip(wanted.planes(), got.planes(), strict=True):
            assert torch.equal(one, other), plane
            assert (torch.cat((guarded[plane][:64], guarded[plane][-64:])) == 0xA5).all(), plane


@pytest.mark.parametrize("columns", [1, 15, 37, 576])
def test_compiled_codes_of_rows_of_any_length(columns: int) -> None:
    weights = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns))
    wanted, got = (QuantizedRows.empty(Scheme.parse("int8").format, 9, columns) for _ in range(2))
    quantize_rows(weights, wanted)
    cpu.quantize_rows(weights.T.contiguous().T, got)  # however they lie
    assert torch.equal(wanted.low, got.low)
    assert torch.equal(wanted.scale, got.scale)


@pytest.mark.parametrize("name", [*SCHEMES, "int4-sym:64"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e8])
def test_weights_that_cannot_be_quantised_are_an_error_of_compiled_code_too(name: str, bad: float) -> None:
    weights = torch.ones(40, 256)
    weights[37, 255] = bad
    out = QuantizedRows.empty(Scheme.parse(name).format, 40, 256)
    if name == "int8" and bad == 1e8:
        cpu.quantize_rows(weights, out)  # its scale is a float32
        return
    with pytest.raises(CheckpointError, match="NaN, infinite or too large"):
        cpu.quantize_rows(weights, out)


def shapes() -> Iterator[Any]:
    for name in [*FORMATS, *SCHEMES]:
        wide = name.endswith("_K")
        for rows, columns in ((1, 256), (33, 512), (100, 768)) if wide else ((1, 128), (33, 640), (100, 384)):
            yield pytest.param(name, rows, columns, id=f"{name}-{rows}x{columns}")
    yield from (
        pytest.param("int8", rows, columns, id=f"int8-{rows}x{columns}") for rows, columns in ((5, 1), (40, 75))
    )
    yield from (pytest.param(name, 37, 96, id=f"{name}-37x96") for name in ("Q4_0", "Q5_1", "Q8_0", "int4"))


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize(("name", "rows", "columns"), list(shapes()))
def test_a_product_is_bit_for_bit_that_of_the_floats(name: str, rows: int, columns: int) -> None:
    held = stacked(name, rows=rows, columns=columns)
    x = torch.randn(max(ROWS), columns, generator=torch.Generator().manual_seed(1))
    packed, floats = cpu.hold(held), cpu.hold(held.matrix())
    for count in ROWS:
        assert torch.equal(product(x[:count], packed), product(x[:count], floats)), count
    exact = x.double() @ held.matrix().double().T
    bound = x.double().abs() @ held.matrix().double().abs().T
    assert ((product(x, packed).double() - exact).abs() <= 3e-7 * bound).all()


def unlike_rows(count: int, columns: int) -> Tensor:
    """Rows of ordinary numbers, with one that is far larger than all others, and of very large and very small ones."""
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(columns))
    x[1::4, 5] *= 1000
    x[2::4] *= 1e-30
    x[3::4] *= 10 ** torch.randn(1, columns, generator=torch.Generator().manual_seed(3))
    x[-1] = 0.0
    return x


def errors(got: Tensor, exact: Tensor) -> Tensor:
    """Of each row, relative to its norm."""
    return (got.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-300)


IN_WHOLE_NUMBERS = ["int8", "int8:32", "int8:128", "int4", "int4:128", "int4-sym:64", *FORMATS]


@needs_whole_numbers
@pytest.mark.parametrize("name", IN_WHOLE_NUMBERS)
@pytest.mark.parametrize(("rows", "columns"), [(33, 64), (200, 768), (37, 2304), (40, 8192)])
def test_whole_numbers_are_as_near_to_float64_as_floats(
    name: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = max(columns, 256)
    held = stacked(name, rows=rows, columns=columns)
    x = unlike_rows(40, columns)
    exact = x.double() @ held.matrix().double().T
    packed = cpu.hold(held)
    own = errors(product(x, packed), exact)
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "has_whole_numbers", lambda: False)
        theirs = errors(product(x, packed), exact)
    assert own.max() <= (2e-7 if name == "int8" and matrix_units.usable() else theirs.max())
    assert own.mean() <= theirs.mean()
    for kind in range(4):
        assert own[kind::4].max() <= 2 * theirs[kind::4].max(), kind


@needs_whole_numbers
def test_whole_numbers_are_multiplied_without_any_error() -> None:
    """Codes and rows whose sums a float32 holds."""
    weights = torch.randint(-127, 128, (70, 640), generator=torch.Generator().manual_seed(1)).float()
    weights[:, 0] = 127.0  # so the scale of each row is 1
    packed = QuantizedRows.empty(Scheme.parse("int8").format, 70, 640)
    quantize_rows(weights, packed)
    held = QuantizedMatrix([packed])
    assert torch.equal(held.matrix(), weights)
    x = torch.randint(-100, 101, (19, 640), generator=torch.Generator().manual_seed(2)).float() / 64
    assert torch.equal(product(x, cpu.hold(held)).double(), x.double() @ weights.double().T)


@needs_whole_numbers
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("name", list(FORMATS))
def test_no_sum_of_the_largest_codes_scales_and_rows_overflows(name: str, ones: bool) -> None:
    rows = QuantizedRows.empty(FORMATS[name], 40, 2048)
    for plane, held in rows.planes():
        if held.dtype == torch.float16:
            held.fill_(1.0)
        else:
            largest = 63 if rows.format.minimum == "super" else -128
            held.fill_(largest if plane in ("scale", "minimum") else -128 if held.dtype == torch.int8 else 255 * ones)
    held = QuantizedMatrix([rows])
    x = torch.full((9, 2048), 127 * 0x010101 / 2**23)
    x[1::2] = -128 * 0x010101 / 2**23
    exact = x.double() @ held.matrix().double().T
    bound = x.double().abs() @ held.matrix().double().abs().T * (2048 / 64 + 4) * 2**-24  # all blocks round alike
    for count in (1, 9):
        assert ((product(x[:count], cpu.hold(held)).double() - exact[:count]).abs() <= bound[:count]).all()


@pytest.mark.parametrize("name", ["int8", "int4", "Q8_0", "Q6_K"])
def test_a_row_that_is_not_finite_gives_nothing_finite_and_leaves_others_alone(name: str) -> None:
    packed, x = cpu.hold(stacked(name, rows=40, columns=256)), unlike_rows(9, 256)
    alone = product(x, packed)
    x[2, 100], x[5, 7] = torch.nan, torch.inf
    together = product(x, packed)
    assert not together[[2, 5]].isfinite().any()
    others = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(together[others], alone[others])


@pytest.mark.parametrize("name", [*FORMATS, *SCHEMES])
def test_a_row_alone_gives_the_bits_that_it_gives_among_others(name: str) -> None:
    packed = cpu.hold(stacked(name, rows=70, columns=512))
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(2))
    together = product(x, packed)
    for row in (0, 17, 39):
        assert torch.equal(product(x[row : row + 1], packed)[0], together[row])
    many = product(x.repeat(8, 1)[:300], packed)
    for first, count in ((0, 2), (3, 4), (5, 5), (9, 8), (20, 9)):
        assert torch.equal(product(x[first : first + count], packed), together[first : first + count])
    assert torch.equal(many[280:300], together[:20])


@needs_whole_numbers
@pytest.mark.parametrize("name", ["int8", "int8:64", "int4", "int4-sym:64", "Q4_0", "Q4_1", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_of_whole_numbers_gets_the_same_bits_in_any_company(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = 256 if name.endswith("K") else 192
    packed, x = cpu.hold(stacked(name, rows=300, columns=columns)), torch.randn(700, columns)
    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: 1)
    whole = product(x, packed)
    monkeypatch.setattr("handloom.ops.cpu.machine.usable_threads", lambda: threads)
    for count in [*range(1, 18), 24, 63, 64, 65, 264, 265, 529, 700]:
        assert torch.equal(product(x[:count], packed), whole[:count]), count
    for first in (1, 3, 4, 7, 8, 300, 699):
        assert torch.equal(product(x[first:], packed), whole[first:]), first


@pytest.mark.parametrize("name", [*FORMATS, *SCHEMES])
def test_panels_lose_nothing(name: str) -> None:
    held = stacked(name, rows=45, columns=256)
    packed = cpu.hold(held)
    back = packed.unpack().segments[0]
    for (plane, before), (same, after) in zip(held.segments[0].planes(), back.planes(), strict=True):
        assert plane == same
        assert before.dtype == after.dtype
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))
    some = torch.tensor([44, 0, 31, 32])
    assert torch.equal(packed[some], held.matrix()[some])


@pytest.mark.usefixtures("floats")
def test_stacked_formats_are_one_weight() -> None:
    held = stacked("Q4_K", "Q6_K", "Q8_0", rows=37, columns=256)
    x, bias = torch.randn(5, 256), torch.randn(held.shape[0])
    residual = torch.randn(5, held.shape[0])
    got = cpu.linear_residual(x, cpu.hold(held), bias, None, residual)
    assert torch.equal(got, cpu.linear_residual(x, cpu.hold(held.matrix()), bias, None, residual))


# Whole models ----------------------------------------------------------------------------------


def logits(lm: hl.LM, prompts: list[list[int]]) -> Tensor:
    return lm.step([lm.sequence(prompt) for prompt in prompts])


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("storage", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "mixed"])
def test_a_kept_gguf_file_computes_as_its_floats_do(tmp_path: Path, storage: str) -> None:
    if storage == "mixed":
        path = export(tiny_llama(**WIDE), tmp_path / "x.gguf", storages=MIXED)
    else:
        path = export(tiny_gemma3(**QUANTIZABLE), tmp_path / "x.gguf", Storage[storage])
    kept, floats = hl.LM.from_pretrained(path), hl.LM.from_pretrained(path, dtype="float32")
    assert kept.backend.name == "cpu"
    assert set(kept.held) == ({s.name for s in MIXED.values()} if storage == "mixed" else {storage}) | {"float32"}
    prompts = ragged_prompts(3, (11, 40, 1))
    assert torch.equal(logits(kept, prompts), logits(floats, prompts))
    alone = torch.cat([logits(kept, [prompt]) for prompt in prompts])
    assert torch.equal(alone, logits(kept, prompts))
    for prompt in prompts:
        assert kept.generate(prompt, max_new_tokens=8).token_ids == floats.generate(prompt, max_new_tokens=8).token_ids


@needs_whole_numbers
@pytest.mark.parametrize("held", ["int8", "int4", "gguf"])
def test_logits_of_whole_numbers_depend_on_their_sequence_alone(tmp_path: Path, held: str) -> None:
    if held == "gguf":
        lm = hl.LM.from_pretrained(export(tiny_llama(**WIDE), tmp_path / "x.gguf", storages=MIXED))
    else:
        lm = hl.LM.from_pretrained(save(tiny_llama(**WIDE), tmp_path / "model"), quantize=held)
    prompts = ragged_prompts(3, (11, 40, 1))
    together = logits(lm, prompts)
    assert torch.equal(torch.cat([logits(lm, [prompt]) for prompt in prompts]), together)
    sequence = lm.sequence(prompts[1][:1])
    for token in prompts[1][1:]:
        sequence.append(token)
        assert sequence.logits.isfinite().all()
    assert torch.equal(sequence.logits, together[1])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_gemma3], ids=["llama", "gpt2", "gemma3"])
def test_a_quantised_checkpoint_computes_as_torch_does_in_float64(tmp_path: Path, make: Any, scheme: str) -> None:
    path = save(make(**({"n_embd": 64} if make is tiny_gpt2 else QUANTIZABLE)), tmp_path / "model")
    lm = hl.LM.from_pretrained(path, quantize=scheme)
    exact = hl.LM.from_pretrained(path, quantize=scheme, backend="torch")
    weights = {
        name: (w.matrix() if isinstance(w, QuantizedMatrix) else w).double()
        for name, w in exact.transformer.weights.items()
    }
    pool = type(exact.pool)(exact.spec, 64, 16, dtype=torch.float64, device=exact.device)
    exact = hl.LM(type(exact.transformer)(exact.spec, weights, exact.backend), exact.tokenizer, pool, name="exact")
    prompt = ragged_prompts(5, (30,))[0]
    ours, theirs = lm.sequence(prompt).logits, exact.sequence(prompt).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert lm.generate(prompt, max_new_tokens=12).token_ids == exact.generate(prompt, max_new_tokens=12).token_ids


def test_a_kept_model_is_held_in_the_bytes_of_its_file(tmp_path: Path) -> None:
    path = export(
        tiny_llama(**WIDE | {"num_key_value_heads": 4, "intermediate_size": 512}), tmp_path / "x.gguf", storages=MIXED
    )
    tensors = sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors)
    assert sum(hl.LM.from_pretrained(path).held.values()) < 1.04 * tensors


def test_hooks_and_fingerprints_see_the_floats(tmp_path: Path) -> None:
    path = export(tiny_llama(**QUANTIZABLE), tmp_path / "x.gguf", Storage.Q4_1)
    kept, floats = hl.LM.from_pretrained(path), hl.LM.from_pretrained(path, dtype="float32")
    prompt, point = ragged_prompts(5, (9,))[0], "blocks.1.attn.hook_q"
    with kept.capture(point) as acts, floats.capture(point) as expected:
        kept.score(prompt)
        floats.score(prompt)
    assert torch.equal(acts[point], expected[point])
    for name, weight in floats.transformer.weights.items():
        own: Any = kept.transformer.weights[name]
        assert torch.equal(own.matrix() if isinstance(own, QuantizedMatrix) else own, weight)
    assert np.isfinite(kept.score(prompt).total)
