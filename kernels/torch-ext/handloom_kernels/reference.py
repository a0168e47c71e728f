"""What every op means, in plain PyTorch.

This is the oracle the Triton kernels and the compiled CPU blocks are tested against, and the text to
read first. It is written for clarity: every formula is the published one, in the order a paper would
give it. Seven blocks make a decoder layer's whole step:

    embed -> [norm_qkv -> attention -> linear_residual -> norm_mlp -> linear_residual] x layers -> lm_head

All token dimensions are ragged: N tokens of S sequences lie end to end, without padding. Only
`paged_attention` and the page write in `norm_qkv` know where one sequence ends and the next begins.

This module does not know about models, layers, devices, speed, or who owns a page.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Norm(NamedTuple):
    """A normalisation over the last dimension.

    kind: "rms" (Zhang & Sennrich 2019, as Llama: scale after the cast back), "rms_unit_offset"
    (as Gemma: multiply by 1 + weight in float32, then cast back) or "layer" (Ba et al. 2016).
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


class Rotary(NamedTuple):
    """Rotary position embedding (Su et al. 2021) at this step's positions: cos, sin [N, rotary_dim / 2] float32.

    Halves are rotated (dimension i with i + rotary_dim / 2), as in every Hub checkpoint of the Llama kind.
    """

    cos: Tensor
    sin: Tensor


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Normalise x [..., H] over its last dimension in float32; the result has x's dtype."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.kind == "rms_unit_offset":
        return (x32 * (1.0 + norm.weight.float())).to(x.dtype)
    return norm.weight * x32.to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of ACTIVATIONS element-wise."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x [N, heads, head_dim]; dimensions past rotary_dim pass through."""
    half = rotary.cos.shape[-1]
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in rotary)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def embed(input_ids: Tensor, weight: Tensor, scale: float, positions: Tensor, position_weight: Tensor | None) -> Tensor:
    """Look up token embeddings.

    Args: input_ids, positions [N] int64; weight [vocab_size, H]; scale, rounded to weight's dtype (as
    Gemma does); position_weight [max_positions, H] for learned positions. Returns hidden_states [N, H].
    """
    hidden = F.embedding(input_ids, weight)
    if scale != 1.0:
        hidden = hidden * torch.tensor(scale, dtype=weight.dtype, device=weight.device)
    return hidden if position_weight is None else hidden + F.embedding(positions, position_weight)


def norm_qkv(
    hidden: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Norm, QKV projection, per-head q/k norm, rotation, and the write of K and V into their pages.

    Args: hidden [N, H]; weight [(num_heads + 2 * num_kv_heads) * head_dim, H] with q, k, v rows in that
    order; k_pages, v_pages [num_pages, page_size, num_kv_heads, head_dim], written in place;
    slot_mapping [N] int64, the flat slot (page * page_size + offset) of each token.
    Returns q [N, num_heads, head_dim].
    """
    num_kv_heads, head_dim = k_pages.shape[-2:]
    heads = F.linear(normalize(hidden, norm), weight, bias).view(len(hidden), -1, head_dim)
    q, k, v = heads[:, : -2 * num_kv_heads], heads[:, -2 * num_kv_heads : -num_kv_heads], heads[:, -num_kv_heads:]
    if q_norm is not None and k_norm is not None:
        q, k = normalize(q, q_norm), normalize(k, k_norm)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    k_pages.view(-1, num_kv_heads, head_dim)[slot_mapping] = k.to(k_pages.dtype)
    v_pages.view(-1, num_kv_heads, head_dim)[slot_mapping] = v.to(v_pages.dtype)
    return q


def gather_pages(pages: Tensor, page_ids: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence, contiguous: [length, num_kv_heads, head_dim]."""
    return pages[page_ids].reshape(-1, *pages.shape[2:])[:length]


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
) -> Tensor:
    """Causal attention of ragged queries over paged keys and values.

    Args: q [N, num_heads, head_dim]; k_pages, v_pages [num_pages, page_size, num_kv_heads, head_dim];
    page_table [S, max_pages] int; cu_seqlens [S + 1] int, where each sequence's queries start;
    context_lens [S] int, keys per sequence, this step's tokens included: the last query sees them all.
    window: a query sees itself and the window - 1 keys before it. softcap: cap * tanh(score / cap), as
    Gemma 2. Query head h reads KV head h // (num_heads / num_kv_heads) (Ainslie et al. 2023).
    Returns [N, num_heads * head_dim] in q's dtype; softmax in float32.
    """
    group = q.shape[1] // k_pages.shape[2]
    outputs = []
    for s in range(len(context_lens)):
        start, end, length = int(cu_seqlens[s]), int(cu_seqlens[s + 1]), int(context_lens[s])
        page_ids = page_table[s, : -(-length // k_pages.shape[1])]
        k = gather_pages(k_pages, page_ids, length).to(q.dtype).repeat_interleave(group, dim=1)
        v = gather_pages(v_pages, page_ids, length).to(q.dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_at = torch.arange(length - (end - start), length, device=q.device)[:, None]
        key_at = torch.arange(length, device=q.device)[None, :]
        visible = key_at <= query_at
        if window is not None:
            visible &= key_at > query_at - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs).flatten(1)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Norm | None, residual: Tensor) -> Tensor:
    """residual + post_norm(x @ weight.T + bias): closes the attention and the MLP half of a layer.

    Args: x [N, K]; weight [H, K]; residual [N, H]. Returns [N, H]; residual is left as it was.
    """
    out = F.linear(x, weight, bias)
    return residual + (out if post_norm is None else normalize(out, post_norm))


def norm_mlp(hidden: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """Norm, up projection and activation.

    Args: hidden [N, H]; weight [2 * I, H] (gate rows, then up rows) if gated (Shazeer 2020), else [I, H].
    Returns [N, I].
    """
    x = F.linear(normalize(hidden, norm), weight, bias)
    if not gated:
        return activate(x, activation)
    gate, up = x.chunk(2, dim=-1)
    return activate(gate, activation) * up


def lm_head(hidden: Tensor, norm: Norm, weight: Tensor, softcap: float | None) -> Tensor:
    """Final norm and vocabulary projection of the R rows that need logits: [R, H] -> [R, vocab_size] float32."""
    logits = F.linear(normalize(hidden, norm), weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()
