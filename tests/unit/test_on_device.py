"""What a device chooses by itself is what the host chooses, row by row, in any company."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from handloom.errors import NonFiniteLogits
from handloom.ops import Chooser
from handloom.sampling.on_device import DeviceChoice
from handloom.sampling.sampler import choose
from handloom_kernels import reference
from sampler_rows import row

VOCAB_SIZE = 97
ASKED: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "logprobs": 0},
    {"do_sample": True, "top_k": 0, "seed": 2**64 - 1},
    {"do_sample": True, "top_k": 5, "temperature": 1.4, "seed": 7, "logprobs": 0},
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "seed": 8},
    {"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 0.6, "seed": 2**63},
    # and what it cannot
    {"do_sample": False, "repetition_penalty": 1.5},
    {"do_sample": False, "logprobs": 3},
    {"do_sample": True, "top_k": 9, "output_scores": True, "seed": 3},
    {"do_sample": False, "logits_processor": (lambda ids, scores: -scores,)},
]


class Counted:
    """The choice by the formulas of the reference, and for how many rows."""

    def __init__(self) -> None:
        self.rows = 0

    def draw(self, scores: torch.Tensor, *rest: Any, **options: Any) -> reference.Choice:
        self.rows += len(scores)
        return reference.draw(scores, *rest, **options)

    find_cuts = staticmethod(reference.find_cuts)


@pytest.mark.parametrize("which", [slice(0, 6), slice(None), slice(6, None), slice(None, None, 2)])
def test_tokens_and_logprobs_are_those_of_the_host(which: slice) -> None:
    logits = 4 * torch.randn(len(ASKED), VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    asked = ASKED[which]
    rows = [row([1] * (4 + i), **options) for i, options in enumerate(asked)]
    chooser = Counted()
    ours, expected = DeviceChoice(cast(Chooser, chooser))(logits[which], rows), choose(logits[which], rows)
    assert chooser.rows == sum(options in ASKED[:6] for options in asked)
    assert (ours.token_ids, ours.top_logprobs) == (expected.token_ids, expected.top_logprobs)
    assert ours.logprobs == pytest.approx(expected.logprobs)
    assert [s is None for s in ours.scores] == [s is None for s in expected.scores]


def test_a_row_without_a_token_is_told_why_by_the_host() -> None:
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    logits[1, 5], logits[2] = torch.nan, -torch.inf
    rows = [row(do_sample=i % 2 == 0, top_k=0, seed=i) for i in range(4)]
    ours, expected = DeviceChoice(cast(Chooser, reference))(logits, rows), choose(logits, rows)
    assert ours.token_ids == expected.token_ids and ours.token_ids[1:3] == [-1, -1]
    for at in (1, 2):
        assert isinstance(ours.errors[at], NonFiniteLogits) and str(ours.errors[at]) == str(expected.errors[at])
