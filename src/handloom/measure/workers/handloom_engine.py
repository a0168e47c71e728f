"""handloom as `handloom bench cpu` runs it; see this folder's __init__.py.

What is timed: scheduling, the forward pass, choosing and detokenising.
"""

from __future__ import annotations

from typing import Any

import torch

import handloom
from handloom import machine
from handloom.lm import LM
from handloom.loading import PAGE_SIZE

OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "gguf": {},
}


class Engine:
    def __init__(
        self, *, model: str, files: str | None, precision: str, threads: int, max_batch: int, max_tokens: int
    ) -> None:
        torch.set_num_threads(threads)
        room = max_batch * (max_tokens + 2 * PAGE_SIZE)
        self.lm = LM.from_pretrained(model, device="cpu", kv_cache_tokens=room, **OPTIONS[precision])
        self.about = {
            "held": ", ".join(self.lm.held),
            "version": handloom.__version__,
            "weight_bytes": machine.weight_bytes_per_token(self.lm, self.lm.dtype),
            "kv_dtype": str(self.lm.dtype).removeprefix("torch."),
        }

    def run(self, *, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        self.lm.pool.forget_cached()
        outputs = self.lm.generate(
            prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, progress=False
        )
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [output.token_ids for output in outputs]
