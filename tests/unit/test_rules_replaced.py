"""A caller's processor of a built-in class takes the built-in one's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as hf

from handloom.sampling.rules import apply_rules
from rule_chains import (
    NEW_TOKENS,
    PROMPT_LENGTH,
    allow_even,
    mine,
    same,
    some_scores,
    theirs,
)

# An option that is on, and a processor of the class that transformers makes for it, of another opinion.
STAND_INS: list[tuple[dict[str, Any], Any]] = [
    ({"sequence_bias": [[[0], 5.0]]}, lambda: hf.SequenceBiasLogitsProcessor({(2,): 3.0})),
    (
        {"encoder_repetition_penalty": 2.0},
        lambda: hf.EncoderRepetitionPenaltyLogitsProcessor(0.5, torch.tensor([[0, 1]])),
    ),
    ({"repetition_penalty": 2.0}, lambda: hf.RepetitionPenaltyLogitsProcessor(0.5)),
    ({"no_repeat_ngram_size": 1}, lambda: hf.NoRepeatNGramLogitsProcessor(2)),
    (
        {"encoder_no_repeat_ngram_size": 1},
        lambda: hf.EncoderNoRepeatNGramLogitsProcessor(1, torch.tensor([[2, 5]])),
    ),
    ({"bad_words_ids": [[0]]}, lambda: hf.NoBadWordsLogitsProcessor([[2]])),
    ({"min_length": 6}, lambda: hf.MinLengthLogitsProcessor(7, [4])),
    ({"min_new_tokens": 4}, lambda: hf.MinNewTokensLengthLogitsProcessor(PROMPT_LENGTH, 2, [4])),
    (
        {"prefix_allowed_tokens_fn": allow_even},
        lambda: hf.PrefixConstrainedLogitsProcessor(lambda batch_id, ids: [1, 4], num_beams=1),
    ),
    ({"forced_bos_token_id": 2}, lambda: hf.ForcedBOSTokenLogitsProcessor(3)),
    ({"forced_eos_token_id": 2}, lambda: hf.ForcedEOSTokenLogitsProcessor(PROMPT_LENGTH + 3, [4])),
    ({"remove_invalid_values": True}, lambda: hf.InfNanRemoveLogitsProcessor()),
    ({"exponential_decay_length_penalty": (0, 2.0)}, lambda: hf.ExponentialDecayLengthPenalty((1, 3.0), [4], 6)),
    ({"suppress_tokens": [0]}, lambda: hf.SuppressTokensLogitsProcessor([2])),
    ({"begin_suppress_tokens": [0]}, lambda: hf.SuppressTokensAtBeginLogitsProcessor([2], PROMPT_LENGTH + 1)),
]


@pytest.mark.parametrize("on", [True, False], ids=["option on", "option off"])
@pytest.mark.parametrize(("option", "processor"), STAND_INS, ids=[next(iter(option)) for option, _ in STAND_INS])
def test_a_callers_processor_of_a_built_in_class_replaces_the_built_in_one_in_its_place(option, processor, on):
    options = {"temperature": 0.5, "do_sample": True, "top_k": 0, "suppress_tokens": [9], **(option if on else {})}
    for prompt in ([0, 1, 2, 0, 1, 2], [0]):
        given = [hf.TopKLogitsWarper(6), processor()]
        row = mine({**options, "logits_processor": given}, prompt, 12)
        chain = theirs({**options, "logits_processor": [hf.TopKLogitsWarper(6), processor()]}, prompt, 12)
        for step in range(NEW_TOKENS):
            ids = [*prompt, *[2, 0, 1, 2, 0][:step]]
            scores = some_scores(12, step, "random")
            expected = chain(torch.tensor([ids]), scores.clone())
            row.token_ids = ids
            assert apply_rules(scores, [row]) == [None]
            assert same(scores, expected)
