"""Speculative decoding against decoding without it on a CPU, one request at a time: tokens per second, acceptance.

    python benchmarks/speculation.py --cache ~/.cache/handloom-bench [--new 128] [--threads 2] [--drafters suffix …]

The model of cpu_vs_transformers.py, in turn in one process, the same tokens each way (checked). Two kinds of text: one
that goes on with what the prompt has twice, where drafts are right for long stretches, and one in which nothing comes
twice, a story drawn at temperature 1, where the promise is to be no slower. Rates are of the tokens after the
first; the prompt is computed anew each time. "draft model" is the same model with its weights in int4.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

THREADS = 2
PASSAGE = """\
def load_orders(path, currency="EUR"):
    orders = []
    with open(path) as file:
        for line in file:
            number, customer, amount = line.strip().split(";")
            orders.append({"number": int(number), "customer": customer, "amount": float(amount)})
    return [order for order in orders if order["amount"] > 0]


def total_by_customer(orders):
    totals = {}
    for order in orders:
        totals[order["customer"]] = totals.get(order["customer"], 0.0) + order["amount"]
    return totals
"""
AGAIN = "\n\n# The same file, with a new customer:\n\n"
STORY = "The lighthouse keeper had found a letter from a stranger, and nothing in it was what he had expected."
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text to copy": (PASSAGE + AGAIN + PASSAGE + AGAIN, {"do_sample": False}),
    "nothing to copy": (STORY, {"temperature": 1.0, "top_k": 0, "seed": 1}),
}
DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 10},
    "suffix": {"speculation": "suffix"},
    "draft model": {"num_assistant_tokens": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of safetensors; default: SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "handloom-bench")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=list(DRAFTERS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    args = parser.parse_args()

    import torch

    import handloom as hl
    from common import RESULTS, open_results
    from cpu_vs_transformers import prepare

    torch.set_num_threads(args.threads)
    folder = args.model or prepare(args.cache)
    lm = hl.LM.from_pretrained(folder, dtype="float32", kv_cache_tokens=2048)
    ways: dict[str, dict[str, Any]] = {"without": {}, **{name: DRAFTERS[name] for name in args.drafters}}
    if "draft model" in ways:
        assistant = hl.LM.from_pretrained(folder, quantize="int4", kv_cache_tokens=2048)
        ways["draft model"] = {**ways["draft model"], "assistant_model": assistant}

    results = open_results(
        "speculation", args.output or RESULTS / "speculation.jsonl", lm.device, lm.dtype, model=folder.name
    )
    for case in args.cases:
        text, options = CASES[case]
        options = {**options, "max_new_tokens": args.new, "eos_token_id": None}
        add_case(results, case, lm, lm.encode(text).token_ids, options, ways, args.rounds)


def add_case(
    results: Any,
    case: str,
    lm: Any,
    ids: list[int],
    options: dict[str, Any],
    ways: dict[str, dict[str, Any]],
    rounds: int,
) -> None:
    """Rows of one text: tokens per second every way, and the gain over those without speculation in the same round."""
    from handloom.measure.stats import interleave

    expected = lm.generate(ids, **options).token_ids
    calls = {name: partial(timed, lm, ids, {**options, **how}, expected) for name, how in ways.items()}
    runs = interleave(calls, rounds=rounds)
    plain = [rate for rate, _, _ in runs["without"]]
    for name, taken in runs.items():
        results.add(name, case, "decode", "tok/s", [rate for rate, _, _ in taken])
        if name != "without":
            gains = [rate / before for (rate, _, _), before in zip(taken, plain, strict=True)]
            results.add(name, case, "gain", "x", gains)
            results.add(name, case, "drafted", "tokens", [drafted for _, drafted, _ in taken])
            results.add(name, case, "accepted", "tokens", [accepted for _, _, accepted in taken])


def timed(lm: Any, ids: list[int], options: dict[str, Any], expected: list[int]) -> tuple[float, float, float]:
    """(tokens per second after the first, drafted, accepted). Stops the benchmark where the tokens are others."""
    lm.pool.forget_cached()
    output = lm.generate(ids, **options)
    if output.token_ids != expected:
        raise SystemExit("the tokens are not those without speculation, so not worth timing")
    drafted, accepted = (0, 0) if output.drafts is None else (output.drafts.drafted, output.drafts.accepted)
    return output.timing.decode_tokens_per_second, drafted, accepted


if __name__ == "__main__":
    main()
