"""What the last transformers that had groups of beams and constraints gave (tests/data/record_old_beams.py), compared.

Nothing here knows how a search goes.
"""

from __future__ import annotations

import json
from collections import Counter
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
    return [at for at, verdict in enumerate(_verdicts(lm, case, random_ids(*case["prompt"]))) if verdict != "equal"]


def count_differing(lm: hl.LM, case: dict[str, Any], prompt: list[int]) -> Counter[str]:
    """How many outputs are "equal", "tied" (other tokens of the recorded score) and "different"."""
    return Counter(_verdicts(lm, case, prompt))


def _verdicts(lm: hl.LM, case: dict[str, Any], prompt: list[int]) -> list[str]:
    outputs = lm.generate([prompt], **case["options"])
    assert len(outputs) == len(case["tokens"])
    rows = zip(outputs, case["tokens"], case["scores"], strict=True)
    return [_verdict(output, tokens, score, case) for output, tokens, score in rows]


def _verdict(output: Output, tokens: list[int], score: float, case: dict[str, Any]) -> str:
    if score < NOT_THERE:
        return "equal" if output.finish_reason == "error" else "different"
    assert output.beams is not None, output.error
    ours, eos = list(output.token_ids), case["options"]["eos_token_id"]
    if output.finish_reason == "eos":
        ends = eos if isinstance(eos, list) else [eos]
        assert ours[-1] in ends
        ours[-1] = ends[0]  # as it is written there, whichever came
    # rounding errs in the sum of log-probabilities, which a length penalty below 0 multiplies; records have 6 digits
    shrink = len(output.token_ids) ** case["options"].get("length_penalty", 1.0)
    ours_sum, their_sum = output.beams.score * shrink, score * shrink
    close = abs(ours_sum - their_sum) <= SCORES_TOLERANCE * max(1.0, abs(their_sum)) + 1e-6 * shrink
    return "different" if not close else "equal" if ours == tokens else "tied"
