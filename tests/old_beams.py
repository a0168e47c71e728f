"""What the last transformers that had groups of beams and constraints gave (tests/data/record_old_beams.py), compared.

Nothing here knows how a search goes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import handloom as hl
from handloom.output import Output
from parity_checks import SCORES_TOLERANCE
from tiny_models import random_ids

NOT_THERE = -1e8  # the score of an output that transformers makes of a beam that is not there


@cache
def recorded(kind: str) -> list[dict[str, Any]]:
    path = Path(__file__).parent / "data" / f"old_beams_{kind}.json"
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    return cases


def differing(lm: hl.LM, case: dict[str, Any]) -> list[int]:
    """The outputs whose tokens or score are not the recorded ones; of those that are not there, each is an error."""
    outputs = lm.generate([random_ids(*case["prompt"])], **case["options"])
    assert len(outputs) == len(case["tokens"])
    pairs = zip(outputs, case["tokens"], case["scores"], strict=True)
    return [at for at, (output, tokens, score) in enumerate(pairs) if not _same(output, tokens, score, case)]


def _same(output: Output, tokens: list[int], score: float, case: dict[str, Any]) -> bool:
    if score < NOT_THERE:
        return output.finish_reason == "error"
    assert output.beams is not None, output.error
    ours, eos = list(output.token_ids), case["options"]["eos_token_id"]
    if output.finish_reason == "eos":
        ends = eos if isinstance(eos, list) else [eos]
        assert ours[-1] in ends
        ours[-1] = ends[0]  # as it is written there, whichever came
    close = abs(output.beams.score - score) <= SCORES_TOLERANCE * max(1.0, abs(score)) + 1e-6  # rounded to 1e-6
    return ours == tokens and close
