"""transformers on the same checkpoint: its tokens, its logits, its time.

It is used as its manual shows it: `generate` with the default cache and scaled dot product attention.

This module does not know handloom's model, and compares nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handloom.errors import CheckpointError, MissingDependency
from handloom.measure.speed import Run, check_counts


class Transformers:
    """A model of transformers that is only asked to generate greedily and to score."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device) -> Transformers:
        """From the folder or .gguf file that handloom reads; a GGUF file takes transformers tens of seconds.

        Raises MissingDependency where transformers lacks a package that it needs for GGUF, CheckpointError where it
        does not load the checkpoint.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import is_accelerate_available, is_gguf_available

        # the files alone decide: nothing is fetched, no code runs, no attention kernel is picked by the config
        options: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": "sdpa",
            "local_files_only": True,
            "use_safetensors": True,
        }
        folder = path
        if path.suffix == ".gguf":
            if not (is_accelerate_available() and is_gguf_available()):
                raise MissingDependency(
                    "transformers reads GGUF files only with the packages accelerate and gguf: "
                    "pip install accelerate gguf"
                )
            folder, options["gguf_file"] = path.parent, path.name
            del options["use_safetensors"]
        try:
            return cls(AutoModelForCausalLM.from_pretrained(folder, **options).to(device))
        except (OSError, ValueError) as cause:
            raise CheckpointError(f"transformers does not load {path}: {cause}") from cause

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], tuple[Tensor, ...]]:
        """New tokens of `generate`, and its processed scores [1, vocab_size] at each step."""
        ids = self._tensor([prompt])
        result = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        return result.sequences[0, len(prompt) :].tolist(), result.scores

    @torch.no_grad()
    def last_logits(self, ids: Sequence[int], count: int) -> Tensor:
        """Logits [count, vocab_size] float32 at the last `count` positions of a sequence, in one forward pass."""
        logits: Tensor = self.model(self._tensor([ids]), use_cache=False, logits_to_keep=count).logits[0]
        return logits.float()

    @torch.no_grad()
    def generate_padded(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """`new_tokens` greedy tokens for each prompt in one batch, padded on the left; eos does not stop it."""
        ids, mask = self._padded(prompts)
        with self._without_eos():
            out = self.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
            )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask [n, width] of prompts padded on the left to the longest."""
        width = max(map(len, prompts))
        ids = self._tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        return ids, self._tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """`handloom.measure.speed.run` on transformers: one batch, padded on the left to its longest prompt."""
        ids, mask = self._padded(prompts)
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        clock = _Clock()
        with self._without_eos():
            started = time.perf_counter()
            out = self.model.generate(ids, attention_mask=mask, streamer=clock, **options).cpu()
            ended = time.perf_counter()
        check_counts("transformers", [len(row) - ids.shape[1] for row in out], new_tokens)
        first = clock.times[1] - started  # times[0] is when it was handed the prompt
        return Run(len(prompts), sum(map(len, prompts)), new_tokens, first, first, ended - started)

    @contextmanager
    def _without_eos(self) -> Iterator[None]:
        """`generate` fills an eos that is None from the model's own config, so it has to be None there."""
        config = self.model.generation_config
        before, config.eos_token_id = config.eos_token_id, None
        try:
            yield
        finally:
            config.eos_token_id = before

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.model.device)


class _Clock:
    """A streamer that only notes when it is handed tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Part of the streamer's interface."""
