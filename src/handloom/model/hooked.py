"""What a hooked block does beside the fused ops: shows what lies between them, and takes apart what they hide.

The fused ops run for all rows as always. Where a hooked point lies inside one, that part is computed again for the
hooked rows alone, from the plain formulas; where a patch changed the values, what follows from them replaces the fused
result in those rows. So a capture changes nothing, and a patch nothing but its own rows.

Cost of a hooked pass: a copy of the rows at points between ops (hook_embed without learned positions, hook_resid_*,
attn.hook_rot_q, attn.hook_rot_k, attn.hook_v, attn.hook_z, mlp.hook_post); the projection once more for attn.hook_q and
attn.hook_k, hook_attn_out and hook_mlp_out; explicit scores [num_heads, n, context] for attn.hook_pattern; the head
once more for a patch of ln_final.hook_normalized.

This module does not know who asked for what.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom.model.batch import ForwardBatch
from handloom.model.hooks import PATTERN, Span, StepHooks
from handloom.model.spec import AttentionSpec
from handloom.ops import Norm, Ops, Rotary, Weight, matrix, normalize, rotate

if TYPE_CHECKING:
    from handloom.model.transformer import Layer, Transformer

Pages = tuple[Tensor, Tensor]


class HookedBlock:
    """The hooks of one block in one pass."""

    def __init__(self, hooks: StepHooks, prefix: str, layer: Layer, ops: Ops, batch: ForwardBatch) -> None:
        self.hooks, self.prefix, self.layer, self.ops, self.batch = hooks, prefix, layer, ops, batch

    def rows(self, name: str, values: Tensor) -> None:
        """A point between two ops: values [N, ...], patched in place."""
        self.hooks.rows(self.prefix + name, values)

    def qkv(self, hidden: Tensor, rotary: Rotary | None, pages: Pages, q: Tensor) -> None:
        """After norm_qkv: q [N, num_heads, head_dim] and the written K and V, patched in place."""
        layer, (num_heads, num_kv_heads, head_dim) = self.layer, (q.shape[1], *pages[0].shape[-2:])
        k_slots, v_slots = (x.flatten(0, 1) for x in pages)
        widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]

        def projected(span: Span, part: int) -> Tensor:
            qkv = linear(normalized(hidden[span.rows], layer.attn_norm), layer.qkv, layer.qkv_bias)
            own: Tensor = qkv.split(widths, dim=-1)[part]
            return own.reshape(len(own), -1, head_dim)

        def entering(span: Span, x: Tensor, norm: Norm | None) -> Tensor:
            x = x if norm is None else normalized(x, norm)
            if rotary is None:
                return x
            return rotate(x, rotary._replace(cos=rotary.cos[span.rows], sin=rotary.sin[span.rows]))

        def slots(span: Span) -> Tensor:
            return self.batch.slot_mapping[span.rows]

        def load(written: Tensor, span: Span) -> Tensor:
            return written[slots(span)]

        def store(into: Tensor, span: Span, values: Tensor) -> None:
            into[slots(span)] = values.to(into.dtype)

        self.hooks.visit(
            f"{self.prefix}attn.hook_q",
            lambda span: projected(span, 0),
            lambda span, x: q[span.rows].copy_(entering(span, x, layer.q_norm)),
        )
        self.hooks.visit(
            f"{self.prefix}attn.hook_k",
            lambda span: projected(span, 1),
            lambda span, x: store(k_slots, span, entering(span, x, layer.k_norm)),
        )
        self.rows("attn.hook_rot_q", q)
        for name, written in (("attn.hook_rot_k", k_slots), ("attn.hook_v", v_slots)):
            self.hooks.visit(self.prefix + name, partial(load, written), partial(store, written))

    def attended(self, q: Tensor, pages: Pages, attended: Tensor) -> None:
        """After attention: its output [N, num_heads * head_dim], patched in place."""

        def context(span: Span, which: int) -> Tensor:
            """K or V of all the sequence's tokens, one per query head: [context, num_heads, head_dim]."""
            length, page_size = int(self.batch.context_lens[span.which]), pages[which].shape[1]
            page_ids = self.batch.page_table[span.which, : -(-length // page_size)]
            values = pages[which][page_ids].flatten(0, 1)[:length].to(q.dtype)
            return values.repeat_interleave(q.shape[1] // values.shape[1], dim=1)

        def replace(span: Span, weights: Tensor) -> None:
            z = torch.einsum("hqk,khd->qhd", weights, context(span, 1))
            attended[span.rows] = z.flatten(1)

        mixer = self.layer.spec.mixer
        self.hooks.visit(
            self.prefix + PATTERN, lambda span: attention_weights(q[span.rows], context(span, 0), mixer), replace
        )
        self.rows("attn.hook_z", attended.unflatten(-1, (q.shape[1], -1)))

    def added(
        self,
        name: str,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        post_norm: Norm | None,
        residual: Tensor,
        out: Tensor,
    ) -> None:
        """After linear_residual(x, ..., residual) -> out [N, hidden_size], which is patched in place."""

        def alone(span: Span) -> Tensor:
            nothing = torch.zeros_like(residual[span.rows])
            return self.ops.linear_residual(x[span.rows], weight, bias, post_norm, nothing)

        self.hooks.visit(self.prefix + name, alone, lambda span, new: out[span.rows].copy_(residual[span.rows] + new))


def normalized(x: Tensor, norm: Norm) -> Tensor:
    """The norm by the plain formula, in x's dtype, which may be wider than the weights'."""
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return normalize(x, norm._replace(weight=norm.weight.to(x.dtype), bias=bias))


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by the plain formula, in x's dtype."""
    return F.linear(x, matrix(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))


def attention_weights(q: Tensor, k: Tensor, mixer: AttentionSpec) -> Tensor:
    """Softmax weights [num_heads, n, context] in q's dtype of the last n of `context` tokens, zero for unseen keys.

    Args: q [n, num_heads, head_dim]; k [context, num_heads, head_dim], both as attention takes them.
    """
    num_queries, num_keys = len(q), len(k)
    scores = torch.einsum("qhd,khd->hqk", q, k) * mixer.scale
    if mixer.softcap is not None:
        scores = mixer.softcap * torch.tanh(scores / mixer.softcap)
    query_at = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    key_at = torch.arange(num_keys, device=q.device)[None, :]
    visible = key_at <= query_at
    if mixer.window is not None:
        visible &= key_at > query_at - mixer.window
    return scores.float().masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype)


def hooked_embedding(model: Transformer, hooks: StepHooks, batch: ForwardBatch, hidden: Tensor) -> None:
    """hook_embed: token embeddings, scaled, without learned positions; hidden [N, hidden_size] is patched in place."""
    table = model.position_embedding
    if table is None:
        hooks.rows("hook_embed", hidden)
    elif hooks.within("hook_embed"):
        tokens = model.embed(batch, None, model.ops)
        hooks.visit(
            "hook_embed",
            lambda span: tokens[span.rows],
            lambda span, new: hidden[span.rows].copy_(new + table[span.positions]),
        )


def hooked_head(model: Transformer, hooks: StepHooks, batch: ForwardBatch, hidden: Tensor, logits: Tensor) -> None:
    """ln_final.hook_normalized: hidden [N, hidden_size] normed; logits [R, vocab_size], patched in place."""

    def replace(span: Span, new: Tensor) -> None:
        inside = (batch.logits_rows >= span.rows.start) & (batch.logits_rows < span.rows.stop)
        own = linear(new[batch.logits_rows[inside] - span.rows.start], model.head, None)
        cap = model.spec.logits_softcap
        logits[inside] = (own if cap is None else cap * torch.tanh(own / cap)).float()

    hooks.visit("ln_final.hook_normalized", lambda span: normalized(hidden[span.rows], model.final_norm), replace)
