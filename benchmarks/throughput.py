"""Many requests at once on a CPU: handloom against the best that transformers does with the same requests.

    python benchmarks/throughput.py --cache ~/.cache/handloom-bench

By default 64 requests of 64 to 512 prompt tokens and 32 to 256 new ones, drawn with a seed, on SmolLM2-135M-Instruct in
float32 with 2 threads. transformers serves them by `generate` on padded batches of several sizes (requests of like
outputs share one) and by its continuous batching; "transformers" in the results is the fastest of these, and each has
rows of its own. All run in one process, in turn; greedy, eos off; every number of tokens is checked, and parity is
before anything of transformers is timed. Then the prefix cache: what it costs where no prompts begin alike, and the
time to the first token where all do. Takes about half an hour on 2 cores; fewer requests take less.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

THREADS = 2
BATCHES = (4, 8, 16, 32)


@contextmanager
def watch(who: str, total: int) -> Iterator[Any]:
    """A line per twentieth of the tokens on standard error."""
    told = 0

    def progress(done: int) -> None:
        nonlocal told
        if done * 20 // total > told:
            told = done * 20 // total
            print(f"{who}: {done} of {total} tokens", file=sys.stderr, flush=True)

    yield progress


def throughput_case(lm: Any, folder: Path, arguments: argparse.Namespace, results: Any) -> None:
    """Rates of everybody, and handloom's latencies, pages and memory."""
    import torch

    import common
    from handloom import machine
    from handloom.measure import limits, peer_serving, workload
    from handloom.measure.peer import Transformers

    prompts, outputs = (workload.Lengths.parse(text) for text in (arguments.prompt_tokens, arguments.new_tokens))
    requests = workload.draw(lm.spec.vocab_size, arguments.requests, prompts, outputs, arguments.seed)
    case = f"{len(requests)} requests, {prompts} in, {outputs} out"

    def load_peer() -> Transformers:
        peer = Transformers.load(folder, torch.float32, torch.device("cpu"))
        common.check_same_tokens(lm, peer, requests[0].prompt, min(requests[0].new_tokens, 32))
        return peer

    found = peer_serving.in_turn(
        lm, requests, watch, repeat=arguments.rounds, load_peer=load_peer, batch_sizes=arguments.batches
    )
    read = machine.read_bandwidth(device=lm.device, nbytes=machine.weight_bytes_per_token(lm, lm.dtype))
    rate = limits.matmul_rate(lm.dtype, lm.device)
    print(f"failed: {found.failed or 'none'}", file=sys.stderr)
    add_comparison(found, lm, requests, case, read, rate, results)


def add_comparison(
    found: Any, lm: Any, requests: Sequence[Any], case: str, bandwidth: float, rate: float, results: Any
) -> None:
    """Rows of a `peer_serving.Comparison`; "transformers" is the fastest of its ways."""
    from handloom.measure import limits, stats

    sizes = [(len(request.prompt), request.new_tokens) for request in requests]
    fastest = limits.serving_seconds(lm, lm.dtype, sizes, bandwidth, rate)
    everybody = {"handloom": found.ours}
    if found.theirs:
        best = max(found.theirs, key=lambda name: stats.summarize([run.output_rate for run in found.theirs[name]]).p50)
        print(f"best of transformers: {best}", file=sys.stderr)
        everybody |= {"transformers": found.theirs[best], **found.theirs}
    tokens = {"new tokens": sum(new for _, new in sizes), "all tokens": sum(map(sum, sizes)), "requests": len(sizes)}
    for metric, count in tokens.items():
        unit = "req/s" if metric == "requests" else "tok/s"
        for who, runs in everybody.items():
            results.add(who, case, metric, unit, [count / run.seconds for run in runs])
        results.add("limit", case, metric, unit, [count / fastest])
    served = [request for run in found.ours for request in run.served]
    times = {
        "ttft": [request.ttft for request in served],
        "tpot": [request.tpot for request in served if request.tpot is not None],
        "itl": [gap for request in served for gap in request.gaps],
    }
    for metric, seconds in times.items():
        results.add("handloom", case, metric, "ms", [1e3 * value for value in seconds])
        results.add("handloom", case, f"{metric} p99", "ms", [1e3 * stats.percentile(seconds, 99)])
    pool = sum(storage.nbytes for storage in lm.pool.storages.values())
    weights = sum(weight.nbytes for weight in lm.transformer.weights.held.values())
    results.add("handloom", case, "pages, peak", "pages", [run.peak_pages for run in found.ours])
    results.add("limit", case, "pages, peak", "pages", [lm.pool.num_pages])
    results.add("handloom", case, "peak memory", "MiB", [found.peak_memory / 2**20])
    results.add("handloom", case, "weights and KV pool", "MiB", [(weights + pool) / 2**20])


def prefix_case(lm: Any, arguments: argparse.Namespace, results: Any) -> None:
    """The prefix cache's cost without hits, and what it brings with them."""
    from handloom.measure import prefixes

    sizes = {"shared": 256, "own": 32, "new_tokens": 16}
    if arguments.small:
        sizes = {"shared": 32, "own": 8, "new_tokens": 2}
    found = prefixes.measure(lm, count=8, rounds=arguments.prefix_rounds, **sizes)
    case = f"8 requests, {sizes['shared']} shared + {sizes['own']} in, {sizes['new_tokens']} out"
    results.add("handloom", case, "cost of the prefix cache at 0% hits", "%", [100 * cost for cost in found.costs])
    results.add("handloom", case, "hit rate", "%", [100 * found.hit_rate])
    for name, taken in (("off", found.cold), ("on", found.warm)):
        seconds = [run.served[0].ttft for runs in taken for run in runs]
        results.add("handloom", case, f"ttft, prefix cache {name}", "ms", [1e3 * value for value in seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/handloom-bench").expanduser())
    parser.add_argument("--model", type=Path, help="another folder of safetensors")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", default="64-512")
    parser.add_argument("--new-tokens", default="32-256")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES, help="transformers' padded batches")
    parser.add_argument("--kv-cache-tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prefix-rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="default: results/throughput.jsonl")
    arguments = parser.parse_args()
    if arguments.small:
        small = {"requests": 4, "prompt_tokens": "4-20", "new_tokens": "2-6", "batches": [2], "prefix_rounds": 1}
        vars(arguments).update(small, kv_cache_tokens=512)

    import torch
    import transformers

    import common
    import handloom as hl
    import report
    from cpu_vs_transformers import prepare

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = arguments.model or prepare(arguments.cache)
    file = arguments.output or common.RESULTS / "throughput.jsonl"
    results = common.open_results("throughput", file, torch.device("cpu"), torch.float32, model=folder.name)
    lm = hl.LM.from_pretrained(folder, dtype="float32", device="cpu", kv_cache_tokens=arguments.kv_cache_tokens)
    throughput_case(lm, folder, arguments, results)
    prefix_case(lm, arguments, results)
    print(report.markdown(results.rows), end="")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
