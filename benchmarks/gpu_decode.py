"""Decoding by batch size, 1 to 256 rows, on seeded random weights in the shapes of real models, made on the device.

    python benchmarks/gpu_decode.py --device cuda --dtype bfloat16 --shapes 0.6b 1b 8b --batch 1 8 64 256
    python benchmarks/report_decode.py benchmarks/results/gpu_decode.jsonl --picture mbu.svg

Peers, in turn on the same weights and prompts: decode steps that are captured; the same launched kernel by kernel (what
capturing brings); gpt-fast's recipe (plain_torch.py); and, with --peers plain dynamic static, transformers with either
cache (hf_peer.py), on weights of its own. Of each: time per step, tokens per second, and MBU, the share of
the memory bandwidth that the bytes of a step (weights once, K and V of every row) make up, against the bandwidth
measured in this run and the nominal one. Of handloom also: the host's share of a step (time not spent waiting for the
device), kernels per step, seconds of capturing, peak memory. Every output's length is checked; no eos ends one. Of
those with the same weights the share of tokens that are handloom's: two random logits are often as good as equal.
A case that fails, or has no memory, is said, and does not keep the next from being measured.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
import handloom as hl
import report_decode
from handloom import machine
from handloom.cache.pages import PagePool
from handloom.decoding.decoder import TokenEvent
from handloom.engine.decode_step import DecodeStep
from handloom.engine.graphs import DecodeGraphs
from handloom.engine.stream import CudaStream, EagerStream, Step, Stream, Wait
from handloom.loading import DTYPES, PAGE_SIZE
from handloom.measure.results import Results
from handloom.measure.speed import check_counts, random_ids
from handloom.measure.stats import interleave
from handloom.model.families import read_config
from handloom.model.spec import model_parameters
from handloom.model.transformer import Transformer
from handloom.ops import choose_backend
from hf_peer import HfPeer
from plain_torch import PlainTorch

# hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, tied head
SHAPES = {
    "tiny": (64, 176, 2, 4, 2, 16, 512, True),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),  # Qwen3-0.6B, without its norms of q and k
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),  # Llama-3.2-1B
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, False),  # Llama-3.1-8B
}
NOMINAL = {"H100 PCIe": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8e12, "A100": 2.04e12}  # bytes per second
CAPTURED, LAUNCHED, PEER = "handloom", "handloom, kernel by kernel", "plain torch, compiled"


class WatchedStream:
    """A stream that counts the seconds in which the host had nothing to do but wait."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.waited = stream, 0.0

    def capture(self, step: Step) -> Step:
        return self.stream.capture(step)

    def upload(self, values: Tensor, into: Tensor) -> None:
        self.stream.upload(values, into)

    def fetch(self, source: Tensor) -> Wait:
        wait = self.stream.fetch(source)

        def timed() -> Tensor:
            started = time.perf_counter()
            values = wait()
            self.waited += time.perf_counter() - started
            return values

        return timed

    def give_memory_back(self) -> None:
        self.stream.give_memory_back()


@dataclass
class Decoded:
    """One timed run. seconds: per step; tokens: of every prompt; host: the share of the time in which it worked."""

    seconds: float
    tokens: list[list[int]]
    host: float | None = None


Generate = Callable[[list[list[int]], int], list[list[int]]]


def config_of(shape: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied = SHAPES[shape]
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocabulary,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "hidden_act": "silu",
        "rope_theta": 500000.0,
    }  # fmt: skip


def make(shape: str, dtype: torch.dtype, device: torch.device, backend: str, tokens: int) -> hl.LM:
    """A llama of that shape with weights drawn on the device, and room for so many tokens."""
    _, spec = read_config(config_of(shape), shape)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, parameter in model_parameters(spec).items():
        drawn = torch.randn(parameter.shape, generator=generator, device=device, dtype=dtype)
        weights[name] = drawn.mul_(0.02) if len(parameter.shape) == 2 else drawn.mul_(0.1).add_(1)
    backend_of_it = choose_backend(device, backend, {layer.mixer.head_dim for layer in spec.layers})
    pool = PagePool(spec, -(-tokens // PAGE_SIZE), PAGE_SIZE, dtype=dtype, device=device)
    return hl.LM(Transformer(spec, weights, backend_of_it), None, pool, name=shape)


def engine_run(lm: hl.LM, stream: WatchedStream, graphs: DecodeGraphs, prompts: list[list[int]], new: int) -> Decoded:
    """The steps from the second token to the last; all prompts run in the first."""
    lm.graphs = graphs
    lm.pool.forget_cached()
    engine = hl.Engine(lm, max_step_tokens=sum(map(len, prompts)))
    tokens: list[list[int]] = [[] for _ in prompts]
    for prompt in prompts:
        engine.add_request(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None)
    started = waited = 0.0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                tokens[event.request_id].append(event.token_id)
        if not started and min(map(len, tokens)) == max(map(len, tokens)) == 2:  # what is captured is captured
            started, waited = time.perf_counter(), stream.waited
    seconds = time.perf_counter() - started
    check_counts("handloom", [len(own) for own in tokens], new)
    return Decoded(seconds / (new - 2), tokens, 1 - (stream.waited - waited) / seconds)


def peer_run(name: str, generate: Generate, prompts: list[list[int]], new: int) -> Decoded:
    """The same steps: what all take, less what two tokens take."""
    seconds, tokens = [], []
    for count in (2, new):
        started = time.perf_counter()
        tokens = generate(prompts, count)
        seconds.append(time.perf_counter() - started)
        check_counts(name, [len(own) for own in tokens], count)
    return Decoded((seconds[1] - seconds[0]) / (new - 2), tokens)


def kernels_per_step(lm: hl.LM, rows: int, width: int) -> int:
    """Kernels and copies that the device runs for one greedy step; 0 where there is no device to count on."""
    step = DecodeStep(lm.transformer, lm.pool, rows, width)
    step.run(drawn=False, cut=False)
    if lm.device.type != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.run(drawn=False, cut=False)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def nominal_bandwidth(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for card, rate in NOMINAL.items() if card in name), None)


def contenders_of(
    lm: hl.LM, prompts: list[list[int]], arguments: argparse.Namespace, hf: dict[str, HfPeer]
) -> tuple[dict[str, Callable[[], Decoded]], DecodeGraphs]:
    """Who is measured, by name; and the captured steps of handloom."""
    on_gpu, new = lm.device.type == "cuda", arguments.new
    found: dict[str, Callable[[], Decoded]] = {}
    graphs: dict[str, DecodeGraphs] = {}
    for name, stream in ((CAPTURED, CudaStream(lm.device) if on_gpu else EagerStream()), (LAUNCHED, EagerStream())):
        watched = WatchedStream(stream)
        graphs[name] = DecodeGraphs(lm.transformer, lm.pool, watched)
        found[name] = lambda w=watched, g=graphs[name]: engine_run(lm, w, g, prompts, new)
    peers: dict[str, Generate] = {f"transformers, {cache} cache": peer.generate for cache, peer in hf.items()}
    if "plain" in arguments.peers:
        weights = {name: weight for name, weight in lm.transformer.weights.items() if isinstance(weight, Tensor)}
        room = arguments.prompt + new
        peers[PEER] = PlainTorch(lm.spec, weights, len(prompts), room, compiled=on_gpu).generate
    for name, generate in peers.items():
        found[name] = lambda n=name, g=generate: peer_run(n, g, prompts, new)
    return found, graphs[CAPTURED]


def measure(
    lm: hl.LM, rows: int, arguments: argparse.Namespace, read: float, results: Results, hf: dict[str, HfPeer]
) -> None:
    """All peers at one batch size."""
    case, prompt, new = f"batch {rows}", arguments.prompt, arguments.new
    prompts = [random_ids(lm.spec.vocab_size, prompt, seed) for seed in range(rows)]
    contenders, graphs = contenders_of(lm, prompts, arguments, hf)
    taken = interleave(contenders, rounds=arguments.rounds)
    moved = machine.weight_bytes_per_token(lm, lm.dtype) + rows * machine.kv_bytes_read(
        lm.spec, lm.dtype, prompt + new // 2
    )
    nominal = nominal_bandwidth(lm.device)
    for name, runs in taken.items():
        seconds = [run.seconds for run in runs]
        results.add(name, case, "step", "ms", [1e3 * s for s in seconds])
        results.add(name, case, "decode", "tok/s", [rows / s for s in seconds])
        results.add(name, case, "MBU, measured", "%", [100 * moved / s / read for s in seconds])
        if nominal is not None:
            results.add(name, case, "MBU, nominal", "%", [100 * moved / s / nominal for s in seconds])
        if name in (LAUNCHED, PEER):
            pairs = [
                pair
                for ours, own in zip(taken[CAPTURED][0].tokens, runs[0].tokens, strict=True)
                for pair in zip(ours, own, strict=True)
            ]
            results.add(name, case, "tokens as handloom's", "%", [100 * sum(a == b for a, b in pairs) / len(pairs)])
        shares = [100 * run.host for run in runs if run.host is not None]
        if shares:
            results.add(name, case, "host's share", "%", shares)
    results.add("limit", case, "decode", "tok/s", [rows * read / moved])
    results.add(CAPTURED, case, "captured in", "s", [graphs.warm_up_seconds])
    if lm.device.type == "cuda":
        results.add(CAPTURED, case, "kernels per step", "", [kernels_per_step(lm, rows, 64)])
        results.add("all", case, "peak memory", "MiB", [torch.cuda.max_memory_reserved(lm.device) / 2**20])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--shapes", nargs="+", default=["0.6b", "1b", "8b"], choices=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--peers", nargs="*", default=["plain"], choices=["plain", "dynamic", "static"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "gpu_decode.jsonl")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    try:
        for shape in arguments.shapes:
            results = common.open_results("decode", arguments.output, device, dtype, model=f"llama {shape}, random")
            lm = make(
                shape,
                dtype,
                device,
                arguments.backend,
                max(arguments.batch) * (arguments.prompt + arguments.new + PAGE_SIZE),
            )
            read = machine.read_bandwidth(device=device)
            caches = [peer for peer in arguments.peers if peer != "plain"]
            hf = {cache: HfPeer(config_of(shape), dtype, device, cache) for cache in caches}
            for batch in arguments.batch:
                try:
                    measure(lm, batch, arguments, read, results, hf)
                except Exception as error:
                    traceback.print_exc()
                    wrong.append(f"{shape}, batch {batch}: {type(error).__name__}: {error}"[:300])
                    torch._dynamo.reset()
                gc.collect()
            rows += results.rows
            del lm, hf
    finally:  # also when interrupted
        print(report_decode.markdown(rows), *(f"failed: {each}\n" for each in wrong), sep="", end="", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
