"""num_return_sequences: the tokens of generate(do_sample=True), in its order, after a prompt that ran once."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from engines import Results, all_free, lm_in_float64, lm_with
from handloom.decoding.decoder import SampleFinishedEvent, TokenEvent
from handloom.engine import Engine
from handloom.errors import InvalidParam, UnsupportedOption
from parity_checks import Pair
from tiny_models import random_ids, tiny_tokenizer

EOS_SET = list(range(4, 331, 20))
COMBINATIONS: dict[str, dict[str, Any]] = {
    "defaults": {"eos_token_id": None},
    "some end early": {"eos_token_id": EOS_SET},
    "hot": {"eos_token_id": EOS_SET, "temperature": 2.5, "top_k": 0},
    "filters": {"eos_token_id": EOS_SET, "top_p": 0.9, "min_p": 0.005, "top_k": 70, "temperature": 1.4},
    "penalties": {"eos_token_id": EOS_SET, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "stop strings": {"stop_strings": ["a", "e", "t"], "eos_token_id": 329},  # without one, generate does not pad
}
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 16}


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("count", [2, 5])
def test_the_torch_generator_gives_the_tokens_of_generate_in_its_order(pair: Pair, name: str, count: int) -> None:
    options = {**SAMPLED, **COMBINATIONS[name], "num_return_sequences": count}
    prompt = random_ids(count, 13)
    torch.manual_seed(count)
    ours = pair.lm().generate(prompt, rng="torch", **options)
    state = torch.get_rng_state()
    torch.manual_seed(count)
    tokenizer = {"tokenizer": tiny_tokenizer()} if "stop_strings" in options else {}
    ids = torch.tensor([prompt])
    out = pair.hf.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=330, **options, **tokenizer)
    theirs = out[:, len(prompt) :]
    assert len(ours) == count == len(theirs)
    for own, row in zip(ours, theirs.tolist(), strict=True):
        assert own.token_ids == row[: len(own.token_ids)]
        assert set(row[len(own.token_ids) :]) <= {330}, "the rest is padding"
    assert len({tuple(own.token_ids) for own in ours}) > 1
    assert torch.equal(state, torch.get_rng_state())


def test_output_i_is_what_its_seed_gives_alone_and_the_first_is_the_request_with_one(pair: Pair) -> None:
    lm, prompt = pair.lm(), random_ids(1, 21)
    options = {**SAMPLED, "eos_token_id": EOS_SET, "logprobs": 2}
    several = lm.generate(prompt, seed=5, num_return_sequences=4, **options)
    assert several[0].seed == 5 and len({output.seed for output in several}) == 4
    for output in several:
        alone = lm.generate(prompt, **{**options, "seed": output.seed})
        assert (output.token_ids, output.text, output.finish_reason) == (
            alone.token_ids,
            alone.text,
            alone.finish_reason,
        )
        assert output.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert [o.token_ids for o in lm.generate(prompt, seed=5, num_return_sequences=2, **options)] == [
        o.token_ids for o in several[:2]
    ]


def test_a_list_of_prompts_gives_one_list_in_the_order_of_transformers(pair: Pair) -> None:
    lm, prompts = pair.lm(), [random_ids(i, 9 + 5 * i) for i in range(3)]
    counts = [{"num_return_sequences": n, "seed": n} for n in (2, 1, 3)]
    outputs = lm.generate(prompts, params=counts, **SAMPLED)
    expected = [lm.generate(p, **own, **SAMPLED) for p, own in zip(prompts, counts, strict=True)]
    assert [o.token_ids for o in outputs] == [
        o.token_ids for own in expected for o in (own if isinstance(own, list) else [own])
    ]
    assert [o.prompt_token_ids for o in outputs] == [prompts[i] for i in (0, 0, 1, 2, 2, 2)]


def test_pieces_say_whose_they_are(pair: Pair) -> None:
    options = {**SAMPLED, "num_return_sequences": 3, "seed": 3, "eos_token_id": EOS_SET}
    expected = pair.lm().generate([random_ids(1, 8), random_ids(2, 8)], **options)
    tokens, texts = defaultdict(list), defaultdict(str)
    for piece in pair.lm().stream([random_ids(1, 8), random_ids(2, 8)], **options):
        texts[piece.index, piece.sample] += piece.text
        if piece.token_id is not None:
            tokens[piece.index, piece.sample].append(piece.token_id)
    places = [(index, sample) for index in range(2) for sample in range(3)]
    assert [tokens[place] for place in places] == [output.token_ids for output in expected]
    assert [texts[place] for place in places] == [output.text for output in expected]


def test_the_prompt_runs_once_and_its_pages_are_shared() -> None:
    lm = lm_with(200, 4)
    engine = Engine(lm, prefix_cache=False)
    engine.add_request(random_ids(1, 41), num_return_sequences=8, seed=1, max_new_tokens=3, eos_token_id=[])
    engine.step()
    assert engine.stats().num_computed == 41
    engine.step()
    used = lm.pool.num_pages - lm.pool.num_free
    assert used == 10 + 8, "ten full pages for all, and one of its own for each"
    list(engine.run())
    assert engine.stats().num_computed == 41 + 8 * 2
    assert all_free(lm)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 9}, {"prefix_cache": False}], ids=str)
def test_outputs_are_the_same_where_pages_run_out(family: str, limits: dict[str, Any]) -> None:
    """Float64, since prefill and decode round differently: see `lm_in_float64`."""
    roomy, tight = lm_in_float64(family=family), lm_in_float64(30, family=family)
    prompts = [random_ids(i, length) for i, length in enumerate((9, 14, 21))]
    options = {"num_return_sequences": 4, "max_new_tokens": 14, "eos_token_id": EOS_SET[::5], "top_k": 0}
    engine = Engine(tight, **limits)
    requests = [engine.add_request(p, seed=i, **options) for i, p in enumerate(prompts)]
    tokens, results = defaultdict(list), Results()
    while engine.has_work:
        events = engine.step()
        for event in events:
            if isinstance(event, TokenEvent):
                tokens[event.request_id, event.sample].append(event.token_id)
        results.take(event for event in events if not isinstance(event, SampleFinishedEvent))
    assert engine.stats().num_preempted > 0, "nobody was stopped, so nothing was proven"
    for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        expected = [output.token_ids for output in roomy.generate(prompt, seed=i, **options)]
        assert [tokens[request, sample] for sample in range(4)] == expected
    assert all_free(tight)


def test_an_output_that_fails_leaves_the_others(pair: Pair) -> None:
    """As prompts of a list do; a call with one prompt raises what failed first."""
    prompt = random_ids(1, 9)

    def fails_after_a_low_token(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > len(prompt) and int(ids[0, len(prompt)]) % 2:
            raise ValueError("odd")
        return scores

    options = {**SAMPLED, "num_return_sequences": 6, "seed": 1, "eos_token_id": None}
    plain = pair.lm().generate(prompt, **options)
    failing = pair.lm().generate([prompt], logits_processor=[fails_after_a_low_token], **options)
    assert {output.finish_reason for output in failing} == {"error", "length"}
    for own, free in zip(failing, plain, strict=True):
        assert own.token_ids == (free.token_ids if own.error is None else free.token_ids[:1])


def test_what_makes_no_sense_is_refused_by_name(pair: Pair) -> None:
    lm, prompt = pair.lm(), random_ids(1, 5)
    with pytest.raises(InvalidParam, match=r"num_return_sequences=2.*sample"):
        lm.generate(prompt, num_return_sequences=2, do_sample=False)
    with pytest.raises(ValueError, match="num_return_sequences"):
        pair.hf.generate(torch.tensor([prompt]), num_return_sequences=2, do_sample=False)
    with lm.sequence(prompt) as sequence, pytest.raises(UnsupportedOption, match="num_return_sequences=2"):
        lm.generate(sequence, num_return_sequences=2, do_sample=True)
    with pytest.raises(UnsupportedOption, match="prompt_logprobs"):
        lm.generate(prompt, num_return_sequences=2, do_sample=True, prompt_logprobs=1)
    with pytest.raises(InvalidParam, match="num_return_sequences=3"):
        lm.chat([{"role": "user", "content": "Hi"}], num_return_sequences=3)
