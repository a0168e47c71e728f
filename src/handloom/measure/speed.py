"""How long generation takes, and how much memory the process has taken.

What is timed is the whole way from token ids in to token and text out: scheduling, the forward pass, choosing
(greedy) and detokenising. Tokenising the prompt is not in it, for prompts are token ids.

This module does not know limits, tables, or other engines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from handloom.errors import ContextOverflow, RequestFailed
from handloom.lm import LM


@dataclass(frozen=True, slots=True)
class Run:
    """One timed generation of `new_tokens` tokens for each of `num_prompts` prompts of `prompt_tokens` in all.

    Seconds from the call: first, until the first token was chosen; first_text, until the first non-empty
    piece of text (the first token where none came); total, until the last token.
    """

    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    first: float
    first_text: float
    total: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second until the first token."""
        return self.prompt_tokens / self.first

    @property
    def decode_rate(self) -> float:
        """Tokens per second of each prompt after its first token; needs at least two."""
        return (self.new_tokens - 1) / (self.total - self.first)

    @property
    def output_rate(self) -> float:
        """New tokens of all prompts per second of the whole run, prefill included."""
        return self.num_prompts * self.new_tokens / self.total


def random_ids(vocab_size: int, length: int, seed: int = 0) -> list[int]:
    """Token ids drawn evenly from the vocabulary; the same for the same arguments, on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator, device="cpu").tolist()


def run(lm: LM, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
    """Generate exactly `new_tokens` greedy tokens for each prompt, in one batch; eos does not stop it.

    Raises ContextOverflow if that does not fit the context, RequestFailed if a prompt yields another number
    of tokens, and what LM.stream raises.
    """
    check_room(lm, max(map(len, prompts)), new_tokens)
    lm.pool.forget_cached()  # every run computes its whole prompt
    counts, first, first_text = [0] * len(prompts), 0.0, 0.0
    started = time.perf_counter()
    stream = lm.stream([list(ids) for ids in prompts], max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    for piece in stream:
        if piece.error is not None:
            raise piece.error
        if piece.token_id is not None:
            counts[piece.index] += 1
            first = first or time.perf_counter()
        if piece.text:
            first_text = first_text or time.perf_counter()
    ended = time.perf_counter()
    check_counts("handloom", counts, new_tokens)
    prompt_tokens = sum(map(len, prompts))
    text = first_text or first
    return Run(len(prompts), prompt_tokens, new_tokens, first - started, text - started, ended - started)


def check_room(lm: LM, prompt_tokens: int, new_tokens: int) -> None:
    """Raises ContextOverflow where prompt and new tokens do not fit."""
    if prompt_tokens + new_tokens > lm.max_context:
        raise ContextOverflow(
            f"measuring {prompt_tokens} prompt tokens and {new_tokens} new ones needs a context of "
            f"{prompt_tokens + new_tokens}, and this model's holds {lm.max_context}; ask for fewer tokens"
        )


def check_counts(who: str, counts: Sequence[int], new_tokens: int) -> None:
    """Raises RequestFailed unless every prompt got exactly `new_tokens`: other numbers would make rates lies."""
    if any(count != new_tokens for count in counts):
        raise RequestFailed(f"{who} generated {list(counts)} tokens; {new_tokens} were to be timed for each prompt")


def peak_memory() -> int:
    """Most physical memory this process has held at any time, in bytes.

    It counts everything resident: Python and its libraries, weights, the part of the KV cache that was
    written to, temporaries, and pages of mapped files that were read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def peak_device_memory(device: torch.device) -> int | None:
    """Most memory torch has held on a GPU, in bytes; None for a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
