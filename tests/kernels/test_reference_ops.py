"""Each reference op equals its formula in float64, or the transformers / torch module it stands for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from handloom_kernels import reference as ops
from handloom_kernels.reference import Norm, Rotary
from paged import Paged, draw

EPS = 1e-5
WIDTHS = (1, 8, 63, 100, 1000)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to float64 `expected` within `tolerance` of its largest value (float32 rounding), and nowhere NaN."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


def normalize64(x: Tensor, norm: Norm) -> Tensor:
    """The published formulas: Zhang & Sennrich 2019 eq. 4 (Gemma: gain 1 + weight), Ba et al. 2016 eq. 4."""
    x, weight = x.double(), norm.weight.double()
    if norm.kind == "layer":
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        bias = 0.0 if norm.bias is None else norm.bias.double()
        return (x - mean) / (variance + norm.eps).sqrt() * weight + bias
    gain = 1 + weight if norm.kind == "rms_unit_offset" else weight
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * gain


def attend64(paged: Paged, scale: float, window: int | None = None, softcap: float | None = None) -> Tensor:
    """Attention query by query and head by head in float64, from the keys and values as they were made."""
    rows = []
    for q, k, v in zip(paged.queries, paged.keys, paged.values, strict=True):
        group = q.shape[1] // k.shape[1]
        for i in range(len(q)):
            end = len(k) - len(q) + i + 1
            start = 0 if window is None else max(0, end - window)
            heads = []
            for head in range(q.shape[1]):
                scores = k[start:end, head // group].double() @ q[i, head].double() * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                heads.append(scores.softmax(0) @ v[start:end, head // group].double())
            rows.append(torch.cat(heads))
    return torch.stack(rows)


def reference_attention(paged: Paged, scale: float, window: int | None = None, softcap: float | None = None) -> Tensor:
    return ops.paged_attention(*paged.arguments(), scale, window, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_is_llamas_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    module, x = LlamaRMSNorm(width, EPS).to(dtype), draw(7, width, dtype=dtype)
    module.weight.data = draw(width, dtype=dtype)
    assert torch.equal(ops.normalize(x, Norm("rms", module.weight.data, None, EPS)), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_with_unit_offset_is_gemmas_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    module, x = Gemma3RMSNorm(width, EPS).to(dtype), draw(7, width, dtype=dtype)
    module.weight.data = draw(width, dtype=dtype)
    assert torch.equal(ops.normalize(x, Norm("rms_unit_offset", module.weight.data, None, EPS)), module(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rms", "rms_unit_offset", "layer"])
@pytest.mark.parametrize("width", WIDTHS)
def test_normalize_is_the_published_formula(width: int, kind: str, bias: bool) -> None:
    norm = Norm(kind, draw(width), draw(width) if bias and kind == "layer" else None, EPS)
    x = draw(3, 5, width) + 0.5
    close(ops.normalize(x, norm), normalize64(x, norm))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_rms_norm_of_tiny_and_huge_values_stays_finite(scale: float) -> None:
    norm = Norm("rms", torch.ones(64), None, 1e-6)
    x = draw(2, 64) * scale
    close(ops.normalize(x, norm), normalize64(x, norm))


@pytest.mark.parametrize(
    ("ours", "theirs"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu", "relu")]
)
def test_activations_are_transformers(ours: str, theirs: str) -> None:
    x = torch.linspace(-12, 12, 1001)
    assert torch.equal(ops.activate(x, ours), ACT2FN[theirs](x))


def test_gelu_tanh_is_also_gelu_new() -> None:
    x = torch.linspace(-12, 12, 1001)
    close(ops.activate(x, "gelu_tanh"), ACT2FN["gelu_new"](x.double()))


def test_every_listed_activation_differs_from_the_others() -> None:
    results = [ops.activate(torch.tensor([-0.7, 0.7]), name) for name in ops.ACTIVATIONS]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 16, 100])
def test_rotation_is_that_of_transformers(head_dim: int, dtype: torch.dtype) -> None:
    angles = torch.rand(63, head_dim // 2) * 100
    q, k = draw(63, 6, head_dim, dtype=dtype), draw(63, 2, head_dim, dtype=dtype)
    cos, sin = (torch.cat((t, t), -1).to(dtype)[None] for t in (angles.cos(), angles.sin()))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for x, theirs in zip((q, k), expected, strict=True):
        ours = ops.rotate(x, Rotary(angles.cos(), angles.sin()))
        assert torch.equal(ours, theirs[0].transpose(0, 1))


def test_partial_rotation_multiplies_complex_pairs_and_passes_the_rest_through() -> None:
    x, angles = draw(5, 3, 20), torch.rand(5, 4) * 10
    out = ops.rotate(x, Rotary(angles.cos(), angles.sin()))
    turned = torch.complex(x[..., :4].double(), x[..., 4:8].double()) * torch.polar(
        torch.ones(5, 1, 4).double(), angles[:, None].double()
    )
    close(out[..., :8], torch.cat((turned.real, turned.imag), -1))
    assert torch.equal(out[..., 8:], x[..., 8:])


def test_embed_adds_learned_positions() -> None:
    words, places = torch.nn.Embedding(20, 9), torch.nn.Embedding(30, 9)
    ids, positions = torch.tensor([3, 3, 19, 0]), torch.tensor([0, 29, 4, 4])
    expected = words(ids) + places(positions)
    assert torch.equal(ops.embed(ids, words.weight, 1.0, positions, places.weight), expected)
    assert torch.equal(ops.embed(ids, words.weight, 1.0, positions, None), words(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embed_is_gemmas(dtype: torch.dtype) -> None:
    module = Gemma3TextScaledWordEmbedding(20, 40, 0, embed_scale=40**0.5).to(dtype)
    ids = torch.tensor([3, 19, 1])
    assert torch.equal(ops.embed(ids, module.weight, 40**0.5, ids, None), module(ids))


@pytest.mark.parametrize("kind", ["rms", "rms_unit_offset", "layer"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias, q/k norm, rope"])
def test_norm_qkv_projects_rotates_and_writes_its_own_slots_only(kind: str, extras: bool) -> None:
    num_heads, num_kv_heads, head_dim, hidden_size, num_tokens = 6, 2, 10, 33, 63
    hidden, weight = draw(num_tokens, hidden_size), draw((num_heads + 2 * num_kv_heads) * head_dim, hidden_size)
    norm = Norm(kind, draw(hidden_size), None, EPS)
    bias = draw(len(weight)) if extras else None
    qk_norms = [Norm(kind, draw(head_dim), None, EPS) if extras else None for _ in "qk"]
    angles = torch.rand(num_tokens, head_dim // 2)
    rotary = Rotary(angles.cos(), angles.sin()) if extras else None
    k_pages, v_pages = (torch.full((9, 16, num_kv_heads, head_dim), math.nan) for _ in "kv")
    slots = torch.randperm(9 * 16)[:num_tokens]

    q = ops.norm_qkv(hidden, norm, weight, bias, *qk_norms, rotary, k_pages, v_pages, slots)

    heads = normalize64(hidden, norm) @ weight.double().T + (0 if bias is None else bias.double())
    expected = list(heads.view(num_tokens, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1))
    for i, head_norm in enumerate(qk_norms):
        if head_norm is not None:
            expected[i] = normalize64(expected[i], head_norm)
        if rotary is not None:
            first, second = expected[i].chunk(2, -1)
            turned = torch.complex(first, second) * torch.polar(torch.ones(1).double(), angles.double())[:, None]
            expected[i] = torch.cat((turned.real, turned.imag), -1)
    close(q, expected[0])
    for pages, values in ((k_pages, expected[1]), (v_pages, expected[2])):
        flat = pages.view(-1, num_kv_heads, head_dim)
        close(flat[slots], values)
        untouched = torch.ones(9 * 16, dtype=torch.bool)
        untouched[slots] = False
        assert flat[untouched].isnan().all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_attention_is_the_formula_over_shuffled_poisoned_pages(
    group: int, window: int | None, softcap: float | None
) -> None:
    """Fresh prompts, continued ones and single decode tokens in one ragged batch; NaN wherever nothing was written."""
    paged = Paged.make(lengths=(1, 17, 63, 40), new=(1, 17, 20, 1), num_heads=8, num_kv_heads=8 // group, head_dim=12)
    expected = attend64(paged, 0.3, window, softcap)
    close(reference_attention(paged, 0.3, window, softcap), expected)


@pytest.mark.parametrize("new", [1, "all"])
@pytest.mark.parametrize("length", [1, 63, 100, 1000])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_attention_equals_torchs_own(length: int, group: int, new: int | str) -> None:
    num_new = length if new == "all" else 1
    paged = Paged.make(lengths=(length,), new=(num_new,), num_heads=8, num_kv_heads=8 // group, head_dim=16)
    q, k, v = (x[0].transpose(0, 1)[None].double() for x in (paged.queries, paged.keys, paged.values))
    mask = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)
    close(reference_attention(paged, 0.25), expected[0].transpose(0, 1).flatten(1))


def test_attention_of_a_sequence_does_not_depend_on_its_neighbours_or_its_pages() -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    together = Paged.make(lengths=(33, 63, 5), new=(33, 3, 1), **sizes)
    out = reference_attention(together, 0.3).split((33, 3, 1))
    for i, own in enumerate(out):
        alone = Paged.lay_out(*([x[i]] for x in (together.queries, together.keys, together.values)))
        assert torch.equal(reference_attention(alone, 0.3), own)


@pytest.mark.parametrize("post", [None, "rms_unit_offset"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_residual_is_the_formula_and_leaves_the_residual_as_it_was(bias: bool, post: str | None) -> None:
    x, weight, residual = draw(63, 100), draw(33, 100), draw(63, 33)
    offset = draw(33) if bias else None
    norm = None if post is None else Norm(post, draw(33), None, EPS)
    before = residual.clone()
    out = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    expected = residual.double() + (out if norm is None else normalize64(out, norm))
    close(ops.linear_residual(x, weight, offset, norm, residual), expected)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_mlp_is_the_formula_with_gate_rows_first(gated: bool, bias: bool, activation: str) -> None:
    hidden, norm = draw(63, 33), Norm("rms", draw(33), None, EPS)
    weight = draw(100 if gated else 50, 33)
    offset = draw(len(weight)) if bias else None
    act = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)]
    x = normalize64(hidden, norm) @ weight.double().T + (0 if offset is None else offset.double())
    expected = act(x[:, :50]) * x[:, 50:] if gated else act(x)
    close(ops.norm_mlp(hidden, norm, weight, offset, activation, gated), expected)


@pytest.mark.parametrize("num_rows", [0, 1, 63])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_lm_head_is_the_formula_in_float32(num_rows: int, softcap: float | None) -> None:
    hidden, norm, weight = draw(num_rows, 33), Norm("layer", draw(33), draw(33), EPS), draw(331, 33)
    expected = normalize64(hidden, norm) @ weight.double().T
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    logits = ops.lm_head(hidden, norm, weight, softcap)
    assert logits.dtype == torch.float32
    assert logits.shape == (num_rows, 331)
    if num_rows:
        close(logits, expected)
    half = ops.lm_head(hidden.bfloat16(), Norm("rms", draw(33).bfloat16(), None, EPS), weight.bfloat16(), softcap)
    assert half.dtype == torch.float32
