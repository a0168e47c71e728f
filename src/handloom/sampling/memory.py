"""What the rules of one request keep from step to step: tables made once, and what they have read of its tokens.

Everything here is a function of the request's parameters and token ids. A sequence that was rewound or edited is read
anew, so it survives preemption and surgery.

This module does not know scores, or in which order rules run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from handloom.sampling.constraints import BiasTable
from handloom.sampling.params import GenerationParams
from handloom.sampling.repetition import NgramTable, SeenTokens, TokenTensor
from handloom.sampling.watermark import SynthID, SynthIDContext

_NOTHING = torch.empty(0, dtype=torch.int64, device="cpu")


class Memory:
    """One request's. `follow` brings it up to date; attributes of rules that are off are empty or None."""

    def __init__(self, params: GenerationParams, prompt_length: int) -> None:
        self._params, self._prompt_length = params, prompt_length
        self.biases = BiasTable(params.sequence_bias) if params.sequence_bias else None
        banned = [(sequence, -torch.inf) for sequence in params.bad_words_ids]
        self.bad_words = BiasTable(banned) if banned else None
        self.suppressed = torch.tensor(params.suppress_tokens, dtype=torch.int64, device="cpu")
        self.matcher = None if params.structure is None else params.structure.start()
        self.begin_suppressed = torch.tensor(params.begin_suppress_tokens, dtype=torch.int64, device="cpu")
        self._start_anew()

    def fork(self) -> Memory:
        """Another with the same tables, which has read nothing yet but what its grammar has."""
        other = copy.copy(self)
        other.matcher = None if self.matcher is None else self.matcher.fork()
        other._start_anew()
        return other

    def _start_anew(self) -> None:
        params, mark = self._params, self._params.watermarking_config
        self._read: list[int] = []
        calls_the_caller = params.logits_processor or params.prefix_allowed_tokens_fn is not None
        self._ids = TokenTensor() if calls_the_caller else None
        size, prompt_size = params.no_repeat_ngram_size, params.encoder_no_repeat_ngram_size
        self._seen = SeenTokens() if params.repetition_penalty != 1.0 or size == 1 else None
        self._ngrams = NgramTable(size) if size > 1 else None
        self._prompt_seen = SeenTokens() if params.encoder_repetition_penalty != 1.0 or prompt_size == 1 else None
        self._prompt_ngrams = NgramTable(prompt_size) if prompt_size > 1 else None
        self.synthid = SynthIDContext(mark) if isinstance(mark, SynthID) else None
        readers = (self._ids, self._seen, self._ngrams, self._prompt_seen, self._prompt_ngrams, self.synthid)
        self._reads = any(reader is not None for reader in readers)

    @property
    def reads(self) -> bool:
        """Whether it depends on the tokens at all, so that no two positions can be looked at side by side."""
        return self._reads or self.matcher is not None

    def follow(self, token_ids: Sequence[int]) -> None:
        """Read the tokens that were not read yet; all of them anew where those read are not how the sequence begins."""
        if self.matcher is not None:
            self.matcher.follow(token_ids[self._prompt_length :])
        if not self._reads:
            return
        if token_ids[: len(self._read)] != self._read:
            self._start_anew()
        start = len(self._read)
        for of_all in (self._ids, self._seen, self._ngrams):
            if of_all is not None:
                of_all.read(token_ids, start)
        if start < self._prompt_length:
            prompt = token_ids[: self._prompt_length]
            for of_prompt in (self._prompt_seen, self._prompt_ngrams):
                if of_prompt is not None:
                    of_prompt.read(prompt, start)
        if self.synthid is not None:
            self.synthid.read(token_ids[max(start, self._prompt_length) :])
        self._read += token_ids[start:]

    def input_ids(self) -> Tensor:
        """The sequence for a function of the caller's, int64 [1, n]: a copy."""
        assert self._ids is not None
        return self._ids.ids[None].clone()

    @property
    def seen(self) -> Tensor:
        """Distinct ids of the sequence, int64 [n]."""
        return _NOTHING if self._seen is None else self._seen.ids

    @property
    def prompt_seen(self) -> Tensor:
        """Distinct ids of the prompt, int64 [n]."""
        return _NOTHING if self._prompt_seen is None else self._prompt_seen.ids

    def repeating(self) -> Sequence[int] | Tensor:
        """The tokens that would complete an n-gram of the sequence."""
        return self.seen if self._ngrams is None else list(self._ngrams.completing(self._read))

    def repeating_prompt(self) -> Sequence[int] | Tensor:
        """The tokens that would complete an n-gram of the prompt."""
        return self.prompt_seen if self._prompt_ngrams is None else list(self._prompt_ngrams.completing(self._read))
