"""Beam search and beam sampling: the outputs, scores and beams of generate(num_beams=…).

By the tie rule of parity: where an output differs, its score is that of generate's within SCORES_TOLERANCE.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers import SynthIDTextWatermarkingConfig as SynthIDConfig

from handloom.errors import InvalidParam, NonFiniteLogits, UnsupportedOption
from handloom.output import Output
from parity_checks import SCORES_TOLERANCE, Pair
from tiny_models import random_ids, tiny_tokenizer

EOS, EOS_SET = [7], list(range(4, 331, 30))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"eos_token_id": None},
    "one eos": {"eos_token_id": EOS},
    "several eos": {"eos_token_id": EOS_SET},
    "early": {"eos_token_id": EOS_SET, "early_stopping": True},
    "never": {"eos_token_id": EOS_SET, "early_stopping": "never"},
    "long": {"eos_token_id": EOS_SET, "length_penalty": 2.0},
    "never, long": {"eos_token_id": EOS_SET, "length_penalty": 1.5, "early_stopping": "never"},
    "short": {"eos_token_id": EOS_SET, "length_penalty": -1.0},
    "never, short": {"eos_token_id": EOS_SET, "length_penalty": -0.5, "early_stopping": "never"},
    "no length": {"eos_token_id": EOS_SET, "length_penalty": 0.0},
    "max_length": {"eos_token_id": EOS_SET, "max_length": 20, "max_new_tokens": None},
    "repetition": {"repetition_penalty": 1.8, "eos_token_id": EOS},
    "ngrams": {"no_repeat_ngram_size": 1, "eos_token_id": EOS_SET},
    "both lengths": {"min_new_tokens": 5, "min_length": 20, "eos_token_id": EOS_SET},
    "forced": {"forced_eos_token_id": 5, "eos_token_id": EOS, "suppress_tokens": [*range(100)][6:]},
    "biases": {"sequence_bias": [[[9], 3.0], [[9, 10], 20.0]], "bad_words_ids": [[11, 12], [13]]},
    "renormalised": {"renormalize_logits": True, "repetition_penalty": 0.7, "eos_token_id": EOS_SET},
    "decay": {"exponential_decay_length_penalty": (2, 1.3), "eos_token_id": EOS_SET},
    "stop strings": {"stop_strings": ["a", "in", "e", "\n"], "eos_token_id": EOS},
    "allowed": {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1]) * 7 % 331, 5, 9, 12], "eos_token_id": EOS},
    "few allowed": {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1]) * 7 % 331, 5], "eos_token_id": EOS},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "defaults": {"eos_token_id": EOS_SET},
    "no eos": {"eos_token_id": None},
    "hot": {"temperature": 2.5, "top_k": 0, "eos_token_id": EOS},
    "keeps what goes on": {"top_k": 1, "eos_token_id": EOS_SET, "top_p": 0.01},
    "nucleus": {"top_p": 0.3, "top_k": 0, "eos_token_id": EOS},
    "min_p": {"min_p": 0.9, "top_k": 0, "eos_token_id": EOS_SET},
    "typical": {"typical_p": 0.1, "top_k": 0, "eos_token_id": EOS_SET},
    "cutoffs": {"epsilon_cutoff": 0.2, "eta_cutoff": 0.3, "top_k": 0, "eos_token_id": EOS},
    "never": {"early_stopping": "never", "length_penalty": 0.5, "eos_token_id": EOS_SET},
}


def theirs(pair: Pair, prompt: list[int], options: dict[str, Any]) -> Any:
    tokenizer = {"tokenizer": tiny_tokenizer()} if "stop_strings" in options else {}
    return pair.hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),  # a prompt may hold what pads
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=330,
        **{"do_sample": False, **options},
        **tokenizer,
    )


def check(ours: list[Output], result: Any, prompt: list[int], what: Any = "") -> int:
    """Every output, score and beam index is generate's, or ties with it; returns how many tied."""
    ties = 0
    assert len(ours) == len(result.sequences), what
    columns = zip(ours, result.sequences.tolist(), result.sequences_scores.tolist(), result.beam_indices, strict=True)
    for output, row, score, indices in columns:
        assert output.beams.score == pytest.approx(score, rel=SCORES_TOLERANCE, abs=SCORES_TOLERANCE), what
        tokens = row[len(prompt) :][: int((indices >= 0).sum())]
        if output.token_ids != tokens:
            ties += 1
        else:
            assert output.beams.beam_indices == indices[: len(tokens)].tolist(), what
    return ties


def as_list(outputs: Any) -> list[Output]:
    return outputs if isinstance(outputs, list) else [outputs]


@pytest.mark.parametrize("name", OPTIONS)
def test_beam_search_gives_the_outputs_of_generate(pair: Pair, name: str) -> None:
    for beams, outputs, length in ((2, 1, 11), (4, 4, 17), (5, 3, 1)):
        prompt = random_ids(beams, length)
        options = {"max_new_tokens": 12, "num_beams": beams, "num_return_sequences": outputs, **OPTIONS[name]}
        result = theirs(pair, prompt, options)
        ours = as_list(pair.lm().generate(prompt, **options))
        assert check(ours, result, prompt, options) == 0


@pytest.mark.parametrize("name", SAMPLED)
def test_beam_sampling_gives_the_outputs_of_generate(pair: Pair, name: str) -> None:
    for beams, outputs in ((2, 2), (4, 1)):
        prompt = random_ids(beams, 9)
        options = {"max_new_tokens": 12, "num_beams": beams, "num_return_sequences": outputs, **SAMPLED[name]}
        options["do_sample"] = True
        torch.manual_seed(3)
        result = theirs(pair, prompt, options)
        torch.manual_seed(3)
        ours = as_list(pair.lm().generate(prompt, rng="torch", **options))
        assert check(ours, result, prompt, options) == 0


def random_options(draw: random.Random) -> dict[str, Any]:
    """Options of beams and rules, each on or off, with values from harmless to extreme."""
    beams = draw.randint(2, 6)
    options: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": draw.randint(1, beams),
        "max_new_tokens": draw.randint(1, 18),
        "eos_token_id": draw.choice((None, draw.randrange(331), draw.sample(range(331), draw.randint(2, 40)))),
    }
    maybe: dict[str, Any] = {
        "length_penalty": draw.choice((-1.5, 0.0, 0.3, 2.0, 5.0)),
        "early_stopping": draw.choice((True, "never")),
        "repetition_penalty": draw.choice((0.6, 1.3, 4.0)),
        "no_repeat_ngram_size": draw.choice((1, 2, 3)),
        "encoder_no_repeat_ngram_size": draw.choice((1, 2)),
        "min_new_tokens": draw.randint(0, options["max_new_tokens"]),
        "stop_strings": ["".join(draw.choices("aeiot 12(){}n\n", k=draw.choice((1, 1, 2)))) for _ in range(4)],
        "suppress_tokens": draw.sample(range(331), 60),
        "renormalize_logits": True,
    }
    options |= {name: value for name, value in maybe.items() if draw.random() < 0.35}
    if draw.random() < 0.4:
        knobs = {
            "temperature": draw.choice((0.3, 2.0)), "top_k": draw.choice((0, 2, 80)), "top_p": draw.choice((0.2, 0.9)),
            "min_p": draw.choice((0.01, 0.5)), "typical_p": 0.6, "epsilon_cutoff": 0.02,
        }  # fmt: skip
        options |= {"do_sample": True, **{name: value for name, value in knobs.items() if draw.random() < 0.4}}
    return options


def compare_random(pair: Pair, seed: int) -> None:
    draw = random.Random(seed)
    prompt = random_ids(seed, draw.choice((1, 2, 15, 16, 17, 40)))
    options = random_options(draw)
    torch.manual_seed(seed)
    result = theirs(pair, prompt, options)
    torch.manual_seed(seed)
    ours = pair.lm().generate([prompt], **options, **({"rng": "torch"} if "do_sample" in options else {}))
    for output, score in zip(ours, result.sequences_scores.tolist(), strict=True):
        assert (output.finish_reason == "error") == (score <= -1e9), "where there are too few, generate gives padding"
    found = [at for at, output in enumerate(ours) if output.error is None]
    ours = [ours[at] for at in found]
    for name in ("sequences", "sequences_scores", "beam_indices"):
        result[name] = result[name][found]
    assert check(ours, result, prompt, options) == 0, options


@pytest.mark.parametrize("seed", range(15))
def test_random_options_together_give_the_outputs_of_generate(pair: Pair, seed: int) -> None:
    compare_random(pair, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15, 150))
def test_many_random_options_together_give_the_outputs_of_generate(pair: Pair, seed: int) -> None:
    compare_random(pair, seed)


def test_scores_and_logits_of_the_search_are_those_of_generate(pair: Pair) -> None:
    prompt = random_ids(3, 10)
    options = {
        "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "eos_token_id": EOS_SET,
        "repetition_penalty": 1.3, "output_logits": True,
    }  # fmt: skip
    result = theirs(pair, prompt, options)
    ours = pair.lm().generate(prompt, output_scores=True, **options)
    for at, output in enumerate(ours):
        converted = output.to_transformers()
        assert output.scores is None and output.logits is None
        assert type(converted) is type(result)
        length = len(prompt) + len(output.token_ids)
        assert torch.equal(converted.sequences[0], result.sequences[at, :length])
        assert torch.equal(converted.beam_indices[0], result.beam_indices[at, : len(output.token_ids)])
        torch.testing.assert_close(converted.sequences_scores, result.sequences_scores[at : at + 1])
        for name in ("scores", "logits"):
            torch.testing.assert_close(getattr(converted, name), getattr(result, name), rtol=1e-4, atol=1e-4)
        transitions = pair.hf.compute_transition_scores(
            converted.sequences, converted.scores, converted.beam_indices, normalize_logits=False
        )
        total = float(transitions.sum() / len(output.token_ids))
        assert total == pytest.approx(output.beams.score, abs=1e-4)


def test_logprobs_are_the_models_own_along_each_output(pair: Pair) -> None:
    lm, prompt = pair.lm(), random_ids(3, 10)
    outputs = lm.generate(
        prompt,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=8,
        eos_token_id=EOS_SET,
        logprobs=3,
        repetition_penalty=1.5,
    )
    for output in outputs:
        score = lm.score([*prompt, *output.token_ids])
        assert output.logprobs == pytest.approx(score.logprobs[len(prompt) - 1 :], abs=1e-4)
        assert len(output.top_logprobs) == len(output.token_ids)
        for best, own in zip(output.top_logprobs, output.logprobs, strict=True):
            assert len(best) == 3 and best[0][1] >= own


class EndsAtEven(StoppingCriteria):
    """Ends what has an even last token after five; remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.calls.append(tuple(input_ids.shape))
        return (input_ids[:, -1] % 2 == 0) & (input_ids.shape[1] > 15)


def test_criteria_of_the_caller_end_beams_as_in_generate(pair: Pair) -> None:
    prompt = random_ids(3, 10)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 14, "eos_token_id": EOS}
    mine, other = EndsAtEven(), EndsAtEven()
    result = theirs(pair, prompt, {**options, "stopping_criteria": StoppingCriteriaList([other])})
    ours = pair.lm().generate(prompt, stopping_criteria=[mine], **options)
    assert check(ours, result, prompt) == 0
    assert mine.calls == other.calls
    assert "criteria" in {output.finish_reason for output in ours}


@pytest.mark.parametrize("sampled", [False, True], ids=["search", "sampling"])
def test_processors_of_the_caller_run_after_the_log_softmax(pair: Pair, sampled: bool) -> None:
    prompt, options = random_ids(3, 10), {"num_beams": 3, "max_new_tokens": 8, "do_sample": sampled}

    def halve(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert bool((scores <= 0).all()), "log-probabilities"
        return scores * 0.5

    torch.manual_seed(1)
    result = theirs(pair, prompt, {**options, "logits_processor": LogitsProcessorList([halve])})
    torch.manual_seed(1)
    rng = "torch" if sampled else "counter"
    assert check([pair.lm().generate(prompt, rng=rng, logits_processor=[halve], **options)], result, prompt) == 0


def test_embeddings_go_on_as_in_generate(pair: Pair) -> None:
    prompt = random_ids(3, 10)
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(prompt)).detach()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "eos_token_id": EOS_SET}
    result = pair.hf.generate(
        inputs_embeds=embeddings[None], return_dict_in_generate=True, output_scores=True, do_sample=False, **options
    )
    assert check(pair.lm().generate(embeddings, **options), result, []) == 0


def test_a_model_whose_file_asks_for_beams_has_them(pair: Pair) -> None:
    lm, prompt = pair.lm(), random_ids(3, 10)
    own = type(lm)(
        lm.transformer, lm.tokenizer, lm.pool, name="", generation_config={"num_beams": 3, "eos_token_id": 0}
    )
    expected = lm.generate(prompt, num_beams=3, eos_token_id=0)
    assert own.generate(prompt).token_ids == expected.token_ids
    assert own.generate(prompt).beams.score == expected.beams.score


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_beams": 3, "num_return_sequences": 4}, InvalidParam, "num_return_sequences=4.*num_beams=3"),
        ({"num_beams": 0}, InvalidParam, "num_beams=0"),
        ({"num_beams": 2, "early_stopping": "yes"}, InvalidParam, "early_stopping='yes'"),
        ({"length_penalty": 2.0}, InvalidParam, "length_penalty=2.0.*num_beams"),
        ({"early_stopping": True}, InvalidParam, "early_stopping=True.*num_beams"),
        ({"num_beams": 2, "length_penalty": 51}, InvalidParam, "length_penalty=51"),
        ({"num_beams": 2, "eos_token_id": list(range(331))}, InvalidParam, "num_beams=2.*331"),
        ({"num_beams": 2, "prompt_logprobs": 1}, UnsupportedOption, "prompt_logprobs"),
        ({"num_beams": 2, "encoder_repetition_penalty": 1.5}, UnsupportedOption, "encoder_repetition_penalty=1.5"),
        ({"num_beams": 2, "num_beam_groups": 2}, InvalidParam, "num_beam_groups"),
        ({"num_beams": 2, "watermarking_config": SynthIDConfig(3, [1, 2])}, UnsupportedOption, "SynthID"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_sense_is_refused_by_name(pair: Pair, options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pair.lm().generate(random_ids(1, 5), **options)


def test_beams_of_a_sequence_to_continue_are_refused_by_name(pair: Pair) -> None:
    with pair.lm().sequence(random_ids(1, 5)) as sequence, pytest.raises(UnsupportedOption, match="num_beams=2"):
        pair.lm().generate(sequence, num_beams=2)


def test_where_everything_is_banned_the_request_ends_with_an_error(pair: Pair) -> None:
    with pytest.raises(NonFiniteLogits, match="nothing is left to choose"):
        pair.lm().generate(random_ids(1, 5), num_beams=2, suppress_tokens=list(range(331)))
