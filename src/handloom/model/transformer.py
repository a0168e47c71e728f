"""One decoder-only Transformer for every family: it composes the fused ops as the spec says.

The forward pass is ragged: N tokens of S sequences in, logits for R of them out, K and V written to
their pages on the way. It keeps no state between calls.

This module does not know files, tokenizers, requests, sampling, or who owns a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from handloom.model.batch import Embeddings, ForwardBatch
from handloom.model.rope import inverse_frequencies, rotary_at
from handloom.model.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec
from handloom.ops import Backend, Norm, Rotary

KVPages = Sequence[tuple[Tensor, Tensor]]


class Layer:
    """One layer's weights, in the form the ops take them."""

    def __init__(self, spec: LayerSpec, weights: Mapping[str, Tensor], rope: int | None) -> None:
        self.spec, self.rope = spec, rope
        self.qkv, self.qkv_bias = weights["qkv.weight"], weights.get("qkv.bias")
        self.out, self.out_bias = weights["out.weight"], weights.get("out.bias")
        self.up, self.up_bias = weights["up.weight"], weights.get("up.bias")
        self.down, self.down_bias = weights["down.weight"], weights.get("down.bias")
        self.attn_norm = make_norm(spec.norm, weights, "attn_norm")
        self.mlp_norm = make_norm(spec.norm, weights, "mlp_norm")
        sandwich, qk_norm = spec.residual == "sandwich", spec.mixer.qk_norm
        self.attn_post_norm = make_norm(spec.norm, weights, "attn_post_norm") if sandwich else None
        self.mlp_post_norm = make_norm(spec.norm, weights, "mlp_post_norm") if sandwich else None
        self.q_norm = make_norm(qk_norm, weights, "q_norm") if qk_norm else None
        self.k_norm = make_norm(qk_norm, weights, "k_norm") if qk_norm else None


def make_norm(spec: NormSpec, weights: Mapping[str, Tensor], name: str) -> Norm:
    """The op's norm from the weights called `name`."""
    return Norm(spec.kind, weights[f"{name}.weight"], weights.get(f"{name}.bias"), spec.eps)


class Transformer:
    """The model: weights by the names of `spec.model_parameters`, computed by a backend."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], backend: Backend) -> None:
        self.spec, self.backend, self.ops = spec, backend, backend.ops
        self.weights = dict(weights)
        self.embedding = weights["embed.weight"]
        self.position_embedding = weights.get("positions.weight")
        self.head = self.embedding if spec.tied_head else weights["head.weight"]
        self.final_norm = make_norm(spec.final_norm, weights, "final_norm")
        self.device, self.dtype = self.embedding.device, self.embedding.dtype

        ropes: dict[RopeSpec, int] = {}
        self.layers: list[Layer] = []
        for i, layer in enumerate(spec.layers):
            rope = layer.mixer.rope
            index = None if rope is None else ropes.setdefault(rope, len(ropes))
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            self.layers.append(Layer(layer, own, index))
        self.inv_freqs = [inverse_frequencies(rope, self.device) for rope in ropes]

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, kv: KVPages) -> Tensor:
        """Run one step.

        Args: batch, see ForwardBatch; kv: (k_pages, v_pages) of each layer, written in place.
        Returns logits [R, vocab_size] float32 for batch.logits_rows.
        """
        ops = self.ops
        rotaries = [rotary_at(inv_freq, batch.positions) for inv_freq in self.inv_freqs]
        hidden = ops.embed(
            batch.input_ids, self.embedding, self.spec.embedding_scale, batch.positions, self.position_embedding
        )
        if batch.embeddings is not None:
            hidden = self._place(batch.embeddings, hidden, batch.positions)
        for layer, pages in zip(self.layers, kv, strict=True):
            rotary = None if layer.rope is None else rotaries[layer.rope]
            hidden = self._attention(layer, hidden, rotary, pages, batch)
            hidden = self._mlp(layer, hidden)
        rows = hidden.index_select(0, batch.logits_rows)
        return ops.lm_head(rows, self.final_norm, self.head, self.spec.logits_softcap)

    def _place(self, embeddings: Embeddings, hidden: Tensor, positions: Tensor) -> Tensor:
        """Put the caller's embeddings in their rows; learned positions are added, a scale is not (as transformers)."""
        values = embeddings.values.to(hidden)
        if self.position_embedding is not None:
            values = values + self.position_embedding[positions[embeddings.rows]]
        return hidden.index_copy(0, embeddings.rows, values)

    def _attention(
        self, layer: Layer, hidden: Tensor, rotary: Rotary | None, pages: tuple[Tensor, Tensor], batch: ForwardBatch
    ) -> Tensor:
        mixer = layer.spec.mixer
        q = self.ops.norm_qkv(
            hidden,
            layer.attn_norm,
            layer.qkv,
            layer.qkv_bias,
            layer.q_norm,
            layer.k_norm,
            rotary,
            *pages,
            batch.slot_mapping,
        )
        attended = self.ops.paged_attention(
            q,
            *pages,
            batch.page_table,
            batch.cu_seqlens,
            batch.context_lens,
            mixer.scale,
            mixer.window,
            mixer.softcap,
            max_query_len=batch.max_query_len,
        )
        return self.ops.linear_residual(attended, layer.out, layer.out_bias, layer.attn_post_norm, hidden)

    def _mlp(self, layer: Layer, hidden: Tensor) -> Tensor:
        mlp = layer.spec.mlp
        x = self.ops.norm_mlp(hidden, layer.mlp_norm, layer.up, layer.up_bias, mlp.activation, mlp.gated)
        return self.ops.linear_residual(x, layer.down, layer.down_bias, layer.mlp_post_norm, hidden)
