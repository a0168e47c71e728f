"""Beam search against transformers' `generate(num_beams=…)` on a CPU: time, and bytes of K and V.

    python benchmarks/beams.py --cache ~/.cache/handloom-bench [--beams 8] [--prompt 512] [--new 64] [--threads 2]

The model of cpu_vs_transformers.py, the same prompt ids, eos off, in turn in one process, after a comparison of the
outputs. K and V: here the pages in use, at most at any step, times their bytes; transformers keeps a whole copy of them
for each beam, counted at the length of its last step (what it copies when beams change places is not in it).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of safetensors; default: SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "handloom-bench")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--beams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    args = parser.parse_args()

    import torch

    import handloom as hl
    from common import RESULTS, Rates, open_results
    from cpu_vs_transformers import prepare
    from handloom.machine import kv_bytes_read, weight_bytes_per_token
    from handloom.measure import speed
    from handloom.measure.peer import Transformers
    from handloom.measure.stats import interleave

    torch.set_num_threads(args.threads)
    folder = args.model or prepare(args.cache)
    tokens = 4 * (args.prompt + args.beams * (args.new + 16))
    lm = hl.LM.from_pretrained(folder, dtype="float32", kv_cache_tokens=tokens)
    peer = Transformers.load(folder, torch.float32, torch.device("cpu"))
    ids = speed.random_ids(lm.spec.vocab_size, args.prompt)
    options = {"num_beams": args.beams, "max_new_tokens": args.new, "do_sample": False}
    check_same(lm, peer, ids, options)

    results = open_results("beams", args.output or RESULTS / "beams.jsonl", lm.device, lm.dtype, model=folder.name)
    case = f"{args.beams} beams, prompt {args.prompt}, {args.new} new"
    runs = interleave(
        {"handloom": lambda: ours(lm, ids, options), "transformers": lambda: theirs(peer, ids, options)},
        rounds=args.rounds,
    )
    for name, taken in runs.items():
        results.add(name, case, "time", "s", [seconds for seconds, _ in taken])
    results.add(
        "handloom", case, "K and V", "MiB", [pages * lm.pool.page_bytes / 2**20 for _, pages in runs["handloom"]]
    )
    copies = args.beams * kv_bytes_read(lm.spec, lm.dtype, args.prompt + args.new - 1)
    results.add("transformers", case, "K and V", "MiB", [copies / 2**20])
    rates = Rates.measure(lm.dtype, lm.device, weight_bytes_per_token(lm, lm.dtype))
    rates.tell(results)
    results.add("limit", case, "least time", "s", [least_time(lm, args.prompt, args.beams, args.new, rates)])


def least_time(lm: Any, prompt: int, beams: int, new: int, rates: Any) -> float:
    """Seconds that the machine needs: the prompt's operations, and of each step the slower of its operations and of its
    bytes, the weights and each K and V once, the prompt's shared by all beams."""
    from handloom.machine import kv_bytes_read, weight_bytes_per_token
    from handloom.measure import limits

    seconds = limits.prefill_flops(lm.spec, prompt) / rates.matmul
    weights, shared = weight_bytes_per_token(lm, lm.dtype), kv_bytes_read(lm.spec, lm.dtype, prompt)
    for step in range(1, new):
        moved = weights + shared + beams * kv_bytes_read(lm.spec, lm.dtype, step)
        operations = beams * limits.decode_flops(lm.spec, prompt + step)
        seconds += max(moved / rates.read, operations / rates.matmul)
    return float(seconds)


def ours(lm: Any, ids: list[int], options: dict[str, Any]) -> tuple[float, int]:
    """(seconds, most pages in use at once) of one search, the prompt computed anew."""
    from handloom.engine import Engine

    lm.pool.forget_cached()
    started, pages = time.perf_counter(), 0
    engine = Engine(lm, prefix_cache=False)
    engine.add_request(ids, eos_token_id=None, **options)
    while engine.has_work:
        engine.step()
        pages = max(pages, lm.pool.num_pages - lm.pool.num_free)
    return time.perf_counter() - started, pages


def theirs(peer: Any, ids: list[int], options: dict[str, Any]) -> tuple[float, int]:
    """(seconds, 0) of one search."""
    started = time.perf_counter()
    search(peer, ids, options)
    return time.perf_counter() - started, 0


def search(peer: Any, ids: list[int], options: dict[str, Any], *, output_scores: bool = False) -> Any:
    import torch

    prompt, config = torch.tensor([ids]), peer.model.generation_config
    before, config.eos_token_id = config.eos_token_id, None  # `generate` fills in an eos that is None from there
    try:
        return peer.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, return_dict_in_generate=True,
            output_scores=output_scores, **options,
        )  # fmt: skip
    finally:
        config.eos_token_id = before


def check_same(lm: Any, peer: Any, ids: list[int], options: dict[str, Any]) -> None:
    """Stop unless both find the same output, or one as good: a fast wrong answer is not worth timing."""
    output, result = lm.generate(ids, eos_token_id=None, **options), search(peer, ids, options, output_scores=True)
    score = float(result.sequences_scores[0])
    if output.token_ids != result.sequences[0, len(ids) :].tolist() and abs(output.beams.score - score) > 1e-5:
        raise SystemExit(f"not in parity, so not worth timing: scores {output.beams.score} and {score}")


if __name__ == "__main__":
    main()
