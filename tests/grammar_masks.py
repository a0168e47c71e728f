"""A logits processor for transformers that applies llguidance's own mask: the oracle of structured output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor

from tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer

if TYPE_CHECKING:
    import llguidance

FREE = '\n%llguidance {"no_forcing": true}\n'  # every token that fits, not only those of the tokenizer's own cut


def lark_of(option: str, value: Any) -> str:
    """Our option as a Lark grammar."""
    if option == "choices":
        return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value) + FREE
    if option == "regex":
        return f"start: /{value}/" + FREE
    if option == "json_schema":
        layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return "start: %json " + json.dumps({**value, "x-guidance": layout}) + FREE
    return str(value) + FREE


class OwnMask(LogitsProcessor):
    """Tokens that the grammar does not allow get -inf; all of them after what it does not allow, as dead beams have.

    eos: tokens that end the output, and are allowed where it may end. tokens: the vocabulary; the tiny one if not said.
    """

    def __init__(
        self,
        prompt_length: int,
        option: str,
        value: Any,
        eos: Sequence[int] = (EOS,),
        tokens: llguidance.LLTokenizer | None = None,
    ) -> None:
        import llguidance  # not on every machine with a GPU
        from llguidance.hf import from_tokenizer

        self.matcher = llguidance.LLMatcher
        self.tokens = tokens or from_tokenizer(tiny_tokenizer(), n_vocab=VOCAB_SIZE, eos_token=EOS)
        self.grammar = self.matcher.grammar_from_lark(lark_of(option, value))
        self.prompt_length, self.eos = prompt_length, list(eos)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        vocab_size, end = self.tokens.vocab_size, self.tokens.eos_token
        for row, ids in enumerate(input_ids.tolist()):
            matcher = self.matcher(self.tokens, self.grammar, log_level=0)
            allowed = np.zeros(vocab_size, dtype=bool)
            if matcher.consume_tokens(ids[self.prompt_length :]):
                mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
                allowed = np.unpackbits(mask, bitorder="little", count=vocab_size) != 0
                may_end, allowed[end] = allowed[end], False
                allowed[self.eos] = may_end
            scores[row, torch.from_numpy(~allowed)] = -torch.inf
        return scores
