"""A prompt's rules as transformers' generate builds them and as we do, and scores to put through both."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as hf
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from handloom.sampling.params import resolve_params
from handloom.sampling.rules import Row, apply_rules

INF = math.inf
PROMPT_LENGTH, NEW_TOKENS, EOS = 6, 5, [1, 3]


class NoModel(GenerationMixin):
    """As much of a model as `_get_logits_processor` reads, and as guidance calls: it gives `unconditional` [1, V]."""

    unconditional: torch.Tensor

    def __init__(self, vocab_size: int) -> None:
        class Config:
            is_encoder_decoder = False

            def get_text_config(self) -> Config:
                return self

        Config.vocab_size = vocab_size
        self.config = Config()

    def __call__(self, *_: Any, **__: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.unconditional[:, None])


def theirs(
    options: dict[str, Any], prompt: list[int], vocab_size: int, model: NoModel | None = None
) -> hf.LogitsProcessorList:
    """The processors of generate, for one prompt."""
    options = {**options, "max_length": len(prompt) + NEW_TOKENS}
    allowed = options.pop("prefix_allowed_tokens_fn", None)
    if "min_new_tokens" in options:  # generate makes it both
        options["min_length"] = len(prompt) + options["min_new_tokens"]
    own = hf.LogitsProcessorList(options.pop("logits_processor", []))
    if "sequence_bias" in options:  # as a list, older releases refuse token 0
        options["sequence_bias"] = {tuple(ids): bias for ids, bias in options["sequence_bias"]}
    config = GenerationConfig(num_beams=1, **options)
    config._eos_token_tensor = torch.tensor([id_ for id_ in EOS if id_ < vocab_size])
    return (model or NoModel(vocab_size))._get_logits_processor(
        config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([prompt]),
        prefix_allowed_tokens_fn=allowed,
        logits_processor=own,
        device="cpu",
    )


def mine(options: dict[str, Any], prompt: list[int], vocab_size: int) -> Row:
    params = resolve_params(
        {**options, "max_new_tokens": NEW_TOKENS, "seed": 0} | ({} if options.get("do_sample") else {"seed": None}),
        generation_config={},
        prompt_length=len(prompt),
        max_context=4096,
        vocab_size=vocab_size,
        eos_token_id=[id_ for id_ in EOS if id_ < vocab_size],
    )
    return Row(params, list(prompt), len(prompt))


def some_scores(vocab_size: int, seed: int, kind: str) -> torch.Tensor:
    """[1, V]: as a model gives them, or rounded to ties, or partly or wholly -inf, or with what is no number."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, vocab_size, generator=generator) * 4
    if kind == "ties":
        return (scores * 2).round() / 2
    if kind == "holes":
        scores[torch.rand(1, vocab_size, generator=generator) < 0.7] = -INF
    elif kind == "nothing":
        scores.fill_(-INF)
    elif kind == "invalid":
        scores[0, ::3], scores[0, 1::5] = math.nan, INF
    return scores


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal; where no token is left, transformers' last rules make all NaN or all the lowest number of it, ours leave
    -inf, of which the engine tells."""
    if bool(ours.isneginf().all()) and bool((theirs.isnan() | (theirs == torch.finfo(theirs.dtype).min)).all()):
        return True
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def their_scores(chain: hf.LogitsProcessorList, ids: list[int], scores: torch.Tensor) -> torch.Tensor | None:
    """[V], or None where an entropy of scores that are all -inf raises in transformers."""
    try:
        return chain(torch.tensor([ids]), scores)[0]
    except ValueError as error:
        assert "Expected parameter logits" in str(error)
        return None


def assert_same_at_every_step(options: list[dict[str, Any]], vocab_size: int, seed: int, kinds: list[str]) -> None:
    """All rows in one call of ours; each row in calls of its own of transformers.

    A row of which transformers raises is not looked at any more: processors after that one, which may go by what they
    have seen before, have missed the step.
    """
    raised: set[int] = set()
    generator = torch.Generator().manual_seed(seed)
    few = min(vocab_size, 5)  # so that n-grams repeat
    sequences = torch.randint(0, few, (len(options), PROMPT_LENGTH + NEW_TOKENS), generator=generator).tolist()
    rows = [mine(own, ids[:PROMPT_LENGTH], vocab_size) for own, ids in zip(options, sequences, strict=True)]
    models = [NoModel(vocab_size) for _ in options]
    chains = [
        theirs(own, ids[:PROMPT_LENGTH], vocab_size, model)
        for own, ids, model in zip(options, sequences, models, strict=True)
    ]
    for step in range(NEW_TOKENS):
        length = PROMPT_LENGTH + step
        scores = torch.cat([some_scores(vocab_size, seed + 7 * i + step, kind) for i, kind in enumerate(kinds)])
        for i, (row, model) in enumerate(zip(rows, models, strict=True)):
            model.unconditional = some_scores(vocab_size, seed + 1000 * i + step, "random")
            row.unconditional = model.unconditional[0]
        expected = [
            their_scores(chain, ids[:length], scores[i : i + 1].clone())
            for i, (chain, ids) in enumerate(zip(chains, sequences, strict=True))
        ]
        for row, ids in zip(rows, sequences, strict=True):
            row.token_ids = ids[:length]
        assert apply_rules(scores, rows) == [None] * len(rows)
        for i, wanted in enumerate(expected):
            raised |= {i} if wanted is None else set()
            assert wanted is None or i in raised or same(scores[i], wanted), (options[i], step, scores[i], wanted)


def allow_even(batch_id: int, ids: torch.Tensor) -> list[int]:
    return [0, int(ids[-1]) // 2]
