"""What each rule that reshapes scores costs per token, beside transformers' processor for it.

    python benchmarks/rules.py [--vocab 49152] [--context 2000] [--threads 1] [--output rules.jsonl]

One row, a new token a step; both see the same scores and ids, in turn in one process, and start with the rule's tables
made. The best of the steps counts. Each gets its ids as it has them in generating: transformers a tensor, handloom a
list that grows. Of guidance it is what is done with the two rows of logits, which a stub for the model gives.

The last two rows are the choice itself, without a rule: what `generate` does with a row of scores to take the highest,
or to draw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation.utils import GenerationMixin

from common import open_results
from handloom.ops.cpu import compiled_step
from handloom.sampling.params import resolve_params
from handloom.sampling.rules import Row, apply_rules
from handloom.sampling.sampler import choose

STEPS, EOS = 30, 1
OPTIONS: dict[str, Any] = {
    "guidance_scale": 1.5,
    "sequence_bias": {**{(i, i + 1, i + 2): 1.0 for i in range(100)}, **{(i,): 1.0 for i in range(100)}},
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[i, i + 1] for i in range(100)],
    "min_length": 2**19,
    "min_new_tokens": STEPS + 1,
    "prefix_allowed_tokens_fn": lambda batch_id, ids: [5, 6, 7],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (0, 1.01),
    "suppress_tokens": list(range(2, 102)),
    "begin_suppress_tokens": list(range(2, 102)),
    "temperature": 0.7,
    "top_h": 0.5,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "watermark": WatermarkingConfig(),
    "watermark, selfhash": WatermarkingConfig(seeding_scheme="selfhash"),
    "watermark, SynthID": SynthIDTextWatermarkingConfig(ngram_len=5, keys=list(range(30))),
    "renormalize_logits": True,
}
CHOICES = {"highest": {"do_sample": False}, "draw": {"do_sample": True, "top_k": 0, "seed": 0}}
SAMPLED = {"temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


class NoModel(GenerationMixin):
    """As much of a model as `_get_logits_processor` reads."""

    def __init__(self, vocab_size: int) -> None:
        class Config:
            is_encoder_decoder = False

            def get_text_config(self) -> Config:
                return self

        self.config = Config()
        self.config.vocab_size = vocab_size
        self.logits = unconditional(vocab_size)

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        class Output(SimpleNamespace):
            get = dict[str, Any]().get

        return Output(logits=self.logits[None])


def unconditional(vocab_size: int) -> torch.Tensor:
    return torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1)) * 4


def options_of(name: str) -> dict[str, Any]:
    if name in CHOICES:
        return CHOICES[name]
    options = {name.split(",")[0].replace("watermark", "watermarking_config"): OPTIONS[name]}
    return {"top_k": 0, "do_sample": True, **options} if name in SAMPLED else options


def ours(name: str, prompt: list[int], vocab_size: int) -> Callable[[list[int], torch.Tensor], None]:
    longest = 2**19 - len(prompt) if name == "min_length" else STEPS + 1
    params = resolve_params(
        {**options_of(name), "max_new_tokens": longest}, generation_config={}, prompt_length=len(prompt),
        max_context=2**20, vocab_size=vocab_size, eos_token_id=EOS,
    )  # fmt: skip
    row = Row(params, prompt, len(prompt))
    if name == "guidance_scale":
        row.unconditional = unconditional(vocab_size)[0]

    def step(ids: list[int], scores: torch.Tensor) -> None:
        row.token_ids = ids
        if name in CHOICES:
            choose(scores, [row])
        else:
            apply_rules(scores, [row])

    return step


def theirs(name: str, prompt: list[int], vocab_size: int) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    if name == "highest":
        return lambda ids, scores: torch.argmax(scores, dim=-1).item()
    if name == "draw":
        return lambda ids, scores: torch.multinomial(scores.softmax(dim=-1), num_samples=1).item()
    options = options_of(name)
    allowed = options.pop("prefix_allowed_tokens_fn", None)
    config = GenerationConfig(num_beams=1, max_length=len(prompt) + STEPS + 1, **options)
    config._eos_token_tensor = torch.tensor([EOS])
    processors: Callable[..., Any] = NoModel(vocab_size)._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([prompt]), device="cpu",
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    return processors


def measure(name: str, vocab_size: int, context: int) -> tuple[list[float], list[float]]:
    """(ours, theirs): seconds of each step but the first."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(EOS + 1, vocab_size, (context + STEPS,), generator=generator).tolist()
    scores = torch.randn(1, vocab_size, generator=generator) * 4
    steps = ours(name, ids[:context], vocab_size), theirs(name, ids[:context], vocab_size)
    taken: tuple[list[float], list[float]] = [], []
    grown = ids[:context]
    for length in range(context, context + (6 if "selfhash" in name else STEPS)):
        for who, given in enumerate((grown, torch.tensor([grown]))):
            own = scores.clone()
            start = time.perf_counter()
            steps[who](given, own)
            if length > context:
                taken[who].append(time.perf_counter() - start)
        grown.append(ids[length])
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append rows of results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"vocabulary {args.vocab}, context {args.context}, {args.threads} threads; microseconds a token")
    compiled_step()
    labels = {"vocab_size": args.vocab, "context": args.context}
    results = open_results("rules", args.output, torch.device("cpu"), torch.float32, **labels)
    results.show = lambda line: None
    for name in (*OPTIONS, *CHOICES):
        mine, other = measure(name, args.vocab, args.context)
        ratio = min(mine) / min(other)
        for peer, taken in (("handloom", mine), ("transformers", other)):
            case = f"{name}, vocabulary {args.vocab}, context {args.context}"
            results.add(peer, case, "time per token", "µs", [1e6 * each for each in taken], best=1e6 * min(taken))
        print(f"{name:34} {min(mine) * 1e6:10.0f} transformers {min(other) * 1e6:10.0f}  ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
