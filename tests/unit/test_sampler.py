"""Choosing tokens: transformers' own loop as the oracle, one row's trouble kept to that row, logprobs of the model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as hf

from handloom.errors import NonFiniteLogits
from handloom.sampling import sampler
from handloom.sampling.params import GenerationParams
from handloom.sampling.rules import Row
from handloom.sampling.sampler import choose, token_logprobs
from handloom.sampling.watermark import SynthID, Watermark
from sampler_rows import MIXED, SAMPLED, random_logits, row

INF = torch.inf


# Greedy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_takes_the_lowest_id_among_equals_like_argmax(dtype):
    logits = random_logits(50).mul(2).round().to(dtype)
    assert choose(logits, [row()] * 50).token_ids == logits.float().argmax(dim=-1).tolist()


def test_plain_greedy_rows_are_not_copied(monkeypatch):
    monkeypatch.setattr(sampler, "_float32_copy", None)
    assert choose(random_logits(3), [row(), row(logprobs=1), row(top_k=5, temperature=3.0)]).errors == [None] * 3


def test_a_step_without_rows_chooses_nothing():
    assert choose(torch.zeros(0, 9), []).token_ids == []


def test_logits_are_left_as_they_are():
    logits = random_logits(len(MIXED))
    before = logits.clone()
    choose(logits, MIXED)
    assert torch.equal(logits, before)


# Batch invariance and reproduction ------------------------------------------------------------------


def test_a_row_gets_the_same_token_scores_and_logprobs_alone_and_in_any_batch():
    logits = random_logits(len(MIXED))
    together = choose(logits, MIXED)
    for i, one in enumerate(MIXED):
        alone = choose(logits[i : i + 1], [one])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.top_logprobs[0] == together.top_logprobs[i]
    order = [4, 2, 0, 5, 1, 3]
    shuffled = choose(logits[order], [MIXED[i] for i in order])
    assert shuffled.token_ids == [together.token_ids[i] for i in order]


def test_rows_shaped_in_blocks_choose_as_rows_shaped_together(monkeypatch):
    logits = random_logits(len(MIXED))
    together = choose(logits, MIXED)
    monkeypatch.setattr(sampler, "CPU_BLOCK", 2 * logits.shape[1])
    in_blocks = choose(logits, MIXED)
    assert (in_blocks.token_ids, in_blocks.logprobs) == (together.token_ids, together.logprobs)


def test_the_draw_depends_on_seed_and_length_of_the_sequence():
    logits = torch.zeros(1, 1000)
    lengths = {n: choose(logits, [row([0] * n, seed=1, do_sample=True, top_k=0)]).token_ids[0] for n in range(3, 40)}
    seeds = {n: choose(logits, [row([0] * 3, seed=n, do_sample=True, top_k=0)]).token_ids[0] for n in range(40)}
    assert len(set(lengths.values())) > 30
    assert len(set(seeds.values())) > 30


def test_draws_follow_the_processed_distribution():
    draws, logits = 6000, random_logits(1, vocab_size=30, seed=3)
    params = {"do_sample": True, "temperature": 1.5, "top_k": 12, "top_p": 0.95, "min_p": 0.01}
    rows = [row([1] * (3 + n % 60), seed=n // 60, output_scores=n == 0, **params) for n in range(draws)]
    choice = choose(logits.expand(draws, -1), rows)
    scores = choice.scores[0]
    assert scores is not None
    expected = scores.double().softmax(dim=0) * draws
    counts = torch.bincount(torch.tensor(choice.token_ids), minlength=30).double()
    alive = expected > 0
    assert counts[~alive].sum() == 0
    statistic = float(((counts - expected)[alive] ** 2 / expected[alive]).sum())
    degrees = int(alive.sum()) - 1
    assert 6 <= degrees <= 11
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3  # 99.99 %


# Against generate() of transformers -----------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=307, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def ours(model: LlamaForCausalLM, prompt: list[int], params: GenerationParams) -> tuple[list[int], list[torch.Tensor]]:
    """A loop of our own over transformers' logits: tokens and processed scores."""
    tokens, scores = list(prompt), []
    for _ in range(params.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[:, -1]
        choice = choose(logits, [Row(params, tokens, len(prompt))])
        assert choice.errors == [None]
        tokens.append(choice.token_ids[0])
        scores += [score for score in choice.scores if score is not None]
        if tokens[-1] in params.eos_token_id:
            break
    return tokens, scores


OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 7, "temperature": 0.7},
    {"do_sample": True, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    {"do_sample": True, "top_k": 0, "top_p": 0.6, "eos_token_id": [2, 9], "min_new_tokens": 12},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_torch_generator_gives_the_very_tokens_and_scores_of_generate(model, options):
    prompt, length = [1, 17, 33, 17, 250], {"max_new_tokens": 14, "output_scores": True}
    for kwargs in (options, {**options, "logits_processor": [hf.NoRepeatNGramLogitsProcessor(2)]}):
        torch.manual_seed(42)
        with torch.no_grad():
            reference = model.generate(torch.tensor([prompt]), return_dict_in_generate=True, **length, **kwargs)
        eos = kwargs.get("eos_token_id", 2)
        settings = {"rng": "torch", **length, **kwargs}
        settings["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
        settings["logits_processor"] = tuple(kwargs.get("logits_processor", ()))
        if "min_new_tokens" in kwargs:
            settings["min_length"] = len(prompt) + kwargs["min_new_tokens"]
        torch.manual_seed(42)
        tokens, scores = ours(model, prompt, GenerationParams(**settings))
        assert tokens == reference.sequences[0].tolist()
        assert len(scores) == len(reference.scores)
        for mine, theirs in zip(scores, reference.scores, strict=True):
            torch.testing.assert_close(mine, theirs[0], rtol=1e-5, atol=1e-5)


def test_the_global_generator_is_not_touched_by_the_counter_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    choose(random_logits(len(MIXED)), MIXED)
    assert torch.equal(torch.get_rng_state(), before)


# SAFETY: NaN and infinite logits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [{}, SAMPLED, {"repetition_penalty": 1.5}, {"do_sample": True, "rng": "torch"}], ids=str
)
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("where", [0, 199, "everywhere"])
def test_safety_12_non_finite_logits_fail_their_own_row_only(params, value, where):
    logits = random_logits(3)
    expected = choose(logits, [row(seed=1, **SAMPLED)] * 3).token_ids
    logits[1, slice(None) if where == "everywhere" else where] = value
    choice = choose(logits, [row(seed=1, **SAMPLED), row(logprobs=3, **params), row(seed=1, **SAMPLED)])
    assert isinstance(choice.errors[1], NonFiniteLogits)
    assert choice.token_ids == [expected[0], -1, expected[2]]
    assert choice.logprobs[1] is None
    assert choice.errors[0] is None and choice.errors[2] is None


AFTER_BANS = [  # the rules that come after all that ban tokens, each of which could hide that none is left
    {"temperature": 0.5}, {"top_h": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 0.5},
    {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1}, {"renormalize_logits": True}, {"watermarking_config": Watermark()},
    {"watermarking_config": SynthID(ngram_len=3, keys=(1, 2))},
]  # fmt: skip


@pytest.mark.parametrize(
    "params",
    [{}, SAMPLED, {"do_sample": True, "rng": "torch"}, *({"do_sample": True, **rule} for rule in AFTER_BANS)],
    ids=str,
)
def test_safety_12_a_row_with_nothing_left_fails_alone(params):
    logits = random_logits(3)
    logits[0] = -INF

    def mask_all(input_ids, scores):
        return torch.full_like(scores, -INF)

    choice = choose(logits, [row(**params), row(logits_processor=(mask_all,), **params), row(**params)])
    assert isinstance(choice.errors[0], NonFiniteLogits) and "all -inf" in str(choice.errors[0])
    assert isinstance(choice.errors[1], NonFiniteLogits) and "logits processors" in str(choice.errors[1])
    assert choice.errors[2] is None
    assert choice.token_ids[:2] == [-1, -1] and 0 <= choice.token_ids[2] < 200


def test_safety_12_eos_masked_in_a_vocabulary_of_nothing_else_fails_its_row():
    choice = choose(torch.zeros(2, 1), [row(eos_token_id=(0,), min_length=99), row(do_sample=True)])
    assert isinstance(choice.errors[0], NonFiniteLogits)
    assert choice.token_ids == [-1, 0]


def test_masked_vocabulary_entries_are_no_error_and_never_chosen():
    logits = random_logits(40)
    logits[:, 1:] = -INF
    choice = choose(logits, [row(seed=n, do_sample=True, logprobs=1) for n in range(40)])
    assert choice.token_ids == [0] * 40
    assert choice.logprobs == [0.0] * 40


@pytest.mark.parametrize("vocab_size", [1, 2, 262144])
def test_vocabularies_of_every_size(vocab_size):
    choice = choose(random_logits(2, vocab_size), [row([0], 1, seed=1, **SAMPLED), row([0], 1, repetition_penalty=1.1)])
    assert choice.errors == [None, None]
    assert all(0 <= token_id < vocab_size for token_id in choice.token_ids)


# Log-probabilities and outputs ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits_whatever_the_rules(dtype):
    logits = random_logits(3).to(dtype)
    rules = {"do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 1.9}
    choice = choose(logits, [row(logprobs=0), row(logprobs=5, seed=1, **rules), row(**rules)])
    exact = logits.double().log_softmax(dim=-1)
    for i in (0, 1):
        assert choice.logprobs[i] == pytest.approx(float(exact[i, choice.token_ids[i]]), abs=1e-5)
    assert choice.top_logprobs[0] == []
    top = choice.top_logprobs[1]
    assert top is not None
    assert [logprob for _, logprob in top] == pytest.approx(exact[1].topk(5).values.tolist(), abs=1e-5)
    assert [float(exact[1, id_]) for id_, _ in top] == pytest.approx([logprob for _, logprob in top], abs=1e-5)
    assert choice.logprobs[2] is None and choice.top_logprobs[2] is None


def test_scores_and_logits_are_returned_where_asked_for_and_are_copies():
    logits = random_logits(4)
    choice = choose(
        logits,
        [row(output_logits=True), row(output_scores=True), row(output_scores=True, repetition_penalty=2.0), row()],
    )
    given = logits.clone()
    logits.zero_()
    assert choice.logits[0] is not None and torch.equal(choice.logits[0], given[0])
    assert choice.scores[1] is not None and torch.equal(choice.scores[1], given[1])
    penalised = hf.RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[5, 6, 7, 8]]), given[2:3])
    assert choice.scores[2] is not None and torch.equal(choice.scores[2], penalised[0])
    assert choice.scores[2].untyped_storage().nbytes() == 200 * 4
    assert [choice.scores[0], choice.logits[1], choice.scores[3], choice.logits[3]] == [None] * 4


def test_token_logprobs_are_log_softmax_in_blocks(monkeypatch):
    monkeypatch.setattr(sampler, "LOGPROB_BLOCK", 450)
    logits = random_logits(7)
    ids = torch.tensor([0, 199, 5, 5, 77, 3, 100])
    logprobs, top = token_logprobs(logits, ids, 3)
    exact = logits.double().log_softmax(dim=-1)
    assert logprobs == pytest.approx(exact[range(7), ids].tolist(), abs=1e-5)
    assert [[id_ for id_, _ in best] for best in top] == exact.topk(3).indices.tolist()
    assert token_logprobs(logits, ids)[1] == [[]] * 7
    equal = token_logprobs(torch.zeros(1, 4), torch.tensor([2]), 9)
    assert equal == ([pytest.approx(-math.log(4))], [[(i, pytest.approx(-math.log(4))) for i in range(4)]])
