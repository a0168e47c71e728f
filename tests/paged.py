"""Page pools for tests: one of any shape, and one poisoned with NaN that holds ragged sequences for attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handloom.cache.pages import PagePool
from handloom.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

SHAPES = ((2, 3), (1, 5), (2, 3))


def pool_of(num_pages: int, page_size: int = 4, shapes: Sequence[tuple[int, int]] = SHAPES) -> PagePool:
    """A float64 pool for layers of these (num_kv_heads, head_dim)."""
    norm = NormSpec("rms", 1e-5)
    layers = [
        LayerSpec(AttentionSpec(heads, heads, head_dim, 1.0, None), MlpSpec(4, "relu", False), norm)
        for heads, head_dim in shapes
    ]
    spec = ModelSpec("test", 16, 8, 1 << 20, tuple(layers), norm, tied_head=True)
    return PagePool(spec, num_pages, page_size, dtype=torch.float64, device=torch.device("cpu"))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers from torch's generator."""
    return torch.randn(*shape).to(dtype)


@dataclass
class Paged:
    """Queries [new, num_heads, head_dim], keys and values [length, num_kv_heads, head_dim] per sequence; their pool."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor

    @classmethod
    def make(
        cls,
        *,
        lengths: Sequence[int],
        new: Sequence[int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> Paged:
        """Random sequences of these lengths, the last new[i] tokens of each being queries."""
        queries = [draw(n, num_heads, head_dim, dtype=dtype) for n in new]
        keys, values = ([draw(n, num_kv_heads, head_dim, dtype=dtype) for n in lengths] for _ in "kv")
        return cls.lay_out(queries, keys, values, page_size)

    @classmethod
    def lay_out(
        cls, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], page_size: int = 16, shuffle: bool = True
    ) -> Paged:
        """Write keys and values into pages in random (or rising) order; every other slot of the pool is NaN."""
        counts = [-(-len(k) // page_size) for k in keys]
        num_pages = sum(counts) + 3
        order = torch.randperm(num_pages) if shuffle else torch.arange(num_pages)
        owned = order[: sum(counts)].split(counts)
        pools = []
        for content in (keys, values):
            pages = torch.full((num_pages, page_size, *keys[0].shape[1:]), math.nan, dtype=keys[0].dtype)
            for page_ids, tokens in zip(owned, content, strict=True):
                for at, page in enumerate(page_ids.tolist()):
                    part = tokens[at * page_size : (at + 1) * page_size]
                    pages[page, : len(part)] = part
            pools.append(pages)
        table = torch.zeros(len(keys), max(counts), dtype=torch.int64)
        for row, page_ids in zip(table, owned, strict=True):
            row[: len(page_ids)] = page_ids
        return cls(queries, keys, values, pools[0], pools[1], table)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `paged_attention` takes, up to and including context_lens."""
        counts = torch.tensor([len(q) for q in self.queries])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        lengths = torch.tensor([len(k) for k in self.keys])
        return torch.cat(self.queries), self.k_pages, self.v_pages, self.page_table, starts, lengths
