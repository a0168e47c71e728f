"""The ops on PyTorch's own fused operators: what runs where no compiled block or kernel does.

Same names, arguments and meaning as `handloom_kernels.reference`; what differs is how: scaled dot
product attention instead of explicit softmax, one rotation for q and k together, views instead of
gathers where a sequence's pages lie side by side.

This module does not know about models, sequences or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, arange, bmm, cat, device, float32, tanh, tensor
from torch.backends import mkl
from torch.nn import functional as F  # noqa: N812

from handloom.checkpoint.quantization import QuantizedMatrix
from handloom_kernels import reference
from handloom_kernels.reference import Norm, Rotary, activate, normalize

__all__ = ["embed", "linear_residual", "lm_head", "norm_mlp", "norm_qkv", "paged_attention"]

Matrix = Tensor | QuantizedMatrix
FEW_ROWS = range(4, 17)
WEIGHT_ROWS = 32


def embed(input_ids: Tensor, weight: Matrix, scale: float, positions: Tensor, position_weight: Tensor | None) -> Tensor:
    """See `handloom_kernels.reference.embed`."""
    if isinstance(weight, QuantizedMatrix):
        input_ids, weight = arange(len(input_ids), device=input_ids.device), weight[input_ids]
    return reference.embed(input_ids, weight, scale, positions, position_weight)


def _linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [N, K] @ weight [M, K].T + bias; a few float32 rows on a CPU go through many small products.

    MKL repacks the weight for each large product, which costs more than the product itself where x has few rows;
    small products it computes in place. 8 rows, one core with AVX-512: 3072 x 576 in 0.71 instead of 1.38 ms,
    49152 x 576 in 12.4 instead of 29.0.
    """
    own = weight.matrix() if isinstance(weight, QuantizedMatrix) else weight
    rows, (width, depth) = len(x), own.shape
    if rows not in FEW_ROWS or x.dtype != float32 or x.is_cuda or width % WEIGHT_ROWS or not mkl.is_available():
        return F.linear(x, own, bias)
    pieces = own.view(-1, WEIGHT_ROWS, depth).transpose(1, 2)
    out = bmm(x.expand(len(pieces), rows, depth), pieces).transpose(0, 1).reshape(rows, width)
    return out if bias is None else out.add_(bias)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    if norm.kind == "layer" or x.dtype != float32:
        return normalize(x, norm)
    weight = norm.weight if norm.kind == "rms" else 1.0 + norm.weight
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    scale = x.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
    return (x * scale).mul_(weight)


def _rotate_(x: Tensor, rotary: Rotary) -> None:
    """Rotate x [N, heads, head_dim] in place."""
    half = rotary.cos.shape[-1]
    cos, sin = rotary.cos.to(x.dtype).unsqueeze(1), rotary.sin.to(x.dtype).unsqueeze(1)
    first, second = x[..., :half], x[..., half : 2 * half]
    if rotary.interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)


def norm_qkv(
    hidden: Tensor,
    norm: Norm,
    weight: Matrix,
    bias: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """See `handloom_kernels.reference.norm_qkv`."""
    num_kv_heads, head_dim = k_pages.shape[-2:]
    heads = _linear(_norm(hidden, norm), weight, bias).view(len(hidden), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if q_norm is not None or k_norm is not None:
        q, k = qk[:, :num_heads], qk[:, num_heads:]
        qk = cat((q if q_norm is None else _norm(q, q_norm), k if k_norm is None else _norm(k, k_norm)), dim=1)
    if rotary is not None:
        _rotate_(qk, rotary)
    flat = (-1, num_kv_heads, head_dim)
    k_pages.view(flat).index_copy_(0, slot_mapping, qk[:, num_heads:].to(k_pages.dtype))
    v_pages.view(flat).index_copy_(0, slot_mapping, v.to(v_pages.dtype))
    return qk[:, :num_heads]


def _context(slots: Tensor, page_ids: list[int], page_size: int, start: int, end: int) -> Tensor:
    """Tokens start..end of the pages, [num_kv_heads, end - start, head_dim]: a view if the pages lie side by side.

    slots: the whole cache, [num_slots, num_kv_heads, head_dim].
    """
    first = page_ids[0]
    if page_ids == list(range(first, first + len(page_ids))):
        start, end = first * page_size + start, first * page_size + end
    else:
        pages: Tensor = slots.unflatten(0, (-1, page_size))
        slots = pages.index_select(0, tensor(page_ids, device=slots.device)).flatten(0, 1)
    return slots[start:end].transpose(0, 1)


def _visible(num_queries: int, num_keys: int, window: int | None, device: device) -> Tensor:
    """Which of the last num_keys keys each of the last num_queries queries sees: bool [num_queries, num_keys]."""
    query_at = arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_at = arange(num_keys, device=device)[None, :]
    visible = key_at <= query_at
    return visible if window is None else visible & (key_at > query_at - window)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One sequence: q [Q, num_heads, D], k and v [num_kv_heads, T, D] -> [Q, num_heads * D]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = k.shape
    group = num_heads // num_kv_heads
    if num_queries == 1:
        mask, causal = None, False
        q = q.view(1, num_kv_heads, group, head_dim)
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    else:
        causal = softcap is None and num_queries == num_keys and (window is None or window >= num_keys)
        mask = None if causal else _visible(num_queries, num_keys, window, q.device)
        q = q.transpose(0, 1).view(num_kv_heads, group, num_queries, head_dim)
        k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    else:
        scores = softcap * tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1, dtype=float32).to(q.dtype) @ v
    if num_queries == 1:
        return out.reshape(1, num_heads * head_dim)
    return out.flatten(0, 1).transpose(0, 1).reshape(num_queries, num_heads * head_dim)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    query_lens: Sequence[int] | None = None,
) -> Tensor:
    """See `handloom_kernels.reference.paged_attention`."""
    page_size = k_pages.shape[1]
    starts, lengths, tables = cu_seqlens.tolist(), context_lens.tolist(), page_table.tolist()
    slots = [pages.flatten(0, 1) for pages in (k_pages, v_pages)]
    outputs = []
    for s, length in enumerate(lengths):
        queries = q[starts[s] : starts[s + 1]]
        oldest = 0 if window is None else max(0, length - len(queries) - window + 1)
        first = oldest // page_size
        page_ids = tables[s][first : -(-length // page_size)]
        k, v = (_context(x, page_ids, page_size, oldest - first * page_size, length - first * page_size) for x in slots)
        outputs.append(_attend(queries, k, v, scale, window, softcap))
    return outputs[0] if len(outputs) == 1 else cat(outputs)


def linear_residual(x: Tensor, weight: Matrix, bias: Tensor | None, post_norm: Norm | None, residual: Tensor) -> Tensor:
    """See `handloom_kernels.reference.linear_residual`."""
    out = _linear(x, weight, bias)
    return residual + (out if post_norm is None else _norm(out, post_norm))


def norm_mlp(hidden: Tensor, norm: Norm, weight: Matrix, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """See `handloom_kernels.reference.norm_mlp`."""
    x = _linear(_norm(hidden, norm), weight, bias)
    if not gated:
        return activate(x, activation)
    gate, up = x.chunk(2, dim=-1)
    return activate(gate, activation).mul_(up)


def lm_head(hidden: Tensor, norm: Norm, weight: Matrix, softcap: float | None) -> Tensor:
    """See `handloom_kernels.reference.lm_head`."""
    logits = _linear(_norm(hidden, norm), weight)
    return (logits if softcap is None else softcap * tanh(logits / softcap)).float()
