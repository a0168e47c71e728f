"""One decoder-only Transformer for every family: it composes the fused ops as the spec says.

The forward pass is ragged: N tokens of S sequences in, logits for R of them out, K and V written to
their pages on the way. It keeps no state between calls.

This module does not know files, tokenizers, requests, sampling, or who owns a page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from handloom.checkpoint.quantization import QuantizedMatrix
from handloom.model.batch import ForwardBatch, HostBatch
from handloom.model.hooked import HookedBlock, hooked_embedding, hooked_head
from handloom.model.hooks import StepHooks
from handloom.model.rope import inverse_frequencies, rotary_at
from handloom.model.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec, looked_up
from handloom.ops import Backend, Norm, Ops, QuantizedPanels, Rotary, Weight, matrix

KVPages = Sequence[tuple[Tensor, Tensor]]


class Layer:
    """One layer's weights, in the form the ops take them."""

    def __init__(self, spec: LayerSpec, weights: Mapping[str, Weight], rope: int | None) -> None:
        self.spec, self.rope = spec, rope
        self.qkv, self.qkv_bias = weights["qkv.weight"], vector(weights, "qkv.bias")
        self.out, self.out_bias = weights["out.weight"], vector(weights, "out.bias")
        self.up, self.up_bias = weights["up.weight"], vector(weights, "up.bias")
        self.down, self.down_bias = weights["down.weight"], vector(weights, "down.bias")
        self.attn_norm = make_norm(spec.norm, weights, "attn_norm")
        self.mlp_norm = make_norm(spec.norm, weights, "mlp_norm")
        sandwich, qk_norm = spec.residual == "sandwich", spec.mixer.qk_norm
        self.attn_post_norm = make_norm(spec.norm, weights, "attn_post_norm") if sandwich else None
        self.mlp_post_norm = make_norm(spec.norm, weights, "mlp_post_norm") if sandwich else None
        self.q_norm = make_norm(qk_norm, weights, "q_norm") if qk_norm else None
        self.k_norm = make_norm(qk_norm, weights, "k_norm") if qk_norm else None


def vector(weights: Mapping[str, Weight], name: str) -> Tensor | None:
    """A bias, or a norm's weight, which every backend holds as it is; None if there is none."""
    weight = weights.get(name)
    assert weight is None or isinstance(weight, Tensor)
    return weight


def make_norm(spec: NormSpec, weights: Mapping[str, Weight], name: str) -> Norm:
    """The op's norm from the weights called `name`."""
    weight = vector(weights, f"{name}.weight")
    assert weight is not None
    return Norm(spec.kind, weight, vector(weights, f"{name}.bias"), spec.eps)


def hold(spec: ModelSpec, backend: Backend, name: str, weight: Weight, *, own: bool = False) -> Weight:
    """A weight as the backend reads it: matrices of linears in its own form, all else as it is.

    own: nobody else uses the weight, and its memory may be taken.
    """
    if isinstance(weight, Tensor) and (len(weight.shape) != 2 or name in looked_up(spec)):
        return weight
    if not isinstance(weight, Tensor | QuantizedMatrix):
        return weight
    return backend.take(weight) if own else backend.hold(weight)


class Weights(Mapping[str, Tensor | QuantizedMatrix]):
    """A model's weights as a checkpoint has them; one that the backend lays out otherwise is made anew at each look."""

    def __init__(self, held: Mapping[str, Weight]) -> None:
        self.held = held

    def __getitem__(self, name: str) -> Tensor | QuantizedMatrix:
        weight = self.held[name]
        if isinstance(weight, QuantizedPanels):
            return weight.unpack()
        return weight if isinstance(weight, QuantizedMatrix) else matrix(weight)

    def nbytes(self) -> dict[str, int]:
        """Bytes held in each dtype and quantised format, the largest first."""
        counts: Counter[str] = Counter()
        for weight in self.held.values():
            if isinstance(weight, QuantizedMatrix | QuantizedPanels):
                counts.update(weight.held)
            else:
                counts[str(weight.dtype).removeprefix("torch.")] += weight.nbytes
        return dict(counts.most_common())

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class Transformer:
    """The model: weights by the names of `spec.model_parameters`, computed by a backend."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Weight], backend: Backend) -> None:
        self.spec, self.backend, self.ops = spec, backend, backend.ops
        held = {name: hold(spec, backend, name, weight) for name, weight in weights.items()}
        self.weights = Weights(held)
        self.embedding = held["embed.weight"]
        self.position_embedding = vector(held, "positions.weight")
        self.head = self.embedding if spec.tied_head else held["head.weight"]
        self.final_norm = make_norm(spec.final_norm, held, "final_norm")
        self.device, self.dtype = self.embedding.device, self.embedding.dtype

        ropes: dict[RopeSpec, int] = {}
        self.layers: list[Layer] = []
        for i, layer in enumerate(spec.layers):
            rope = layer.mixer.rope
            index = None if rope is None else ropes.setdefault(rope, len(ropes))
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): w for name, w in held.items() if name.startswith(prefix)}
            self.layers.append(Layer(layer, own, index))
        self.inv_freqs = [inverse_frequencies(rope, self.device) for rope in ropes]
        self.program = None if backend.program is None else backend.program()

    def forward(self, batch: HostBatch | ForwardBatch, kv: KVPages, hooks: StepHooks | None = None) -> Tensor:
        """Run one step.

        Args: batch, see ForwardBatch; kv: (k_pages, v_pages) of each layer, written in place; hooks: whom to call on
        the way. Returns logits [R, vocab_size] float32 for batch.logits_rows.
        """
        if isinstance(batch, ForwardBatch):
            tensors = batch
        elif self.program is None or hooks is not None or batch.embedded:
            tensors = batch.on(self.device)
        else:
            numbers = batch

            def compute(ops: Ops, rotaries: Sequence[Rotary], kv: KVPages) -> Tensor:
                return self._compute(ops, numbers.on(self.device), rotaries, kv, None)

            return self.program.run(compute, numbers, self._rotaries, kv)
        return self._compute(self.ops, tensors, self._rotaries(tensors.positions), kv, hooks)

    def _rotaries(self, positions: Tensor) -> list[Rotary]:
        """cos and sin of positions [N], of each kind of rope."""
        return [rotary_at(inv_freq, positions) for inv_freq in self.inv_freqs]

    @torch.no_grad()
    def _compute(
        self, ops: Ops, batch: ForwardBatch, rotaries: Sequence[Rotary], kv: KVPages, hooks: StepHooks | None
    ) -> Tensor:
        """The step over these ops: the backend's own, or those by which it records a program."""
        hidden = self.embed(batch, self.position_embedding, ops)
        if hooks is not None:
            hooked_embedding(self, hooks, batch, hidden)
        for i, (layer, pages) in enumerate(zip(self.layers, kv, strict=True)):
            rotary = None if layer.rope is None else rotaries[layer.rope]
            block = self._hooked(hooks, i, batch)
            hidden = self._attention(ops, layer, hidden, rotary, pages, batch, block)
            hidden = self._mlp(ops, layer, hidden, block)
        rows = hidden.index_select(0, batch.logits_rows)
        logits = ops.lm_head(rows, self.final_norm, self.head, self.spec.logits_softcap)
        if hooks is not None:
            hooked_head(self, hooks, batch, hidden, logits)
        return logits

    @torch.no_grad()
    def read(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab_size] float32, rounded to the model's dtype as by transformers, of the head on hidden
        states [n, hidden_size] as they are, without a norm."""
        nothing = hidden.new_zeros(len(hidden), self.spec.vocab_size)
        return self.ops.linear_residual(hidden, self.head, None, None, nothing).to(torch.float32)

    def embed(self, batch: ForwardBatch, position_embedding: Tensor | None, ops: Ops) -> Tensor:
        """Embeddings of the batch's tokens [N, hidden_size], scaled, positions of that table added.

        The caller's own take the place of tokens' embeddings: positions are added to them, a scale is not (as
        transformers).
        """
        hidden = ops.embed(
            batch.input_ids, self.embedding, self.spec.embedding_scale, batch.positions, position_embedding
        )
        if batch.embeddings is None:
            return hidden
        rows, values = batch.embeddings.rows, batch.embeddings.values.to(hidden)
        if position_embedding is not None:
            values = values + position_embedding[batch.positions[rows]]
        return hidden.index_copy(0, rows, values)

    def _hooked(self, hooks: StepHooks | None, i: int, batch: ForwardBatch) -> HookedBlock | None:
        """The hooks inside layer i, if there are any."""
        prefix = f"blocks.{i}."
        if hooks is None or not hooks.within(prefix):
            return None
        return HookedBlock(hooks, prefix, self.layers[i], self.ops, batch)

    def _attention(
        self,
        ops: Ops,
        layer: Layer,
        hidden: Tensor,
        rotary: Rotary | None,
        pages: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        block: HookedBlock | None,
    ) -> Tensor:
        mixer = layer.spec.mixer
        if block is not None:
            block.rows("hook_resid_pre", hidden)
        q = ops.norm_qkv(
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
        if block is not None:
            block.qkv(hidden, rotary, pages, q)
        attended = ops.paged_attention(
            q,
            *pages,
            batch.page_table,
            batch.cu_seqlens,
            batch.context_lens,
            mixer.scale,
            mixer.window,
            mixer.softcap,
            query_lens=batch.query_lens,
        )
        if block is not None:
            block.attended(q, pages, attended)
        out = ops.linear_residual(attended, layer.out, layer.out_bias, layer.attn_post_norm, hidden)
        if block is not None:
            block.added("hook_attn_out", attended, layer.out, layer.out_bias, layer.attn_post_norm, hidden, out)
        return out

    def _mlp(self, ops: Ops, layer: Layer, hidden: Tensor, block: HookedBlock | None) -> Tensor:
        mlp = layer.spec.mlp
        if block is not None:
            block.rows("hook_resid_mid", hidden)
        x = ops.norm_mlp(hidden, layer.mlp_norm, layer.up, layer.up_bias, mlp.activation, mlp.gated)
        if block is not None:
            block.rows("mlp.hook_post", x)
        out = ops.linear_residual(x, layer.down, layer.down_bias, layer.mlp_post_norm, hidden)
        if block is not None:
            block.added("hook_mlp_out", x, layer.down, layer.down_bias, layer.mlp_post_norm, hidden, out)
            block.rows("hook_resid_post", out)
        return out
