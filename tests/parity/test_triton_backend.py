"""The Triton kernels make a whole model: logits and tokens of every family equal transformers'.

Without a GPU Triton's interpreter runs them, a launch in milliseconds: few tokens and layers here. What else runs on a
GPU where there is one is in test_same_answers.py and test_captured_steps.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import handloom as hl
from handloom.cache.batch import Work
from handloom.errors import UnsupportedOption
from handloom.ops import choose_backend
from parity_checks import Pair, assert_logits_equal, assert_tokens_equal, hf_logits, load_pair, our_logits, run
from tiny_models import TINY, random_ids, save

SMALL = {
    "llama": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2, "n_embd": 48},  # heads of 12: the kernels want an even number
    "gemma3_text": {"num_hidden_layers": 2, "sliding_window_pattern": 2},
}


@pytest.fixture(scope="module", params=sorted(TINY))
def triton_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = TINY[request.param](11, **SMALL[request.param])
    return load_pair(save(model, tmp_path_factory.mktemp(request.param), tokenizer=False))


def test_logits_in_one_go_in_chunks_and_token_by_token(triton_pair: Pair) -> None:
    """18 tokens at once take the kernels for many rows, fewer the fused ones; windows of 7 lie within them."""
    lm, ids = triton_pair.lm(backend="triton"), random_ids(3, 18)
    theirs = hf_logits(triton_pair.hf, ids)
    assert_logits_equal(our_logits(lm, ids), theirs, "in one go")
    assert_logits_equal(our_logits(lm, ids, [9, 1, 8]), theirs, "in chunks")


def test_a_ragged_batch(triton_pair: Pair) -> None:
    lm = triton_pair.lm(backend="triton")
    prompts = [random_ids(i, length) for i, length in enumerate((1, 18, 5))]
    sequences = [lm.sequence(ids) for ids in prompts]
    prefill = run(lm, [Work(s, len(s), "all") for s in sequences]).split([len(ids) for ids in prompts])
    for sequence in sequences:
        sequence.append(7)
    decode = run(lm, [Work(s, 1, "last") for s in sequences])
    for ids, first, last in zip(prompts, prefill, decode, strict=True):
        assert_logits_equal(torch.cat((first, last[None])), hf_logits(triton_pair.hf, [*ids, 7]), "ragged")


def test_a_row_has_the_same_bits_in_any_company_while_a_step_has_few_rows(triton_pair: Pair) -> None:
    lm, ids = triton_pair.lm(backend="triton"), random_ids(4, 9)
    rows = []
    for others in ((), (10, 3)):
        sequence = lm.sequence(ids[:8])
        run(lm, [Work(sequence, 8, "none")])
        sequence.append(ids[8])
        company = [lm.sequence(random_ids(i, length)) for i, length in enumerate(others)]
        rows.append(run(lm, [*(Work(s, len(s), "last") for s in company), Work(sequence, 1, "last")])[-1])
    assert torch.equal(*rows)


def test_greedy_tokens_equal_generate(triton_pair: Pair) -> None:
    prompt = random_ids(5, 6)
    ours = triton_pair.lm(backend="triton").generate(prompt, max_new_tokens=6).token_ids
    assert_tokens_equal(triton_pair.hf, prompt, ours, max_new_tokens=6)


def test_an_untied_model_with_biases_and_scaled_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 900.0, "factor": 4.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = TINY["llama"](4, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_parameters=rope)
    pair = load_pair(save(model, tmp_path, tokenizer=False))
    ids = random_ids(8, 12)
    assert_logits_equal(our_logits(pair.lm(backend="triton"), ids), hf_logits(pair.hf, ids), "variant")


def test_heads_that_the_kernels_do_not_take_are_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    folder = save(TINY["gpt2"](1, n_embd=44), tmp_path, tokenizer=False)
    with pytest.raises(UnsupportedOption, match="heads of 11 dimensions; 'triton' takes even numbers up to 256"):
        hl.LM.from_pretrained(folder, backend="triton")


def test_the_backend_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handloom.ops.INTERPRETED", False)
    with pytest.raises(UnsupportedOption, match="needs a GPU and the model is on cpu; choose 'torch'"):
        choose_backend(torch.device("cpu"), "triton")
    assert choose_backend(torch.device("cpu")).name == "cpu"
    with pytest.raises(UnsupportedOption, match="on cuda:1; start it with CUDA_VISIBLE_DEVICES=1"):
        choose_backend(torch.device("cuda", 1), "triton")
