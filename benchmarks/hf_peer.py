"""A peer: transformers' `generate` on a model of the same shape, with its dynamic cache, or its static one, for which
it compiles the forward pass on a GPU. Its weights are its own: speed does not depend on what they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class HfPeer:
    """cache: "dynamic" or "static". Greedy; every row has a prompt of the same length; no eos ends one."""

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, cache: Literal["dynamic", "static"]
    ) -> None:
        options = {name: value for name, value in config.items() if name != "model_type"}
        with device:
            model = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="sdpa"))
        self.model, self.cache = model.to(dtype).eval(), cache
        self.model.generation_config.eos_token_id = None

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        ids = torch.tensor(prompts, device=self.model.device)
        options: dict[str, Any] = {} if self.cache == "dynamic" else {"cache_implementation": "static"}
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **options,
        )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows
