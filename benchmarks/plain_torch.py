"""A peer: decoding as gpt-fast does it, on the same weights. Plain PyTorch for one architecture (llama: RMSNorm, rotary
positions, grouped heads, gated SiLU), a static cache, and `torch.compile(mode="reduce-overhead")` of the whole step.

Its recipe: pytorch.org/blog/accelerating-generative-ai-2. Greedy; every row has a prompt of the same length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch._dynamo import mark_static_address
from torch.nn import functional as F  # noqa: N812

from handloom.model.rope import inverse_frequencies
from handloom.model.spec import ModelSpec


class PlainTorch:
    """A model with room for `room` tokens in each of `rows` sequences."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], rows: int, room: int, *, compiled: bool) -> None:
        self.spec, self.weights = spec, weights
        embedding = weights["embed.weight"]
        mixer = spec.layers[0].mixer
        assert mixer.rope is not None
        shape = (len(spec.layers), 2, rows, mixer.num_kv_heads, room, mixer.head_dim)
        self.cache = torch.zeros(shape, dtype=embedding.dtype, device=embedding.device)
        angles = torch.arange(room, device=embedding.device)[:, None] * inverse_frequencies(
            mixer.rope, embedding.device
        )
        self.cos, self.sin = angles.cos(), angles.sin()
        self.places = torch.arange(room, device=embedding.device)
        self.decode = self.step
        if compiled:
            for tensor in (self.cache, self.cos, self.sin, self.places, *weights.values()):
                mark_static_address(tensor)  # else a graph would copy them, or not be made since the cache is written
            self.decode = torch.compile(self.step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The first `new_tokens` tokens after each of the prompts, which have one length."""
        ids = torch.tensor(prompts, device=self.places.device)
        found = [self.step(ids, self.places[: ids.shape[1]])]
        for at in range(ids.shape[1], ids.shape[1] + new_tokens - 1):
            found.append(self.decode(found[-1], self.places[at : at + 1]).clone())
        tokens: list[list[int]] = torch.cat(found, 1).tolist()
        return tokens

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids [rows, n] at positions [n] -> the next ids [rows, 1]."""
        weights, eps = self.weights, self.spec.final_norm.eps
        hidden = weights["embed.weight"][ids]
        cos, sin = self.cos[positions], self.sin[positions]
        seen = self.places <= positions[:, None]
        for i in range(len(self.spec.layers)):
            hidden = hidden + self._attention(
                i, _norm(hidden, weights[f"layers.{i}.attn_norm.weight"], eps), positions, cos, sin, seen
            )
            gate, up = F.linear(
                _norm(hidden, weights[f"layers.{i}.mlp_norm.weight"], eps), weights[f"layers.{i}.up.weight"]
            ).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, weights[f"layers.{i}.down.weight"])
        last = _norm(hidden[:, -1:], weights["final_norm.weight"], eps)
        head = weights["embed.weight" if self.spec.tied_head else "head.weight"]
        return F.linear(last, head).float().argmax(-1)

    def _attention(self, i: int, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Tensor:
        mixer = self.spec.layers[i].mixer
        qkv = F.linear(x, self.weights[f"layers.{i}.qkv.weight"])
        heads = qkv.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
        q, k, v = heads.split((mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads), dim=1)
        keys, values = self.cache[i]
        keys[:, :, positions] = _rotate(k, cos, sin)
        values[:, :, positions] = v
        out = F.scaled_dot_product_attention(
            _rotate(q, cos, sin), keys, values, attn_mask=seen, scale=mixer.scale, enable_gqa=True
        )
        return F.linear(out.transpose(1, 2).flatten(2), self.weights[f"layers.{i}.out.weight"])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
