"""DoLa, decoding by contrasting layers: the model's next-token distribution, less what an early layer knows already.

The head reads the residual stream before some layers, as it is, without the final norm. Of these the one is taken whose
distribution is farthest from the model's own, by Jensen-Shannon divergence, and its log-probabilities are taken off
those of the tokens at least a tenth as likely as the best. Chuang et al., "DoLa: decoding by contrasting layers
improves factuality in large language models", 2023 (arXiv 2309.03883), as transformers had it: see
`sampling.contrast.dola`.

This module does not know the scheduler or other modes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from handloom.cache.batch import Work
from handloom.cache.sequence import Sequence
from handloom.decoding.sample import SampleDecoder
from handloom.errors import InvalidParam
from handloom.model.hooks import At, Hook
from handloom.model.spec import ModelSpec
from handloom.model.transformer import Transformer
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import Row
from handloom.text.tokenizer import Tokenizer

DEEP = 40  # of more layers, low and high are the first and the last half of this many


class DolaDecoder(SampleDecoder):
    """A `SampleDecoder` that also reads early layers at the last token. Raises InvalidParam for layers that are not."""

    def __init__(
        self,
        sequence: Sequence,
        params: GenerationParams,
        tokenizer: Tokenizer | None,
        model: Transformer,
        *,
        owns_sequence: bool = True,
    ) -> None:
        super().__init__(sequence, params, tokenizer, owns_sequence=owns_sequence)
        self._model = model
        points = [f"blocks.{layer}.hook_resid_pre" for layer in premature_layers(params.dola_layers, model.spec)]
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        self._early = dict.fromkeys(points, nothing)  # residual stream at the last token [hidden_size], by point

    def plan(self) -> Seq[Work]:
        """Its next tokens: the last alone, so that those before it may be taken over from others."""
        (work,) = super().plan()
        hook = Hook(frozenset(self._early), self._see, changes=False, sequence=None)
        if work.hook is not None:
            return [work._replace(hook=_both(work.hook, hook))]
        if work.logits == "last" and work.num_tokens > 1:
            return [Work(work.sequence, work.num_tokens - 1, "none")]
        return [work._replace(hook=hook)]

    def row(self) -> Row:
        row = super().row()
        row.early = self._model.read(torch.stack([*self._early.values()]))
        return row

    def _see(self, values: Tensor, at: At) -> None:
        self._early[at.point] = values[-1].clone()


def premature_layers(asked: str | Seq[int], spec: ModelSpec) -> list[int]:
    """The layers to read before: 0 is the first, whose input are the embeddings. Raises InvalidParam."""
    count = len(spec.layers)
    if not isinstance(asked, str):
        if any(layer >= count for layer in asked):
            raise InvalidParam(
                f"dola_layers={list(asked)}: this model has {count} layers, so those before the last go from 0 to "
                f"{count - 1}"
            )
        return list(dict.fromkeys(asked))
    low_end, high_start = (count // 2, count // 2) if count <= DEEP else (DEEP // 2, count - DEEP // 2)
    if asked == "high":
        return list(range(high_start, count, 2))
    start = min(2, count - 1) if spec.tied_head else 0  # a head that is the embedding reads the token itself there
    if start == count // 2:
        return [start]
    if start > low_end:
        raise InvalidParam(
            f"dola_layers='low': a model of {count} layers whose head is its embedding has no such layers; give "
            "'high', or a list of layers"
        )
    return list(range(start, low_end, 2))


def _both(first: Hook, second: Hook) -> Hook:
    """A hook that sees what either of two captures asks for."""

    def see(values: Tensor, at: At) -> None:
        for hook in (first, second):
            if at.point in hook.points:
                hook.function(values, at)

    return Hook(first.points | second.points, see, changes=False, sequence=None)
