"""Every option of a request, with values that show, and what each promises of an output.

Nothing here knows which options a test puts together, or what transformers makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers import SynthIDTextWatermarkingConfig as SynthIDConfig

from engines import lm_with
from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Event, TokenEvent
from handloom.decoding.sample import SampleDecoder
from handloom.output import Output
from handloom.sampling.params import GenerationParams
from handloom.text.tokenizer import Tokenizer
from tiny_models import random_ids, tiny_tokenizer

PROMPT, BESIDE = random_ids(6, 10), random_ids(7, 13)
PROMPT[5:7] = PROMPT[2:4]  # an n-gram twice
CUT, HEALED = [*PROMPT[:-1], 69], [*PROMPT[:-1], 328]  # "c" where the model likes a token better that goes on
EOS, FORCED, BANNED = [17, 200, 250, 301], 23, [*range(30, 60)]
NEW_TOKENS = 7
KNOBS = {"temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


class NoEven(LogitsProcessor):
    """Bans even ids, but for what has been forced."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 60::2] = -torch.inf
        return scores


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= len(PROMPT) + 5)


def steps_on(batch_id: int, ids: torch.Tensor) -> list[int]:
    last = int(ids[-1]) if len(ids) else 5
    return [(last * 7 + k) % 331 for k in range(0, 120, 3)]


def text_of(token_ids: list[int]) -> str:
    text: str = tiny_tokenizer().decode(token_ids)
    return text


def promises_nothing_alone(output: Output, options: dict[str, Any]) -> None:
    """What it does shows in the tokens of generate only."""


def chosen(output: Output, options: dict[str, Any]) -> list[int]:
    """The tokens that a ban had a say in: forcing weighs more, and so does a constraint."""
    tokens = output.token_ids
    if "prefix_allowed_tokens_fn" in options:
        return []
    last = len(tokens) == options.get("max_new_tokens", NEW_TOKENS) and "forced_eos_token_id" in options
    return tokens[:-1] if last else tokens


def check_eos(output: Output, options: dict[str, Any]) -> None:
    assert not set(output.token_ids[:-1]) & set(EOS)
    assert (output.token_ids[-1] in EOS) == (output.finish_reason == "eos")


def check_min(output: Output, options: dict[str, Any]) -> None:
    early = chosen(output, options)[:4]
    assert not set(early) & set(EOS)


def check_max(output: Output, options: dict[str, Any]) -> None:
    assert len(output.token_ids) <= 5
    assert output.finish_reason != "length" or len(output.token_ids) == 5


def check_stop(output: Output, options: dict[str, Any]) -> None:
    inside = [stop for stop in STOPS if stop in output.text[:-1]]
    assert not inside or output.finish_reason == "stop_string"


def check_cut(output: Output, options: dict[str, Any]) -> None:
    if output.finish_reason == "stop_string":
        assert not output.text.endswith(output.stop_string)


def check_ngrams(output: Output, options: dict[str, Any]) -> None:
    before, tokens = list(output.prompt_token_ids), chosen(output, options)
    for token in tokens:
        bigrams = set(pairwise(before))
        assert (before[-1], token) not in bigrams
        before.append(token)


def check_new_ngrams(output: Output, options: dict[str, Any]) -> None:
    assert not set(chosen(output, options)) & set(output.prompt_token_ids)


def check_banned(output: Output, options: dict[str, Any]) -> None:
    assert not set(chosen(output, options)) & set(BANNED)


def check_never(output: Output, options: dict[str, Any]) -> None:
    assert not set(output.token_ids) & set(SUPPRESSED)


def check_begin(output: Output, options: dict[str, Any]) -> None:
    assert output.token_ids[0] not in BEGIN


def check_forced(output: Output, options: dict[str, Any]) -> None:
    if output.finish_reason == "length":
        assert output.token_ids[-1] == FORCED


def check_allowed(output: Output, options: dict[str, Any]) -> None:
    before = [output.prompt_token_ids[-1], *output.token_ids]
    forced = "forced_eos_token_id" in options
    for at, (last, token) in enumerate(pairwise(before), 1):
        if not (forced and at == options.get("max_new_tokens", NEW_TOKENS)):
            assert token in steps_on(0, torch.tensor([last]))


def check_odd(output: Output, options: dict[str, Any]) -> None:
    assert not [token for token in output.token_ids if token >= 60 and token % 2 == 0]


def check_scores(output: Output, options: dict[str, Any]) -> None:
    assert len(output.scores) == len(output.token_ids)
    for scores, token in zip(output.scores, output.token_ids, strict=True):
        assert scores[token] > -torch.inf
        if not options.get("do_sample") and "penalty_alpha" not in options:
            assert scores[token] == scores.max()


def check_logits(output: Output, options: dict[str, Any]) -> None:
    assert len(output.logits) == len(output.token_ids)
    if output.logprobs is not None:
        for logits, token, logprob in zip(output.logits, output.token_ids, output.logprobs, strict=True):
            assert logprob == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-4)


class Records:
    """A streamer, and the tokens it was given last."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens = [] if value.dim() == 2 else [*self.tokens, int(value)]

    def end(self) -> None:
        pass


STREAMER = Records()


def check_streamed(output: Output, options: dict[str, Any]) -> None:
    assert STREAMER.tokens == output.token_ids


def check_internals(output: Output, options: dict[str, Any]) -> None:
    assert len(output.hidden_states) == len(output.attentions) == len(output.token_ids)
    computed = len(output.prompt_token_ids) + len(output.token_ids) - 1
    assert sum(len(step[-1]) for step in output.hidden_states) == computed
    assert [len(keys) for keys, _ in output.past_key_values] == [computed] * 3
    for weights in output.attentions[-1]:
        assert weights.shape[-2:] == (computed if len(output.token_ids) == 1 else 1, computed)


def check_healed(output: Output, options: dict[str, Any]) -> None:
    assert output.prompt_token_ids == HEALED


def check_structure(output: Output, options: dict[str, Any]) -> None:
    assert WORDS.fullmatch(output.text if output.token_ids[-1] not in EOS else text_of(output.token_ids[:-1]))
    assert output.finish_reason == "eos" or not set(output.token_ids) & set(EOS)


def check_logprobs(output: Output, options: dict[str, Any]) -> None:
    assert len(output.logprobs) == len(output.top_logprobs) == len(output.token_ids)
    assert all(logprob <= best[0][1] for logprob, best in zip(output.logprobs, output.top_logprobs, strict=True))


def check_prompt_logprobs(output: Output, options: dict[str, Any]) -> None:
    assert len(output.prompt_logprobs) == len(PROMPT) - 1


def check_drafts(output: Output, options: dict[str, Any]) -> None:
    assert output.drafts is not None and output.drafts.accepted <= output.drafts.drafted


class Own(SampleDecoder):
    """A decoder of the caller's that stands on ours for one sequence; it leaves out what takes more than that."""

    tokens: ClassVar[list[int]] = []

    def __init__(self, sequence: Sequence, params: GenerationParams, tokenizer: Tokenizer | None) -> None:
        super().__init__(sequence, replace(params, guidance_scale=1.0, penalty_alpha=0.0, dola_layers=()), tokenizer)
        Own.tokens = []

    def advance(self, logits: torch.Tensor) -> list[Event]:
        events = super().advance(logits)
        Own.tokens += [event.token_id for event in events if isinstance(event, TokenEvent)]
        return events


def check_own(output: Output, options: dict[str, Any]) -> None:
    assert Own.tokens == output.token_ids


def check_criteria(output: Output, options: dict[str, Any]) -> None:
    assert len(output.token_ids) <= 5


def check_time(output: Output, options: dict[str, Any]) -> None:
    assert len(output.token_ids) == 1


@dataclass
class Feature:
    """Options, what they promise of an output, and those that transformers does not have."""

    options: dict[str, Any]
    holds: Callable[[Output, dict[str, Any]], None] = promises_nothing_alone
    ours: dict[str, Any] = field(default_factory=dict)


STOPS = [*"etaoin"]
WORDS = re.compile("[a-zA-Z0-9 ,.]*")
BEGIN, SUPPRESSED = list(range(60, 200)), list(range(200, 331, 3))
FEATURES: dict[str, Feature] = {
    "eos_token_id": Feature({"eos_token_id": EOS}, check_eos),
    "max_new_tokens": Feature({"max_new_tokens": 5}, check_max),
    "min_new_tokens": Feature({"min_new_tokens": 4}, check_min),
    "min_length": Feature({"min_length": len(PROMPT) + 4}, check_min),
    "stop_strings": Feature({"stop_strings": STOPS}, check_stop),
    "include_stop_text": Feature({}, check_cut, {"include_stop_text": False, "stop": STOPS}),
    "temperature": Feature({"temperature": 0.7}),
    "top_h": Feature({"top_h": 0.6}),
    "top_k": Feature({"top_k": 12}),
    "top_p": Feature({"top_p": 0.8}),
    "min_p": Feature({"min_p": 0.05}),
    "typical_p": Feature({"typical_p": 0.7}),
    "epsilon_cutoff": Feature({"epsilon_cutoff": 0.01}),
    "eta_cutoff": Feature({"eta_cutoff": 0.01}),
    "repetition_penalty": Feature({"repetition_penalty": 1.4}),
    "encoder_repetition_penalty": Feature({"encoder_repetition_penalty": 1.4}),
    "no_repeat_ngram_size": Feature({"no_repeat_ngram_size": 2}, check_ngrams),
    "encoder_no_repeat_ngram_size": Feature({"encoder_no_repeat_ngram_size": 1}, check_new_ngrams),
    "sequence_bias": Feature({"sequence_bias": {(70,): 4.0, (71,): 4.0, (70, 71): -8.0}}),
    "bad_words_ids": Feature({"bad_words_ids": [[id_] for id_ in BANNED]}, check_banned),
    "prefix_allowed_tokens_fn": Feature({"prefix_allowed_tokens_fn": steps_on}, check_allowed),
    "forced_eos_token_id": Feature({"forced_eos_token_id": FORCED}, check_forced),
    "remove_invalid_values": Feature({"remove_invalid_values": True}),
    "exponential_decay_length_penalty": Feature({"exponential_decay_length_penalty": (1, 1.4)}),
    "suppress_tokens": Feature({"suppress_tokens": SUPPRESSED}, check_never),
    "begin_suppress_tokens": Feature({"begin_suppress_tokens": BEGIN}, check_begin),
    "watermark": Feature({"watermarking_config": WatermarkingConfig(bias=3.0)}),
    "SynthID": Feature({"watermarking_config": SynthIDConfig(ngram_len=3, keys=[654, 400, 836])}),
    "renormalize_logits": Feature({"renormalize_logits": True}),
    "logits_processor": Feature({"logits_processor": LogitsProcessorList([NoEven()])}, check_odd),
    "stopping_criteria": Feature({"stopping_criteria": StoppingCriteriaList([AfterFive()])}, check_criteria),
    "max_time": Feature({"max_time": 1e-9}, check_time),
    "output_scores": Feature({"output_scores": True}, check_scores),
    "output_logits": Feature({"output_logits": True}, check_logits),
    "internals": Feature(
        {},
        check_internals,
        {"output_hidden_states": True, "output_attentions": True, "output_past_key_values": True},
    ),
    "streamer": Feature({}, check_streamed, {"streamer": STREAMER}),
    "logprobs": Feature({}, check_logprobs, {"logprobs": 2}),
    "prompt_logprobs": Feature({}, check_prompt_logprobs, {"prompt_logprobs": 1}),
    "contrastive": Feature({"penalty_alpha": 0.6, "top_k": 4}),
    "DoLa": Feature({"dola_layers": "high"}),
    "guidance": Feature({"guidance_scale": 1.7, "negative_prompt_ids": random_ids(8, 4)}),
    "prompt_lookup_num_tokens": Feature(
        {}, check_drafts, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 3}
    ),
    "speculation": Feature({}, check_drafts, {"speculation": "suffix", "num_assistant_tokens": 5}),
    "assistant_model": Feature(
        {},
        check_drafts,
        {
            "assistant_model": lm_with(2000),
            "num_assistant_tokens_schedule": "heuristic",
            "assistant_confidence_threshold": 0.1,
        },
    ),
    "custom_decoder": Feature({}, check_own, {"custom_decoder": Own}),
    "forced_bos_token_id": Feature({"forced_bos_token_id": 8}),
    "pad_token_id": Feature({"pad_token_id": 2}),
    "token_healing": Feature({}, check_healed, {"token_healing": True}),
    "structure": Feature({}, check_structure, {"regex": WORDS.pattern}),
    "skip_special_tokens": Feature({}, promises_nothing_alone, {"skip_special_tokens": False}),
}


def merged(names: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options that transformers has, options that only handloom has)."""
    shared: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": EOS}
    own: dict[str, Any] = {}
    for name in sorted(names):
        shared |= FEATURES[name].options
        own |= FEATURES[name].ours
    if (KNOBS - {"top_k"} if "penalty_alpha" in shared else KNOBS) & shared.keys():
        shared = {"top_k": 0, **shared, "do_sample": True}
    return shared, own


def prompt_of(own: dict[str, Any]) -> list[int]:
    """What to generate from with these options of ours."""
    return CUT if "token_healing" in own else PROMPT
