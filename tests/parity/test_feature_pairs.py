"""SAFETY row 20: every pair of options works, and what each promises holds beside the other; or it is refused by name.

Where transformers has both options, the tokens are those of its generate. In any case a request gives the same alone,
beside another request, and streamed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

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

from drafting import draft_freely
from grammar_masks import OwnMask
from handloom.errors import InvalidParam, UnsupportedOption
from handloom.lm import LM
from handloom.output import Output
from handloom.sampling.surface import WHY_NOT
from known_wrong import WRONG_ON_INFINITIES
from parity_checks import Pair, hf_generate
from tiny_models import random_ids, tiny_tokenizer

PROMPT, BESIDE = random_ids(6, 10), random_ids(7, 13)
PROMPT[5:7] = PROMPT[2:4]  # an n-gram twice
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
    before, tokens = list(PROMPT), chosen(output, options)
    for token in tokens:
        bigrams = set(pairwise(before))
        assert (before[-1], token) not in bigrams
        before.append(token)


def check_new_ngrams(output: Output, options: dict[str, Any]) -> None:
    assert not set(chosen(output, options)) & set(PROMPT)


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
    before = [PROMPT[-1], *output.token_ids]
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
    "prompt_lookup_num_tokens": Feature({}, check_drafts, {"prompt_lookup_num_tokens": 3}),
    "speculation": Feature({}, check_drafts, {"speculation": "suffix"}),
    "structure": Feature({}, check_structure, {"regex": WORDS.pattern}),
    "skip_special_tokens": Feature({}, promises_nothing_alone, {"skip_special_tokens": False}),
}
# Pairs that contradict each other or are not there, and the words of the refusal.
CONTRADICT = {
    frozenset({"stop_strings", "include_stop_text"}): "stop and stop_strings",
    frozenset({"prompt_lookup_num_tokens", "speculation"}): "one is enough",
    frozenset({"prompt_lookup_num_tokens", "guidance"}): "prompt_lookup_num_tokens beside guidance_scale",
    frozenset({"speculation", "guidance"}): "speculation beside guidance_scale",
    frozenset({"prompt_lookup_num_tokens", "contrastive"}): "prompt_lookup_num_tokens beside penalty_alpha",
    frozenset({"speculation", "contrastive"}): "speculation beside penalty_alpha",
    frozenset({"prompt_lookup_num_tokens", "DoLa"}): "prompt_lookup_num_tokens beside dola_layers",
    frozenset({"speculation", "DoLa"}): "speculation beside dola_layers",
    frozenset({"watermark", "SynthID"}): None,  # two values of one option
    frozenset({"guidance", "prompt_logprobs"}): "prompt_logprobs beside guidance_scale",
    frozenset({"guidance", "contrastive"}): "penalty_alpha=0.6 beside guidance_scale=1.7",
    frozenset({"guidance", "DoLa"}): "dola_layers='high' beside guidance_scale=1.7",
    frozenset({"structure", "DoLa"}): "regex beside dola_layers",
    frozenset({"contrastive", "DoLa"}): "dola_layers='high' beside penalty_alpha=0.6",
    frozenset({"contrastive", "prompt_logprobs"}): "prompt_logprobs beside penalty_alpha=0.6",
    frozenset({"contrastive", "internals"}): "output_hidden_states beside penalty_alpha=0.6",
    **{frozenset({"contrastive", knob}): "penalty_alpha=0.6 does not draw" for knob in KNOBS - {"top_k"}},
}
# Modes that transformers no longer has; test_contrastive_and_dola.py compares them with what it recorded.
NO_LONGER_THERE = {"contrastive", "DoLa"}
# Features of more than the sequence to go on, which is therefore not continued in place.
NOT_IN_PLACE = {"guidance": "guidance_scale", "contrastive": "penalty_alpha"}
SPECULATION = {"prompt_lookup_num_tokens", "speculation"}
PAIRS = [frozenset(pair) for pair in combinations(FEATURES, 2)]


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


def theirs(
    pair: Pair, shared: dict[str, Any], own: dict[str, Any], embeddings: torch.Tensor | None = None
) -> list[int]:
    """The new tokens of generate, after the prompt or after embeddings [n, hidden_size] that stand for it."""
    options = {"do_sample": False, **shared}
    if "stop" in own:
        options["stop_strings"] = own["stop"]
    if "regex" in own:
        mask = OwnMask(0 if embeddings is not None else len(PROMPT), "regex", own["regex"], options["eos_token_id"])
        options["logits_processor"] = LogitsProcessorList([*options.get("logits_processor", []), mask])
    if "negative_prompt_ids" in options:
        options["negative_prompt_ids"] = torch.tensor([options["negative_prompt_ids"]])
    if "stop_strings" in options:
        options["tokenizer"] = tiny_tokenizer()
    torch.manual_seed(9)
    if embeddings is None:
        return hf_generate(pair.hf, PROMPT, **options)
    out = pair.hf.generate(inputs_embeds=embeddings[None], **options)
    return (out if isinstance(out, torch.Tensor) else out.sequences)[0].tolist()


@pytest.fixture(autouse=True)
def drafts_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)


@pytest.fixture
def pair(tiny_pair: Callable[..., Pair]) -> Pair:
    return tiny_pair("llama")


@pytest.mark.parametrize("name", FEATURES)
def test_safety_20_every_pair_works_as_in_generate_and_each_keeps_its_promise(pair: Pair, name: str) -> None:
    lm = pair.lm()
    for names in [frozenset({name}), *(names for names in PAIRS if min(names) == name)]:
        shared, own = merged(names)
        if names in CONTRADICT:
            words = CONTRADICT[names]
            if words is not None:
                with pytest.raises((InvalidParam, UnsupportedOption), match=words):
                    lm.generate(PROMPT, **shared, **own)
            continue
        sampled = bool(shared.get("do_sample"))
        if sampled and names & SPECULATION:
            output = sampled_with_drafts(lm, shared, own)
            for each in names:
                FEATURES[each].holds(output, shared)
            continue
        torch.manual_seed(9)
        output = lm.generate(PROMPT, **shared, **own, rng="torch" if sampled else "counter")
        if not names & NO_LONGER_THERE and (len(names) == 1 or not names & WRONG_ON_INFINITIES):
            assert output.token_ids == theirs(pair, shared, own), names
        for each in names:
            FEATURES[each].holds(output, shared)


def sampled_with_drafts(lm: LM, shared: dict[str, Any], own: dict[str, Any]) -> Output:
    """Its tokens are those without drafts; torch's generator, whose state drafts would change, is refused."""
    with pytest.raises(UnsupportedOption, match="rng='torch'"):
        lm.generate(PROMPT, **shared, **own, rng="torch")
    without = {name: value for name, value in own.items() if name not in SPECULATION}
    output: Output = lm.generate(PROMPT, **shared, **own, seed=9)
    assert output.token_ids == lm.generate(PROMPT, **shared, **without, seed=9).token_ids
    return output


@pytest.mark.parametrize("name", FEATURES)
def test_safety_20_every_pair_gives_the_same_alone_beside_another_and_streamed(pair: Pair, name: str) -> None:
    lm = pair.lm()
    for names in (names for names in PAIRS if min(names) == name and names not in CONTRADICT):
        shared, own = merged(names)
        options = {**shared, **own, **({"seed": 5} if shared.get("do_sample") else {})}
        alone = lm.generate(PROMPT, **options)
        beside, plain = lm.generate([PROMPT, BESIDE], params=[options, {"max_new_tokens": 3}])
        assert (beside.token_ids, beside.text, beside.finish_reason) == (
            alone.token_ids, alone.text, alone.finish_reason
        ), names  # fmt: skip
        assert beside.logprobs == alone.logprobs
        assert len(plain.token_ids) == 3
        pieces = list(lm.stream(PROMPT, **options))
        assert [piece.token_id for piece in pieces[:-1]] == alone.token_ids
        assert "".join(piece.text for piece in pieces) == alone.text
        for each in names:
            FEATURES[each].holds(alone, shared)


UNSUPPORTED = {name: [5] for name in WHY_NOT}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_safety_20_an_option_that_is_not_supported_is_refused_by_name_beside_every_other(pair: Pair, name: str) -> None:
    for each in FEATURES:
        shared, own = merged(frozenset({each}))
        with pytest.raises(UnsupportedOption, match=rf"^{name}="):
            pair.lm().generate(PROMPT, **shared, **own, **{name: UNSUPPORTED[name]})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1, "rng": "torch"}, "seed"),
    ({"do_sample": True, "temperature": 0}, "temperature"),
    ({"eos_token_id": None, "exponential_decay_length_penalty": (1, 2.0)}, "exponential_decay_length_penalty"),
    ({"forced_eos_token_id": 5, "suppress_tokens": [5]}, "forced_eos_token_id"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
    ({"min_length": 40, "max_length": 30}, "min_length"),
    ({"bad_words_ids": [[17]], "eos_token_id": 17}, "bad_words_ids"),
    *(({"do_sample": False, name: FEATURES[name].options[name]}, name) for name in sorted(KNOBS)),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=lambda value: str(value)[:50])
def test_safety_20_options_that_contradict_each_other_are_refused_by_name(pair: Pair, options: Any, named: str) -> None:
    with pytest.raises(InvalidParam, match=named):
        pair.lm().generate(PROMPT, **options)


@pytest.mark.parametrize("name", FEATURES)
def test_every_option_over_a_sequence_to_continue_works_as_over_its_ids(pair: Pair, name: str) -> None:
    lm, (shared, own) = pair.lm(), merged(frozenset({name}))
    options = {**shared, **own, **({"seed": 5} if shared.get("do_sample") else {})}
    expected = lm.generate(PROMPT, **options)
    with lm.sequence(PROMPT) as sequence:
        if name in NOT_IN_PLACE:
            with pytest.raises(UnsupportedOption, match=NOT_IN_PLACE[name]):
                lm.generate(sequence, **options)
            return
        continued = lm.generate(sequence, **options)
    assert (continued.token_ids, continued.text) == (expected.token_ids, expected.text)


@pytest.mark.parametrize("name", FEATURES)
def test_every_option_over_embeddings_works_as_in_generate_or_is_refused_by_name(pair: Pair, name: str) -> None:
    lm, (shared, own) = pair.lm(), merged(frozenset({name}))
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(PROMPT)).detach()
    torch.manual_seed(9)
    options = {**shared, **own, "rng": "torch" if shared.get("do_sample") else "counter"}
    if name in ("prompt_logprobs", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
        with pytest.raises(UnsupportedOption, match=name):
            lm.generate(embeddings, **options)
        return
    if name in NO_LONGER_THERE:
        assert lm.generate(embeddings, **options).token_ids == lm.generate(PROMPT, **options).token_ids
        return
    assert lm.generate(embeddings, **options).token_ids == theirs(pair, shared, own, embeddings)
