"""What the machine would allow: the rates that no implementation of the same arithmetic can exceed.

Decoding is bound by memory (see `handloom.machine.decode_limit`), prefill by arithmetic: the roofline of
Williams, Waterman and Patterson (CACM 52(4), 2009), with both roofs measured.

This module does not know how a model is run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from handloom import machine
from handloom.model.spec import ModelSpec, model_parameters

SIZE = 1536
SECONDS = 0.5


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large square matrix product, the best of half a second's; dtype: floats, or int8 on a
    CPU."""
    size = SIZE if device.type == "cpu" else 8192
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device="cpu").to(device, dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=torch.int32 if dtype == torch.int8 else dtype, device=device)
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    best, until = float("inf"), 0.0
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        product(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        best = min(best, taken) if until else best  # the first one only warms up
        until = until or start + taken + SECONDS
    return 2 * size**3 / best


def prefill_flops(spec: ModelSpec, num_tokens: int) -> int:
    """Floating-point operations of one prompt of `num_tokens` from an empty cache, logits for the last token only.

    Two for each weight of a projection and each token; four for each query, key and dimension of a head
    that causality and the window let meet. Norms, activations and softmax are left out: less than a percent.
    """
    flops = 2 * spec.vocab_size * spec.hidden_size
    for name, parameter in model_parameters(spec).items():
        if name.startswith("layers.") and len(parameter.shape) == 2:
            flops += 2 * parameter.numel * num_tokens
    for layer in spec.layers:
        mixer = layer.mixer
        width = num_tokens if mixer.window is None else min(mixer.window, num_tokens)
        pairs = width * (width + 1) // 2 + (num_tokens - width) * width
        flops += 4 * pairs * mixer.num_heads * mixer.head_dim
    return flops


def decode_flops(spec: ModelSpec, context: int) -> int:
    """Floating-point operations of one decode step of one sequence, which has `context` tokens then."""
    head = 2 * spec.vocab_size * spec.hidden_size
    return prefill_flops(spec, context) - prefill_flops(spec, context - 1) + head


def prefill_limit(spec: ModelSpec, num_tokens: int, rate: float) -> float:
    """Tokens per second that prefill of `num_tokens` cannot exceed at `rate` operations per second."""
    return num_tokens * rate / prefill_flops(spec, num_tokens)


def serving_work(model: machine.Loaded, dtype: torch.dtype, requests: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(floating-point operations, bytes) that these requests of (prompt, new) tokens need, none sharing a prefix.

    Bytes: all K and V that new tokens read, and the weights, as the model holds them, as often as the longest output
    has tokens.
    """
    flops, moved, steps, spec = 0, 0, 0, model.spec
    for prompt, new in requests:
        flops += prefill_flops(spec, prompt + new - 1) + (new - 1) * 2 * spec.vocab_size * spec.hidden_size
        moved += sum(machine.kv_bytes_read(spec, dtype, prompt + at) for at in range(1, new))
        steps = max(steps, new)
    return flops, moved + steps * machine.weight_bytes_per_token(model, dtype)


def serving_seconds(
    model: machine.Loaded, dtype: torch.dtype, requests: Iterable[tuple[int, int]], bandwidth: float, rate: float
) -> float:
    """Seconds in which no schedule does `serving_work`: the larger of all operations at `rate` and all bytes at
    `bandwidth`. Both can only be reached together where they overlap.
    """
    flops, moved = serving_work(model, dtype, requests)
    return max(flops / rate, moved / bandwidth)
