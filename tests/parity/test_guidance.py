"""Classifier-free guidance: tokens, scores and logits are those of generate, whatever is asked for beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from engines import all_free, lm_with
from handloom.engine import Engine
from handloom.errors import ContextOverflow, InvalidParam, InvalidPrompt, UnsupportedOption
from parity_checks import SCORES_TOLERANCE, Pair, assert_tokens_equal, hf_generate
from tiny_models import TINY, random_ids, tiny_tokenizer

EOS = list(range(4, 331, 30))
NEGATIVE = random_ids(50, 7)
BASE: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": EOS}


def tensors(options: dict[str, Any]) -> dict[str, Any]:
    """The options as transformers takes them."""
    ids = options.get("negative_prompt_ids")
    return options if ids is None else {**options, "negative_prompt_ids": torch.tensor([ids])}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("scale", [1.5, 3.0, 0.0, -0.7])
@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_greedy_tokens_are_those_of_generate(
    tiny_pair: Callable[..., Pair], family: str, scale: float, negative: list[int] | None
) -> None:
    pair = tiny_pair(family)
    for seed, length in enumerate((1, 6, 19)):
        prompt = random_ids(seed, length)
        options = {**BASE, "guidance_scale": scale, "negative_prompt_ids": negative}
        ours = pair.lm().generate(prompt, **options).token_ids
        assert_tokens_equal(pair.hf, prompt, ours, **tensors(options))


def test_guidance_changes_tokens_and_a_scale_of_one_does_not(pair: Pair) -> None:
    prompt = random_ids(3, 9)
    plain = pair.lm().generate(prompt, **BASE).token_ids
    for options in ({"guidance_scale": 1}, {"guidance_scale": 1.0, "negative_prompt_ids": NEGATIVE}):
        assert pair.lm().generate(prompt, **BASE, **options).token_ids == plain
        assert hf_generate(pair.hf, prompt, do_sample=False, **BASE, **tensors(options)) == plain
    last = pair.lm().generate(prompt, **BASE, guidance_scale=2.0).token_ids
    away = pair.lm().generate(prompt, **BASE, guidance_scale=2.0, negative_prompt_ids=NEGATIVE).token_ids
    assert len({*map(tuple, (plain, last, away))}) == 3


BESIDE: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "sequence_bias": {(70,): 3.0}},
    "bans": {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": list(range(40, 90)), "min_new_tokens": 8},
    "stop": {"stop_strings": ["e", "th"]},
    "renormalised": {"renormalize_logits": True, "do_sample": True, "typical_p": 0.8, "top_k": 0},
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_scores_and_logits_beside_other_rules_are_those_of_generate(
    pair: Pair, name: str, negative: list[int] | None
) -> None:
    prompt = random_ids(4, 11)
    options = {**BASE, **BESIDE[name], "guidance_scale": 1.8, "negative_prompt_ids": negative}
    outputs = {"output_scores": True, "output_logits": True}
    torch.manual_seed(5)
    output = pair.lm().generate(prompt, rng="torch", logprobs=0, **options, **outputs)
    torch.manual_seed(5)
    tokenizer = {"tokenizer": tiny_tokenizer()} if "stop_strings" in options else {}
    result = pair.hf.generate(
        torch.tensor([prompt]),
        return_dict_in_generate=True,
        **{"do_sample": False, **tensors(options)},
        **outputs,
        **tokenizer,
    )
    assert output.token_ids == result.sequences[0, len(prompt) :].tolist()
    for ours, theirs in ((output.scores, result.scores), (output.logits, result.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.cat(theirs), rtol=1e-4, atol=20 * SCORES_TOLERANCE)
    for logits, token, logprob in zip(output.logits, output.token_ids, output.logprobs, strict=True):
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_several_outputs_are_those_of_generate(pair: Pair, negative: list[int] | None) -> None:
    """generate wants one negative prompt for each of the outputs."""
    prompt = random_ids(8, 10)
    options = {**BASE, "do_sample": True, "guidance_scale": 1.6, "num_return_sequences": 4}
    torch.manual_seed(2)
    ours = pair.lm().generate(prompt, rng="torch", negative_prompt_ids=negative, **options)
    torch.manual_seed(2)
    repeated = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative] * 4)}
    theirs = pair.hf.generate(torch.tensor([prompt]), pad_token_id=330, **options, **repeated)
    for output, row in zip(ours, theirs.tolist(), strict=True):
        tokens = row[len(prompt) :]
        assert output.token_ids == tokens[: len(output.token_ids)]
        assert set(tokens[len(output.token_ids) :]) <= {330}


class Recomputing(LogitsProcessor):
    """Guidance of every row by a pass of its own, without a cache: that of generate does not follow the beams."""

    def __init__(self, model: PreTrainedModel, scale: float, prompt_length: int, negative: list[int]) -> None:
        self.model, self.scale, self.prompt_length, self.negative = model, scale, prompt_length, negative

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, self.prompt_length :]
        ids = torch.cat([torch.tensor([self.negative] * len(new)), new], dim=1)
        away = self.model(ids).logits[:, -1].float().log_softmax(-1)
        return away + self.scale * (scores.log_softmax(-1) - away)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("sampled", [False, True])
def test_every_beam_is_guided_by_its_own_tokens(pair: Pair, negative: list[int] | None, sampled: bool) -> None:
    prompt = random_ids(9, 12)
    options = {**BASE, "num_beams": 4, "num_return_sequences": 3, "do_sample": sampled}
    torch.manual_seed(7)
    ours = pair.lm().generate(
        prompt, guidance_scale=1.4, negative_prompt_ids=negative, rng="torch" if sampled else "counter", **options
    )
    torch.manual_seed(7)
    own = LogitsProcessorList([Recomputing(pair.hf, 1.4, len(prompt), negative or prompt[-1:])])
    theirs = pair.hf.generate(torch.tensor([prompt]), logits_processor=own, pad_token_id=330, **options)
    for output, row in zip(ours, theirs.tolist(), strict=True):
        tokens = row[len(prompt) :]
        assert output.token_ids == tokens[: len(output.token_ids)]
        assert set(tokens[len(output.token_ids) :]) <= {330}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_may_have_a_row_of_negative_ids_for_each_prompt(pair: Pair, batch: int) -> None:
    ids, negative = (torch.tensor([random_ids(seed + i, 9) for i in range(batch)]) for seed in (5, 50))
    options = {**BASE, "guidance_scale": 1.7, "negative_prompt_ids": negative}
    ours = pair.lm().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for row, output in zip(pair.hf.generate(ids, **options)[:, 9:].tolist(), ours, strict=True):
        assert output.token_ids == row[: len(output.token_ids)]
        assert {*row[len(output.token_ids) :]} <= {pair.hf.generation_config.pad_token_id}
    with pytest.raises(InvalidParam, match="negative_prompt_ids"):
        pair.lm().generate(input_ids=ids[:1], **{**options, "negative_prompt_ids": negative.repeat(2, 1)})


def test_a_negative_text_is_its_ids(pair: Pair) -> None:
    text = "There was once a happy dragon"
    ids = pair.lm().encode(text).token_ids
    options = {**BASE, "guidance_scale": 2.5}
    expected = pair.lm().generate("Once", negative_prompt_ids=torch.tensor(ids), **options)
    assert pair.lm().generate("Once", negative_prompt=text, **options).token_ids == expected.token_ids
    pieces = list(pair.lm().stream("Once", negative_prompt=text, **options))
    assert [piece.token_id for piece in pieces[:-1]] == expected.token_ids
    assert "".join(piece.text for piece in pieces) == expected.text


def test_embeddings_are_guided_by_a_negative_prompt_and_need_one(pair: Pair) -> None:
    prompt = random_ids(5, 8)
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(prompt)).detach()
    expected = pair.lm().generate(prompt, guidance_scale=2.0, negative_prompt_ids=NEGATIVE, **BASE)
    output = pair.lm().generate(embeddings, guidance_scale=2.0, negative_prompt_ids=NEGATIVE, **BASE)
    assert output.token_ids == expected.token_ids
    with pytest.raises(UnsupportedOption, match=r"guidance_scale.*negative_prompt_ids"):
        pair.lm().generate(embeddings, guidance_scale=2.0, **BASE)


def test_both_prompts_run_in_one_step_and_one_token_each_after(pair: Pair) -> None:
    lm = lm_with(200, 4)
    engine = Engine(lm, prefix_cache=False)
    engine.add_request(
        random_ids(1, 21), guidance_scale=2.0, negative_prompt_ids=NEGATIVE, max_new_tokens=5, eos_token_id=[]
    )
    computed = []
    while engine.has_work:
        engine.step()
        computed.append(engine.stats().num_computed)
    assert computed == [28, 30, 32, 34, 36]
    assert all_free(lm)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"guidance_scale": float("nan")}, InvalidParam, "guidance_scale"),
        ({"guidance_scale": float("inf")}, InvalidParam, "guidance_scale"),
        ({"guidance_scale": "2"}, InvalidParam, "guidance_scale"),
        ({"guidance_scale": True}, InvalidParam, "guidance_scale"),
        ({"negative_prompt_ids": NEGATIVE}, InvalidParam, "guidance_scale"),
        ({"negative_prompt": "no"}, InvalidParam, "guidance_scale"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": []}, InvalidParam, "negative_prompt_ids"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": [331]}, InvalidParam, "negative_prompt_ids"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": [-1]}, InvalidParam, "negative_prompt_ids"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": [1.0]}, InvalidParam, "negative_prompt_ids"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": "no"}, InvalidParam, "negative_prompt_ids"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(1, 3).long()}, InvalidParam, "negative_prompt_ids"),
        ({"guidance_scale": 2.0, "negative_prompt": ["no"]}, InvalidParam, "negative_prompt"),
        ({"guidance_scale": 2.0, "negative_prompt": "no", "negative_prompt_ids": [5]}, InvalidParam, "two ways"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": [5] * 253}, ContextOverflow, "negative prompt has 253"),
        ({"guidance_scale": 2.0, "negative_prompt": "a \ud800"}, InvalidPrompt, "surrogate"),
        ({"guidance_scale": 2.0, "prompt_logprobs": 1}, UnsupportedOption, "guidance_scale"),
        (
            {"guidance_scale": 2.0, "negative_prompt_attention_mask": [1]},
            UnsupportedOption,
            "negative_prompt_attention",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(pair: Pair, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pair.lm().generate(random_ids(1, 5), max_new_tokens=4, **options)


def test_a_sequence_to_continue_in_place_is_refused_by_name(pair: Pair) -> None:
    with pair.lm().sequence(random_ids(1, 5)) as sequence, pytest.raises(UnsupportedOption, match="guidance_scale=2"):
        pair.lm().generate(sequence, guidance_scale=2.0)
