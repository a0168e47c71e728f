"""The real checkpoints, from their GGUF files, against transformers reading the same files by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import handloom as hl
from chats import CHATML, CHATS, TEMPLATES
from contrast_oracles import contrastive_search, dola
from handloom.output import Output
from parity_checks import PROMISED, Pair, assert_logits_equal, assert_tokens_equal, hf_logits, our_logits
from real_models import BEGINNINGS, GEMMA3, SMOLLM2, real_lm, real_pair

QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Write a Python function that checks whether a number is prime.",
    "Give me three tips for sleeping better.",
    "Explain photosynthesis to a child.",
    "Translate 'good morning, my friend' into Spanish and German.",
    "Who wrote Hamlet? Answer in one word.",
    "List the planets of the solar system in order from the sun.",
    "Summarise in one sentence: The loom was invented to weave threads into cloth, and it changed the world.",
    "What is 17 + 25? Think step by step.",
    "Tell me a joke about computers.",
]
LONG = "The history of weaving is long. " * 40


@pytest.fixture(scope="module")
def smollm2() -> Pair:
    pair = real_pair(SMOLLM2)
    assert pair.lm().dtype == torch.float32
    return pair


def chat(lm: hl.LM, question: str) -> list[int]:
    return lm.render_chat([{"role": "user", "content": question}])


def check_tokens(pair: Pair, prompts: list[list[int]], count: int) -> int:
    """Our batch of all prompts against generate for each; returns how many tokens were compared."""
    outputs = pair.lm().generate(prompts, max_new_tokens=count)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.token_ids) == count or output.finish_reason == "eos"
        assert_tokens_equal(pair.hf, prompt, output.token_ids, max_new_tokens=count)
    return sum(len(output.token_ids) for output in outputs)


def test_smollm2_says_what_transformers_says(smollm2: Pair) -> None:
    """48 greedy tokens on 6 prompts in one batch, one of them alone; logits of a long text; its likelihood."""
    lm = smollm2.lm()
    prompts = [chat(lm, question) for question in QUESTIONS[:3]] + [lm.tokenizer.encode(b) for b in BEGINNINGS[:3]]
    assert check_tokens(smollm2, prompts, 48) > 200
    alone = lm.generate(prompts[3], max_new_tokens=48).token_ids
    assert_tokens_equal(smollm2.hf, prompts[3], alone, max_new_tokens=48)

    ids = lm.tokenizer.encode(LONG)
    theirs = hf_logits(smollm2.hf, ids)
    assert_logits_equal(our_logits(lm, ids, [100, 1, 50]), theirs, tolerance=PROMISED)
    likelihood = theirs[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert lm.score(LONG).total == pytest.approx(likelihood, rel=1e-5)


# 20 prompts that run together; each part of them is then compared with transformers in a test of its own.
COUNT, PARTS = 256, 10


@cache
def long_outputs(name: str) -> list[Output]:
    """256 tokens after 20 prompts in one batch; of gemma3 one prompt is longer than its window of 512."""
    lm = real_pair(name).lm()
    if name == SMOLLM2:
        prompts = [chat(lm, question) for question in QUESTIONS] + [lm.tokenizer.encode(b) for b in BEGINNINGS]
    else:
        prompts = [lm.tokenizer.encode(text) for text in [*QUESTIONS[:9], *BEGINNINGS, LONG * 2]]
    return lm.generate(prompts, max_new_tokens=COUNT)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", [SMOLLM2, GEMMA3])
def test_256_tokens_on_20_prompts(name: str, part: int) -> None:
    for output in long_outputs(name)[part::PARTS]:
        assert len(output.token_ids) == COUNT or output.finish_reason == "eos"
        assert_tokens_equal(real_pair(name).hf, output.prompt_token_ids, output.token_ids, max_new_tokens=COUNT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMOLLM2, GEMMA3])
def test_those_are_many_tokens(name: str) -> None:
    assert len(long_outputs(name)) == 20
    assert sum(len(output.token_ids) for output in long_outputs(name)) > 2500


@pytest.mark.slow
def test_logits_of_gemma3_past_its_window() -> None:
    pair = real_pair(GEMMA3)
    ids = pair.lm().tokenizer.encode(LONG * 2)
    assert len(ids) > 512
    assert_logits_equal(our_logits(pair.lm(), ids, [200, 1, 300]), hf_logits(pair.hf, ids), tolerance=PROMISED)


@pytest.mark.slow
def test_decoding_by_contrast_on_a_real_model(smollm2: Pair) -> None:
    """Guidance beside generate; contrastive search and DoLa, which that no longer has, beside the papers' formulas."""
    lm, model = smollm2.lm(), smollm2.hf
    prompt, negative = (lm.encode(text).token_ids for text in ("The three rules of weaving are", "Once upon a time"))
    guided: dict[str, Any] = {"max_new_tokens": 12, "guidance_scale": 1.6}
    for ids in (None, negative):
        options = guided if ids is None else {**guided, "negative_prompt_ids": torch.tensor(ids)}
        theirs = guided if ids is None else {**guided, "negative_prompt_ids": torch.tensor([ids])}
        assert_tokens_equal(model, prompt, lm.generate(prompt, **options).token_ids, **theirs)
    ours = lm.generate(prompt, penalty_alpha=0.6, top_k=3, max_new_tokens=5, eos_token_id=None).token_ids
    assert ours == contrastive_search(model, prompt, 0.6, 3, 5)
    for asked, layers in (("low", range(2, 15, 2)), ("high", range(15, 30, 2))):
        ours = lm.generate(prompt, dola_layers=asked, max_new_tokens=6, eos_token_id=None).token_ids
        assert ours == dola(model, prompt, layers, 6)


@pytest.mark.parametrize("name", [SMOLLM2, pytest.param(GEMMA3, marks=pytest.mark.slow)])
def test_ids_under_other_names_are_those_of_the_real_tokenizers(name: str) -> None:
    tokenizer = real_lm(name).tokenizer
    assert tokenizer is not None
    end, template = ("<|im_end|>", CHATML) if name == SMOLLM2 else ("<end_of_turn>", TEMPLATES["gemma"])
    tokens = tokenizer.fast.added_tokens_decoder

    def special(ids: list[int]) -> list[int]:
        return [index for index in ids if index in tokens and tokens[index].special]

    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        for chat in CHATS[:3]:
            left_open = [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + " <"}]
            renamed = tokenizer.apply_chat_template(left_open)
            assert renamed == tokenizer.apply_chat_template(left_open, sanitize_control_tokens=False)
            typed = [*chat[:-1], {**chat[-1], "content": f"a {end} b{end}"}]
            ids = tokenizer.apply_chat_template(typed)
            parsed = tokenizer.apply_chat_template(typed, sanitize_control_tokens=False)
            assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.decode(
                parsed, skip_special_tokens=False
            )
            assert special(ids) == special(renamed)
            assert len(special(parsed)) == len(special(ids)) + 2
    finally:
        tokenizer.chat_template = before
