"""What a caller gets back.

This module does not know how any of it came about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from typing import Any

import torch
from torch import Tensor

from handloom.decoding.decoder import BeamTrace, FinishReason, TopLogprobs
from handloom.errors import HandloomError


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one request, from when it was handed in. Tokenising the prompt is not in them."""

    time_to_first_token: float
    total: float
    prompt_tokens: int
    new_tokens: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over the time after the first; 0 where there are none."""
        decode = self.total - self.time_to_first_token
        return (self.new_tokens - 1) / decode if self.new_tokens > 1 and decode > 0 else 0.0


@dataclass(slots=True)
class Output:
    """One prompt's result.

    token_ids: new tokens only, the eos included; text: theirs, and the stop string's unless excluded.
    logprobs: of each new token under the model's own (raw) distribution; top_logprobs: the n most likely
    at each step; prompt_logprobs: of prompt tokens 1, 2, … (the first has none). scores, logits: per step
    [vocab_size] float32, after and before processing. error: set when finish_reason is "error".
    seed: what to pass to get these very tokens again; None where none was used (greedy, or rng="torch"). Each output of
    num_return_sequences without beams has its own; under beams it is the search's.
    beams: what beam search tells of this output; its scores and logits are there, and those here None.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "aborted"
    stop_string: str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[TopLogprobs] | None = None
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    seed: int | None = None
    beams: BeamTrace | None = None
    timing: Timing = field(default_factory=lambda: Timing(0.0, 0.0, 0, 0))
    error: HandloomError | None = None

    def to_transformers(self) -> Any:
        """The GenerateDecoderOnlyOutput that `generate(..., return_dict_in_generate=True)` gives for this one output.

        sequences int64 [1, n], prompt and new tokens (of a prompt of embeddings, the new ones); scores, logits: tuples
        of float32 [1, vocab_size] where they were asked for. `model.compute_transition_scores` takes them. Of beam
        search a GenerateBeamDecoderOnlyOutput: sequences_scores [1], beam_indices int32 [1, new tokens], and scores and
        logits [num_beams, vocab_size] of every step of the search.
        """
        from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

        prompt = [id_ for id_ in self.prompt_token_ids if id_ >= 0]
        sequences = torch.tensor([[*prompt, *self.token_ids]], dtype=torch.int64)
        if self.beams is not None:
            return GenerateBeamDecoderOnlyOutput(
                sequences=sequences,
                sequences_scores=torch.tensor([self.beams.score]),
                beam_indices=torch.tensor([self.beams.beam_indices], dtype=torch.int32),
                scores=None if self.beams.scores is None else tuple(self.beams.scores),
                logits=None if self.beams.logits is None else tuple(self.beams.logits),
            )
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if self.scores is None else tuple(step[None] for step in self.scores),
            logits=None if self.logits is None else tuple(step[None] for step in self.logits),
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of a stream: `text` may be empty while a character or a possible stop string is incomplete.

    index: which prompt of the list; sample: which of its outputs; token_id: None for the closing piece of an output,
    which has finish_reason.
    """

    index: int
    text: str
    token_id: int | None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: HandloomError | None = None
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of a text. logprobs, top_logprobs: of tokens 1, 2, …, each given all before it."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]

    @property
    def total(self) -> float:
        """Natural log-likelihood of the tokens after the first."""
        return sum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return exp(-self.total / len(self.logprobs)) if self.logprobs else float("nan")
