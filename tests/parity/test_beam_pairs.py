"""SAFETY row 20 for beams: each way of searching beside every other option works, or is refused by name.

What the option promises holds for every output. Where transformers has both, tokens are those of its generate. Each
gives the same alone, beside another request, and streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from features import BESIDE, FEATURES, HEALED, KNOBS, NEW_TOKENS, PROMPT, check_streamed, merged, prompt_of
from handloom.decoding.decoder import BeamTrace
from handloom.errors import InvalidParam, UnsupportedOption
from handloom.output import Output
from known_wrong import WRONG_ON_INFINITIES
from parity_checks import Pair
from tiny_models import tiny_tokenizer

WORDS = [[83, 81], [[91], [93, 95]]]
MODES: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never"},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "length_penalty": 0.5},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.6, "num_return_sequences": 3},
    "force_words_ids": {"num_beams": 4, "num_return_sequences": 2, "force_words_ids": WORDS},
}
OF_TODAY = ("num_beams", "beam sampling")  # those that transformers still has
REFUSED = {
    "SynthID": "SynthID.*beside num_beams",
    "prompt_logprobs": "prompt_logprobs beside",
    "encoder_repetition_penalty": "encoder_repetition_penalty=1.4 beside",
    "prompt_lookup_num_tokens": "prompt_lookup_num_tokens beside num_beams",
    "speculation": "speculation beside num_beams",
    "assistant_model": "assistant_model beside num_beams",
    "contrastive": "penalty_alpha",
    "DoLa": "dola_layers='high' beside num_beams",
    "streamer": "one streamer for . outputs",
}
REFUSED_BY_OLD = {
    "stop_strings": "stop_strings beside {mode}",
    "include_stop_text": "stop_strings beside {mode}",
    **dict.fromkeys(KNOBS, "{mode}.*do_sample"),
}
# Where a phrase is proposed that a rule has banned, a beam goes on that can be no output: there may be one too few.
TOO_FEW = {"prefix_allowed_tokens_fn", "forced_eos_token_id"}
# transformers mixes the second passes of beams up, and has no grammars; a decoder of the caller's has no beams
OTHER_TOKENS = {"guidance", "structure", "custom_decoder", *WRONG_ON_INFINITIES}


def options_of(mode: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    shared, own = merged(frozenset({name}))
    if mode == "beam sampling":
        shared = {"top_k": 0, **shared}
    return {**shared, **MODES[mode]}, own


def refusal(mode: str, name: str) -> str | None:
    if (mode, name) == ("force_words_ids", "structure"):
        return "regex beside force_words_ids"
    words = REFUSED.get(name) or (None if mode in OF_TODAY else REFUSED_BY_OLD.get(name))
    return None if words is None else words.format(mode=mode)


def check_search(output: Output, mode: str, name: str) -> None:
    """What beams promise: they end where an output does, a score, and the phrases where they say so."""
    trace = output.beams
    assert trace is not None and len(trace.beam_indices) == len(output.token_ids)
    assert (trace.fulfilled is not None) == (mode == "force_words_ids")
    if trace.fulfilled:
        text = " ".join(map(str, [0, *output.token_ids, 0]))
        assert " 83 81 " in text and (" 91 " in text or " 93 95 " in text)


def check_scores(trace: BeamTrace, output: Output, options: dict[str, Any]) -> None:
    assert trace.scores is not None
    chosen = zip(trace.scores, trace.beam_indices, output.token_ids, strict=False)
    total = sum(float(scores[beam, token]) for scores, beam, token in chosen)
    assert total / len(output.token_ids) ** options.get("length_penalty", 1.0) == pytest.approx(trace.score, abs=1e-4)


def check_logits(trace: BeamTrace, output: Output, options: dict[str, Any]) -> None:
    assert trace.logits is not None
    chosen = zip(trace.logits, trace.beam_indices, output.token_ids, strict=False)
    total = sum(float(logits[beam].log_softmax(0)[token]) for logits, beam, token in chosen)
    if not options.get("diversity_penalty"):
        assert total / len(output.token_ids) ** options.get("length_penalty", 1.0) == pytest.approx(
            trace.score, abs=1e-4
        )


def check_internals(trace: BeamTrace, output: Output, options: dict[str, Any]) -> None:
    assert trace.seen is not None and len(trace.seen) >= len(output.token_ids)
    for step in trace.seen:
        assert step.hidden_states is not None and len(step.hidden_states[0]) == options["num_beams"]
    assert trace.past_key_values is not None


OF_THE_SEARCH = {"output_scores": check_scores, "output_logits": check_logits, "internals": check_internals}


def theirs(pair: Pair, options: dict[str, Any], own: dict[str, Any]) -> list[list[int]]:
    options = {"do_sample": False, **options}
    if "stop" in own or "stop_strings" in options:
        options |= {"stop_strings": own.get("stop", options.get("stop_strings")), "tokenizer": tiny_tokenizer()}
    torch.manual_seed(9)
    ids = torch.tensor([HEALED if "token_healing" in own else PROMPT])
    out = pair.hf.generate(ids, attention_mask=torch.ones_like(ids), **{"pad_token_id": 2, **options})
    rows: list[list[int]] = (out if isinstance(out, torch.Tensor) else out.sequences)[:, len(PROMPT) :].tolist()
    return rows


@pytest.fixture
def pair(tiny_pair: Callable[..., Pair]) -> Pair:
    return tiny_pair("llama")


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("mode", MODES)
def test_safety_20_beams_beside_every_option_work_or_are_refused_by_name(pair: Pair, mode: str, name: str) -> None:
    lm, (options, own) = pair.lm(), options_of(mode, name)
    words = refusal(mode, name)
    if words is not None:
        with pytest.raises((InvalidParam, UnsupportedOption), match=words):
            lm.generate([prompt_of(own)], **options, **own)
        return
    torch.manual_seed(9)
    outputs = lm.generate([prompt_of(own)], **options, **own, rng="torch" if options.get("do_sample") else "counter")
    found = [output for output in outputs if output.error is None]
    assert len(found) == len(outputs) or (mode == "force_words_ids" and name in TOO_FEW and found)
    if name == "custom_decoder":
        (alone,) = found
        without = {option: value for option, value in options.items() if option not in MODES[mode]}
        assert alone.beams is None
        assert options.get("do_sample") or alone.token_ids == lm.generate(prompt_of(own), **without).token_ids
    for output in found:
        if name != "custom_decoder":
            check_search(output, mode, name)
        if name in OF_THE_SEARCH:
            OF_THE_SEARCH[name](output.beams, output, options)
        else:
            FEATURES[name].holds(output, options)
    if mode in OF_TODAY and name not in OTHER_TOKENS:
        for output, row in zip(outputs, theirs(pair, options, own), strict=True):
            assert output.token_ids == row[: len(output.token_ids)]
            assert set(row[len(output.token_ids) :]) <= {2}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("mode", MODES)
def test_safety_20_beams_beside_every_option_give_the_same_alone_beside_another_and_streamed(
    pair: Pair, mode: str, name: str
) -> None:
    if refusal(mode, name) is not None:
        return
    lm, (options, own) = pair.lm(), options_of(mode, name)
    options |= own | ({"seed": 5} if options.get("do_sample") else {})
    alone = lm.generate([prompt_of(own)], **options)
    *beside, plain = lm.generate([prompt_of(own), BESIDE], params=[options, {"max_new_tokens": 3}])
    assert len(plain.token_ids) == 3
    tokens: dict[int, list[int]] = {at: [] for at in range(len(alone))}
    texts = dict.fromkeys(tokens, "")
    for piece in lm.stream([prompt_of(own)], **options):
        texts[piece.sample] += piece.text
        if piece.token_id is not None:
            tokens[piece.sample].append(piece.token_id)
    for at, (first, second) in enumerate(zip(alone, beside, strict=True)):
        assert (second.token_ids, second.text, second.finish_reason) == (
            first.token_ids, first.text, first.finish_reason,
        )  # fmt: skip
        assert (tokens[at], texts[at]) == (first.token_ids, first.text)


@pytest.mark.parametrize("mode", MODES)
def test_safety_20_a_streamer_is_given_the_one_output_of_a_search(pair: Pair, mode: str) -> None:
    options, own = options_of(mode, "streamer")
    check_streamed(pair.lm().generate(PROMPT, **{**options, "num_return_sequences": 1}, **own), options)


@pytest.mark.parametrize(
    "structure", [{"json_schema": {}}, {"regex": "a"}, {"grammar": 'start: "a"'}, {"choices": ["a"]}], ids=str
)
def test_safety_20_forced_words_beside_a_grammar_are_refused_by_name(pair: Pair, structure: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOption, match=f"^{next(iter(structure))} beside force_words_ids"):
        pair.lm().generate(PROMPT, **MODES["force_words_ids"], **structure)


@pytest.mark.parametrize("mode", MODES)
def test_safety_20_beams_over_embeddings_give_what_they_give_over_the_ids(pair: Pair, mode: str) -> None:
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, **MODES[mode]}
    options |= {"seed": 5} if mode == "beam sampling" else {}
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(PROMPT)).detach()
    over_ids, over_embeddings = (pair.lm().generate(prompt, **options) for prompt in (PROMPT, embeddings))
    scores = [output.beams.score for output in over_ids]
    if mode != "beam sampling":  # which draws by the position, and embeddings have none
        assert [output.token_ids for output in over_embeddings] == [output.token_ids for output in over_ids]
        assert [output.beams.score for output in over_embeddings] == pytest.approx(scores, abs=1e-4)
    assert all(len(output.token_ids) == NEW_TOKENS for output in over_embeddings)


@pytest.mark.parametrize("mode", MODES)
def test_safety_20_beams_over_a_sequence_to_continue_are_refused_by_name(pair: Pair, mode: str) -> None:
    with pair.lm().sequence(PROMPT) as sequence, pytest.raises(UnsupportedOption, match="num_beams="):
        pair.lm().generate(sequence, **MODES[mode])
