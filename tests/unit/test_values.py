"""Results compare by value, tensors in them too; what lives in one process says so to who would copy it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import handloom as hl
from engines import lm_with
from handloom.decoding.decoder import TokenEvent
from handloom.errors import EngineError
from tiny_models import random_ids

PROMPT = random_ids(6, 10)
OPTIONS: dict[str, Any] = {
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "output_past_key_values": True,
    "max_new_tokens": 3,
}


@pytest.mark.parametrize("beams", [{}, {"num_beams": 2}], ids=["one", "beams"])
def test_outputs_that_hold_tensors_are_compared_by_their_values(beams: dict[str, Any]) -> None:
    output = lm_with().generate(PROMPT, **OPTIONS, **beams)
    other = copy.deepcopy(output)
    assert output == other and other == output
    assert output != "an output" and [output] == [other]
    assert pickle.loads(pickle.dumps(output)) == output
    places = (other.beams.scores, other.beams.logits) if beams else (other.scores, other.logits, other.attentions[0])
    for values in [*places, other.token_ids]:
        assert values is not None
        before = values[-1]
        changed = before + 1 if isinstance(before, int) else before.clone().add_(1)
        if isinstance(values, tuple):
            other.attentions[0] = (*values[:-1], changed)
        else:
            values[-1] = changed
        assert output != other and other != output
        if isinstance(values, tuple):
            other.attentions[0] = values
        else:
            values[-1] = before
        assert output == other
    other.timing = hl.Output([]).timing
    assert output != other


def test_tensors_of_another_kind_are_not_alike() -> None:
    scores = torch.tensor([1.0, 2.0])
    event = TokenEvent(5, scores=scores)
    assert event == TokenEvent(5, scores=scores.clone())
    for other in (scores.double(), scores[:1], torch.tensor([1.0, 3.0]), None):
        assert event != TokenEvent(5, scores=other)
    with pytest.raises(TypeError, match="unhashable"):
        hash(event)


def test_what_lives_in_one_process_says_what_to_do_instead() -> None:
    lm = lm_with()
    engine = hl.Engine(lm)
    with lm.sequence(PROMPT) as sequence:
        for one, instead in (
            (lm, "call LM.from_pretrained again, in the process that is to have it"),
            (engine, "make another, of a model of its process"),
            (sequence, r"save\(path\) and lm.restore\(path\), or fork\(\)"),
        ):
            for call in (pickle.dumps, copy.copy, copy.deepcopy):
                name = type(one).__name__
                with pytest.raises(EngineError, match=f"^{name} can be neither pickled nor copied; {instead}$"):
                    call(one)
