"""What a token costs in each way of choosing, beside transformers' `generate` in the same way, on a CPU.

    python benchmarks/modes.py --cache ~/.cache/handloom-bench [--new 32] [--rounds 3] [--threads 2]

The model of cpu_vs_transformers.py, the same prompt, eos off, in turn in one process; the prompt counts. Where nothing
is drawn the outputs are compared first. With several outputs it is the time of a step for all of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from beams import search
from speculation import AGAIN, PASSAGE

THREADS = 2
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": DRAWN,
    "4 samples": {**DRAWN, "num_return_sequences": 4},
    "4 beams": {"do_sample": False, "num_beams": 4},
    "4 sampled beams": {**DRAWN, "num_beams": 4},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of safetensors; default: SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "handloom-bench")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    args = parser.parse_args()

    import torch

    import handloom as hl
    from common import RESULTS, open_results
    from cpu_vs_transformers import prepare
    from handloom.measure.peer import Transformers
    from handloom.measure.stats import interleave

    torch.set_num_threads(args.threads)
    folder = args.model or prepare(args.cache)
    lm = hl.LM.from_pretrained(folder, dtype="float32", kv_cache_tokens=4096)
    peer = Transformers.load(folder, torch.float32, torch.device("cpu"))
    ids = lm.tokenizer.encode(PASSAGE + AGAIN + PASSAGE[:40])
    results = open_results("modes", args.output or RESULTS / "modes.jsonl", lm.device, lm.dtype, model=folder.name)
    for mode, own in MODES.items():
        options = {"max_new_tokens": args.new, **own}
        if not own["do_sample"]:
            check_same(lm, peer, ids, mode, options)
        taken = interleave(
            {
                "handloom": lambda options=options: ours(lm, ids, options),
                "transformers": lambda options=options: theirs(peer, ids, options),
            },
            rounds=args.rounds,
        )
        for name, seconds in taken.items():
            case = f"{mode}, prompt {len(ids)}, {args.new} new"
            results.add(name, case, "time per token", "ms", [1e3 * each / args.new for each in seconds])


def ours(lm: Any, ids: list[int], options: dict[str, Any]) -> float:
    """Seconds of one call, the prompt computed anew."""
    lm.pool.forget_cached()
    started = time.perf_counter()
    lm.generate(ids, eos_token_id=None, **options)
    return time.perf_counter() - started


def theirs(peer: Any, ids: list[int], options: dict[str, Any]) -> float:
    started = time.perf_counter()
    search(peer, ids, options)
    return time.perf_counter() - started


def check_same(lm: Any, peer: Any, ids: list[int], mode: str, options: dict[str, Any]) -> None:
    """Stop unless both give the same tokens: a fast wrong answer is not worth timing."""
    mine = lm.generate(ids, eos_token_id=None, **options).token_ids
    if mine != search(peer, ids, options).sequences[0, len(ids) :].tolist():
        raise SystemExit(f"{mode}: not in parity, so not worth timing")


if __name__ == "__main__":
    main()
