"""Records what transformers 4.55, the last release that has them, gives for contrastive search and DoLa: contrast.json.

    pip install "transformers==4.55.4" torch
    python tests/data/record_contrast.py

The models are the tiny random ones of tests/tiny_models.py, with these overrides; a prompt is random_ids(seed, length).
`greedy` are the tokens of plain greedy decoding, by which a test knows that it has the same model. Of each case the new
tokens are recorded, and the processed score of each. This file is not a test and needs nothing of handloom.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tiny_models import TINY, random_ids  # noqa: E402

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, 6 layers": ("llama", {"num_hidden_layers": 6}),
    "llama, 1 layer": ("llama", {"num_hidden_layers": 1}),
    "llama, tied": ("llama", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "llama, 43 layers": ("llama", {"num_hidden_layers": 43, "hidden_size": 18, "intermediate_size": 16}),
    "gpt2": ("gpt2", {}),
    "gpt2, 7 layers": ("gpt2", {"n_layer": 7}),
    "gpt2, 2 layers": ("gpt2", {"n_layer": 2}),
    "gemma3_text": ("gemma3_text", {}),
}
PROMPTS = [(1, 12), (2, 1), (3, 25)]
EOS = list(range(4, 331, 30))
BASE: dict[str, Any] = {"max_new_tokens": 14, "eos_token_id": EOS}
CONTRASTIVE: list[dict[str, Any]] = [
    {"penalty_alpha": 0.6, "top_k": 4},
    {"penalty_alpha": 0.3, "top_k": 7, "eos_token_id": None},
    {"penalty_alpha": 1.0, "top_k": 3, "eos_token_id": None},
    {"penalty_alpha": 0.05, "top_k": 2},
    {"penalty_alpha": 0.6},
    {"penalty_alpha": 0.5, "top_k": 5, "repetition_penalty": 1.3, "min_new_tokens": 6},
    {"penalty_alpha": 0.7, "top_k": 6, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(0, 200, 2))},
]
DOLA: list[dict[str, Any]] = [
    {"dola_layers": "low"},
    {"dola_layers": "high"},
    {"dola_layers": "high", "repetition_penalty": 1.2, "eos_token_id": None},
    {"dola_layers": [0]},
    {"dola_layers": [1, 2]},
    {"dola_layers": "high", "no_repeat_ngram_size": 2, "min_new_tokens": 8},
    {"dola_layers": "high", "do_sample": True, "temperature": 1.4, "top_k": 0},
]


def main() -> None:
    """Write contrast.json."""
    record: dict[str, Any] = {"transformers": transformers.__version__, "models": []}
    for name, (family, overrides) in MODELS.items():
        model = TINY[family](0, **overrides)
        if family == "gemma3_text":  # this release makes Gemma's norms of ones, which stand for twos
            for weight in (weight for weight in model.parameters() if weight.dim() == 1):
                weight.data -= 1
        cases: list[dict[str, Any]] = []
        for options in DOLA if "43" in name else [*CONTRASTIVE, *DOLA]:
            for seed, length in PROMPTS:
                cases += case(model, seed, length, options)
        greedy = [generated(model, seed, length, {})[0] for seed, length in PROMPTS]
        record["models"].append(
            {"name": name, "family": family, "overrides": overrides, "greedy": greedy, "cases": cases}
        )
        print(name, len(cases), file=sys.stderr)
    text = json.dumps(record, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"').replace('{"name"', '\n{"name"')
    (HERE / "contrast.json").write_text(text + "\n")


def case(model: Any, seed: int, length: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What is recorded of a prompt; nothing where the model has no such layers, or the release fails."""
    try:
        tokens, scores = generated(model, seed, length, options)
    except (RuntimeError, ValueError, KeyError, AttributeError, IndexError) as error:
        print(f"  {options}: {error!r}"[:150], file=sys.stderr)
        return []
    return [{"prompt": [seed, length], "options": {**BASE, **options}, "tokens": tokens, "scores": scores}]


def generated(model: Any, seed: int, length: int, options: dict[str, Any]) -> tuple[list[int], list[float]]:
    """(new tokens, the score of each after the processors)."""
    torch.manual_seed(11)
    ids = torch.tensor([random_ids(seed, length)])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        trust_remote_code=True,
        return_dict_in_generate=True,
        output_scores=True,
        **{"do_sample": False, **BASE, **options},
    )
    tokens = result.sequences[0, length:].tolist()
    return tokens, [round(float(step[0, token]), 4) for step, token in zip(result.scores, tokens, strict=True)]


if __name__ == "__main__":
    main()
