"""What a caller gets back.

This module does not know how any of it came about.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from math import exp
from typing import Any

import torch
from torch import Tensor

from handloom.decoding.by_value import ByValue
from handloom.decoding.decoder import BeamTrace, DraftCounts, FinishReason, TopLogprobs
from handloom.decoding.internals import KeysAndValues
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


@dataclass(slots=True, repr=False, eq=False)
class Output(ByValue):
    """One prompt's result. Two are equal whose every field is, the timing and the numbers in tensors too.

    prompt_token_ids: with token_healing, the healed ones. token_ids: new tokens only, the eos included; text: theirs,
    the stop string's unless excluded, and first what healing adds to the prompt's.
    logprobs: of each new token under the model's own (raw) distribution; top_logprobs: the n most likely
    at each step; prompt_logprobs: of prompt tokens 1, 2, … (the first has none). scores, logits: per step
    [vocab_size] float32, after and before processing. error: set when finish_reason is "error".
    seed: what to pass to get these very tokens again; None where none was used (greedy, or rng="torch"). Each output of
    num_return_sequences without beams has its own; under beams it is the search's.
    hidden_states, attentions: per step what `Seen` says. past_key_values: of each layer, K (rotated) and V
    [n, num_kv_heads, head_dim] of all tokens but the last, which was chosen and not run. windows: how many tokens each
    layer sees, None for all.
    beams: what beam search tells of this output; its scores, logits, hidden_states, attentions and past_key_values are
    there, and those here None.
    drafts: with speculative decoding, how many tokens were drafted, and how many of them came out.
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
    hidden_states: list[tuple[Tensor, ...]] | None = None
    attentions: list[tuple[Tensor, ...]] | None = None
    past_key_values: KeysAndValues | None = None
    windows: tuple[int | None, ...] = ()
    seed: int | None = None
    beams: BeamTrace | None = None
    drafts: DraftCounts | None = None
    timing: Timing = field(default_factory=lambda: Timing(0.0, 0.0, 0, 0))
    error: HandloomError | None = None

    def __repr__(self) -> str:
        """The text, and whatever else there is to say, cut short where it is long."""
        rest = {
            one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("text", "windows", "timing")
        }
        said = {name: reprlib.repr(value) for name, value in rest.items() if value is not None}
        return f"Output(text={self.text!r}, {', '.join(f'{name}={value}' for name, value in said.items())})"

    def to_transformers(self) -> Any:
        """The GenerateDecoderOnlyOutput that `generate(..., return_dict_in_generate=True)` gives for this one output.

        sequences int64 [1, n], prompt and new tokens (of a prompt of embeddings, the new ones); scores, logits: tuples
        of float32 [1, vocab_size], hidden_states, attentions: tuples of tuples [1, n, hidden_size] and
        [1, num_heads, n, context], past_key_values: a DynamicCache, where they were asked for.
        `model.compute_transition_scores` takes the scores. Of beam search a GenerateBeamDecoderOnlyOutput:
        sequences_scores [1], beam_indices int32 [1, new tokens], and the others [num_beams, …] of every step of the
        search.
        """
        from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

        prompt = [id_ for id_ in self.prompt_token_ids if id_ >= 0]
        sequences, beams = torch.tensor([[*prompt, *self.token_ids]], dtype=torch.int64, device="cpu"), self.beams
        if beams is not None:
            seen = beams.seen or []
            return GenerateBeamDecoderOnlyOutput(
                sequences=sequences,
                sequences_scores=torch.tensor([beams.score], dtype=torch.float32, device="cpu"),
                beam_indices=torch.tensor([beams.beam_indices], dtype=torch.int32, device="cpu"),
                scores=None if beams.scores is None else tuple(beams.scores),
                logits=None if beams.logits is None else tuple(beams.logits),
                hidden_states=tuple(step.hidden_states for step in seen if step.hidden_states is not None) or None,
                attentions=self._shown(step.attentions for step in seen if step.attentions is not None) or None,
                past_key_values=self._as_cache(beams.past_key_values),
            )
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if self.scores is None else tuple(step[None] for step in self.scores),
            logits=None if self.logits is None else tuple(step[None] for step in self.logits),
            hidden_states=None if self.hidden_states is None else tuple(map(_batched, self.hidden_states)),
            attentions=None if self.attentions is None else self._shown(map(_batched, self.attentions)),
            past_key_values=self._as_cache(None if self.past_key_values is None else [self.past_key_values]),
        )

    def _shown(self, steps: Iterable[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], ...]:
        """Attention weights [r, num_heads, n, context] without the columns that transformers' cache has dropped."""

        def show(weights: Tensor, window: int | None) -> Tensor:
            count, context = weights.shape[-2:]
            return weights if window is None else weights[..., -min(context, window - 1 + count) :]

        return tuple(tuple(map(show, layers, self.windows)) for layers in steps)

    def _as_cache(self, rows: list[KeysAndValues] | None) -> Any:
        """K and V of one sequence or of several beams, equally long, as a DynamicCache."""
        if rows is None:
            return None
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        cache = DynamicCache()
        cache.layers = [
            DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
            for window in self.windows
        ]
        for i, layer in enumerate(zip(*rows, strict=True)):
            cache.update(*(torch.stack(part).transpose(1, 2) for part in zip(*layer, strict=True)), i)
        return cache


def _batched(layers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(values[None] for values in layers)


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of a stream: `text` may be empty while a character or a possible stop string is incomplete.

    index: which prompt of the list; sample: which of its outputs; token_id: None for the closing piece of an output,
    which has finish_reason, and for what healing adds to the prompt's text (token_healing).
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
