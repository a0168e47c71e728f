"""What the real checkpoints gave in modes that transformers no longer has (tests/data/record_real_modes.py), compared.

Nothing here knows how a mode decodes.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import handloom as hl
from old_beams import count_differing

GONE = ("groups", "words", "contrastive", "dola")
CLOSE = 2e-4  # of scores that the record has rounded to 1e-4


@cache
def recorded_of(name: str) -> dict[str, Any]:
    """Of a checkpoint."""
    record: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "real_modes.json").read_text())
    own: dict[str, Any] = record[name]
    return own


def compare_recorded(lm: hl.LM, case: dict[str, Any]) -> Counter[str]:
    """How many outputs of a case are "equal", "tied" and "different"."""
    if isinstance(case["tokens"][0], list):
        return count_differing(lm, case, case["prompt"])
    output = lm.generate(case["prompt"], output_scores=True, **case["options"])
    scores = [float(step[token]) for step, token in zip(output.scores, output.token_ids, strict=True)]
    for ours, theirs, score, expected in zip(output.token_ids, case["tokens"], scores, case["scores"], strict=True):
        if abs(score - expected) > CLOSE * (1 + abs(expected)):
            return Counter(different=1)
        if ours != theirs:
            return Counter(tied=1)
    return Counter(equal=1)
