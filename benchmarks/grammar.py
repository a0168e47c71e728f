"""What a grammar costs per token on a CPU: decoding with and without one, and the time of a mask.

    python benchmarks/grammar.py --cache ~/.cache/handloom-bench [--batch 1] [--rounds 5] [--threads 2]

The model of cpu_vs_transformers.py. For each grammar the same prompts are continued with it, and by as many tokens
without it, in turn in one process; the cost is how much longer a token takes. A mask is what a row takes in the
sampler: the parser goes on by a token, finds all that may come next, and the others' scores go to -inf.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

THREADS, NEW_TOKENS = 2, 64
GRAMMARS: dict[str, dict[str, Any]] = {
    "json_schema": {
        "json_schema": {
            "type": "object",
            "properties": {
                "title": {"type": "string", "minLength": 20, "maxLength": 60},
                "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
                "kind": {"enum": ["novel", "poem", "play", "essay"]},
                "people": {
                    "type": "array",
                    "minItems": 2,
                    "maxItems": 4,
                    "items": {
                        "type": "object",
                        "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer"}},
                        "required": ["name", "age"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["title", "year", "kind", "people"],
            "additionalProperties": False,
        }
    },
    "regex": {"regex": r"([A-Z][a-z]{1,12}( [a-z]{1,12}){3,9}[.?!] ){8,}"},
    "grammar": {
        "grammar": 'start: sum\nsum: term | sum (" + " | " - ") term\nterm: N | "(" sum ")"\nN: /[0-9]{1,6}/\n'
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of safetensors; default: SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "handloom-bench")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    args = parser.parse_args()

    import torch

    import handloom as hl
    from common import RESULTS, open_results
    from cpu_vs_transformers import prepare
    from handloom.measure.stats import interleave, percentile

    torch.set_num_threads(args.threads)
    folder = args.model or prepare(args.cache)
    lm = hl.LM.from_pretrained(folder, dtype="float32", kv_cache_tokens=256 * args.batch)
    results = open_results("grammar", args.output or RESULTS / "grammar.jsonl", lm.device, lm.dtype, model=folder.name)
    prompts = [f"Number {at}: an example of what was asked for follows.\n" for at in range(args.batch)]
    for name, options in GRAMMARS.items():
        outputs = lm.generate(prompts, max_new_tokens=NEW_TOKENS, progress=False, **options)
        made = [output.token_ids for output in outputs]
        lengths = [{"max_new_tokens": len(own), "eos_token_id": None} for own in made]

        def run(own: dict[str, Any], lengths: list[dict[str, Any]] = lengths) -> float:
            started = time.perf_counter()
            lm.generate(prompts, params=lengths, progress=False, **own)
            return (time.perf_counter() - started) / sum(length["max_new_tokens"] for length in lengths)

        case = f"{name}, {args.batch} at once, {sum(map(len, made))} tokens"
        runs = interleave({"with": lambda own=options: run(own), "without": lambda: run({})}, rounds=args.rounds)
        for which, seconds in runs.items():
            results.add("handloom", case, f"time per token {which}", "ms", [1e3 * own for own in seconds])
        masks = [1e6 * own for ids in made for own in mask_times(lm, options, ids)]
        results.add("handloom", case, "mask", "µs", masks, p99=percentile(masks, 99))
        with_one, without = (sorted(runs[which])[args.rounds // 2] for which in ("with", "without"))
        print(
            f"{case}: {100 * (with_one / without - 1):+.1f} % per token; a mask takes {percentile(masks, 50):.0f} µs, "
            f"the 99th percentile is {percentile(masks, 99):.0f}"
        )


def mask_times(lm: Any, options: dict[str, Any], token_ids: list[int]) -> list[float]:
    """Seconds that the mask of each token of an output takes, the first not counted among them."""
    import torch

    from handloom.sampling.grammar import constrain
    from handloom.sampling.options import Options
    from handloom.sampling.structure_options import read_structure

    read = read_structure(Options(options, {}, frozenset(options)), lm.grammars.compile)
    matcher = next(grammar for grammar in read.values() if grammar).start()
    scores = torch.randn(1, lm.spec.vocab_size, generator=torch.Generator().manual_seed(0))
    times = []
    for length in range(len(token_ids)):
        own = scores.clone()
        started = time.perf_counter()
        matcher.follow(token_ids[:length])
        constrain(own, [matcher], [(lm.spec.eos_token_ids or (0,))])
        times.append(time.perf_counter() - started)
    return times[1:]


if __name__ == "__main__":
    main()
