"""transformers as `handloom bench cpu` runs it; see this folder's __init__.py.

As its manual shows it: `generate` with the default cache and scaled dot product attention. It reads the folder or GGUF
file that handloom reads; a GGUF file it dequantises, which takes tens of seconds.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    def __init__(
        self, *, model: str, files: str | None, precision: str, threads: int, max_batch: int, max_tokens: int
    ) -> None:
        if precision not in DTYPES:
            raise SystemExit(f"transformers alone does not compute in {precision} on a CPU")
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        where, is_file = Path(model), model.endswith(".gguf")
        self.model = AutoModelForCausalLM.from_pretrained(
            where.parent if is_file else where,
            dtype=DTYPES[precision],
            attn_implementation="sdpa",
            local_files_only=True,
            **({"gguf_file": where.name} if is_file else {"use_safetensors": True}),
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.about = {"held": str(DTYPES[precision]).split(".")[1], "version": transformers.__version__}

    @torch.no_grad()
    def run(self, *, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device="cpu")
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens
