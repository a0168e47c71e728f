"""Records what beam search in groups and constrained beam search give in the last transformers that had them.

    pip install transformers==4.56.2
    PYTHONPATH=tests python tests/data/record_old_beams.py

Writes old_beams_groups.json and old_beams_words.json beside this file. Each case names a tiny model (made from its
fixed seed by tiny_models.py), the seed and length of a prompt of random ids, the options of `generate`, and of every
output the new tokens and the score. Where `generate` writes an end, that is the first of several end-of-sequence
tokens, whichever came. This file is not a test and needs nothing of handloom.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation import beam_search

from tiny_models import TINY, VOCAB_SIZE, random_ids

NUM_CASES = 450  # of each kind
FAMILIES = ("llama", "gpt2")  # whose tiny models are the same in this release as in those the tests run with
LENGTHS = (1, 2, 9, 15, 16, 17, 30)


def common_options(draw: random.Random, num_beams: int, new_tokens: int) -> dict[str, Any]:
    """What both kinds have: how long, what ends, what counts, and now and then a rule."""
    several = [sorted(draw.sample(range(VOCAB_SIZE), count)) for count in (2, 12, 40)]
    options: dict[str, Any] = {
        "num_beams": num_beams,
        "num_return_sequences": draw.randint(1, num_beams),
        "max_new_tokens": new_tokens,
        "eos_token_id": draw.choice((None, draw.randrange(VOCAB_SIZE), *several, *several)),
        "early_stopping": draw.choice((False, True, "never")),
        "length_penalty": draw.choice((1.0, 1.0, -1.0, 0.0, 0.5, 2.0)),
    }
    maybe: dict[str, Any] = {
        "repetition_penalty": draw.choice((0.7, 1.5)),
        "no_repeat_ngram_size": draw.choice((1, 2)),
        "min_new_tokens": draw.randint(0, new_tokens),
        "sequence_bias": [[[id_], draw.choice((-4.0, 4.0))] for id_ in draw.sample(range(1, VOCAB_SIZE), 9)],
        "renormalize_logits": True,
    }
    options |= {name: value for name, value in maybe.items() if draw.random() < 0.2}
    if isinstance(options["eos_token_id"], list) and draw.random() < 0.4:  # so that more of them end early
        options["sequence_bias"] = [[[id_], 2.5] for id_ in options["eos_token_id"] if id_]
    return options


def group_case(draw: random.Random) -> dict[str, Any]:
    groups, size = draw.randint(2, 4), draw.randint(1, 3)
    options = common_options(draw, groups * size, draw.randint(1, 14))
    options["num_beam_groups"] = groups
    options["diversity_penalty"] = draw.choice((0.1, 0.5, 1.0, 1.0, 5.0, 1000.0))
    eos = options["eos_token_id"]
    if draw.random() < 0.7:  # a group that is over repeats it, which later groups feel where it is a likely token
        options["pad_token_id"] = draw.choice(eos) if isinstance(eos, list) else draw.randrange(VOCAB_SIZE)
    return options


def word_case(draw: random.Random, prompt: list[int]) -> dict[str, Any]:
    options = common_options(draw, draw.randint(2, 5), draw.randint(2, 14))
    eos = options["eos_token_id"]
    banned = {eos} if isinstance(eos, int) else set(eos or ())
    few = [id_ for id_ in draw.sample(range(VOCAB_SIZE), 6) if id_ not in banned]  # so that phrases begin alike
    few += [id_ for id_ in prompt[-3:] if id_ not in banned]

    def phrase() -> list[int]:
        return draw.choices(few, k=draw.choice((1, 1, 2, 3)))

    words: list[Any] = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        kinds = [phrase() for _ in range(draw.choice((1, 1, 2, 3)))]
        kinds = [own for at, own in enumerate(kinds) if own not in kinds[:at]]
        alone = [own for own in kinds if not any(other != own and other[: len(own)] == own for other in kinds)]
        words.append(alone[0] if len(alone) == 1 else alone)
    options["force_words_ids"] = words
    return options


def generate(model: Any, prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """The outputs of one call, seen where the scorer hands them over."""
    found: dict[str, Any] = {}

    def watched(original: Any) -> Any:
        def finalize(scorer: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(scorer, *args, **kwargs)
            ended = sorted((own for one in scorer._beam_hyps for own in one.beams), key=lambda own: own[0])[::-1]
            rows = zip(result["sequences"].tolist(), ended, strict=False)
            found["tokens"] = [row[len(prompt) : len(own[1]) + 1] for row, own in rows]
            found["scores"] = [round(score, 6) for score in result["sequence_scores"].tolist()]
            return result

        return finalize

    kinds = (beam_search.BeamSearchScorer, beam_search.ConstrainedBeamSearchScorer)
    originals = [kind.finalize for kind in kinds]
    for kind, original in zip(kinds, originals, strict=True):
        kind.finalize = watched(original)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None  # `generate` fills in an eos that is None from there
    try:
        ids = torch.tensor([prompt])
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    finally:
        model.generation_config.eos_token_id = before
        for kind, original in zip(kinds, originals, strict=True):
            kind.finalize = original
    return found


def record(kind: str) -> None:
    models = {family: TINY[family]() for family in FAMILIES}
    cases = []
    for seed in range(NUM_CASES):
        draw = random.Random(seed)
        family, length = draw.choice(FAMILIES), draw.choice(LENGTHS)
        prompt = random_ids(seed, length)
        options = group_case(draw) if kind == "groups" else word_case(draw, prompt)
        case = {"family": family, "prompt": [seed, length], "options": options}
        cases.append(case | generate(models[family], prompt, options))
    how = f"transformers {transformers.__version__}, torch {torch.__version__}; see record_old_beams.py"
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    path = Path(__file__).with_name(f"old_beams_{kind}.json")
    path.write_text(f'{{"recorded_with": {json.dumps(how)}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    record("groups")
    record("words")
