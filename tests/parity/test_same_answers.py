"""On the device that there is, a GPU or the CPU, with transformers on the same device: the same answers.

In float32 every family's greedy tokens are those of generate, and every other mode's those of the compiled CPU backend,
which other tests hold equal to generate's. In bfloat16 logits err no more than transformers' do. However a prompt is
cut into steps of few tokens, the Triton backend gives the same bits: without a GPU in its interpreter, one family.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import handloom as hl
from handloom.decoding.decoder import TokenEvent
from handloom.ops.triton_ops import FEW
from parity_checks import DEVICE, ON_GPU, Pair, assert_tokens_equal, hf_logits, load_pair, our_logits
from tiny_models import TINY, random_ids, save

OVERRIDES: dict[str, dict[str, Any]] = {"gpt2": {"n_embd": 48}}  # Triton's kernels want heads of even size
BACKENDS = ["triton", "torch"] if ON_GPU else ["cpu", "torch"]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "drawn": {"do_sample": True, "top_k": 0, "seed": 1},
    "cut": {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "seed": 2},
    "several": {"do_sample": True, "top_k": 9, "seed": 3, "num_return_sequences": 3},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "guidance": {"do_sample": False, "guidance_scale": 1.7},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "speculation": {"do_sample": True, "top_k": 12, "seed": 4, "speculation": "suffix"},
}
SEEDS, PROMPTS, LENGTH = range(8), range(4), 60


def make(family: str, seed: int, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    return save(TINY[family](seed, **OVERRIDES.get(family, {})).to(dtype), folder, tokenizer=False)


@pytest.fixture(scope="module", params=sorted(TINY))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    found = load_pair(make(request.param, 21, tmp_path_factory.mktemp(request.param)))
    found.hf.to(DEVICE)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_equal_generate_on_the_device(pair: Pair, backend: str) -> None:
    lm = pair.lm(backend=backend, device=DEVICE)
    assert (lm.graphs is not None) == (ON_GPU and backend == "triton")
    prompts = [random_ids(i, length) for i, length in enumerate((1, 9, 40, 70))]
    for prompt, output in zip(prompts, lm.generate(prompts, max_new_tokens=40, **GREEDY), strict=True):
        assert_tokens_equal(pair.hf, prompt, output.token_ids, max_new_tokens=40, eos_token_id=None)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_the_tokens_of_the_compiled_cpu_backend(pair: Pair, backend: str, mode: str) -> None:
    prompts = [random_ids(i, length) for i, length in enumerate((3, 30))]
    prompts[1][10:20] = prompts[1][:10]  # something to copy
    tokens = []
    for lm in (pair.lm(backend=backend, device=DEVICE), pair.lm(backend="cpu")):
        outputs = lm.generate(prompts, max_new_tokens=16, eos_token_id=None, **MODES[mode])
        tokens.append([output.token_ids for output in outputs])
    assert tokens[0] == tokens[1]


# bfloat16 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(TINY))
def halves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Models whose weights bfloat16 holds exactly."""
    folders = tmp_path_factory.mktemp(request.param)
    pairs = []
    for seed in SEEDS:
        made = make(request.param, seed, folders / str(seed), torch.bfloat16)
        pairs.append(load_pair(made, dtype=torch.bfloat16))
        pairs[-1].hf.to(DEVICE)
    return pairs


@cache
def exact_logits(folder: Path) -> list[Tensor]:
    model = load_pair(folder, dtype=torch.float64).hf
    return [hf_logits(model, random_ids(prompt, LENGTH)) for prompt in PROMPTS]


def errors(pairs: list[Pair], backend: str | None) -> Tensor:
    """|logits - those in float64| of all prompts and positions, [n, vocab_size]; of transformers without a backend."""

    def each() -> Iterator[Tensor]:
        for pair in pairs:
            for prompt, exact in zip(PROMPTS, exact_logits(pair.folder), strict=True):
                ids = random_ids(prompt, LENGTH)
                lm = None if backend is None else pair.lm(backend=backend, device=DEVICE, dtype="bfloat16")
                found = hf_logits(pair.hf, ids) if lm is None else our_logits(lm, ids)
                yield (found.double() - exact).abs()

    return torch.cat(list(each()))


def test_bfloat16_errs_no_more_than_transformers(halves: list[Pair]) -> None:
    """Mean and worst error against float64, beside those of transformers in bfloat16 against the same."""
    ours, theirs = errors(halves, BACKENDS[0]), errors(halves, None)
    assert ours.mean() <= theirs.mean(), f"{ours.mean():.3g}, theirs {theirs.mean():.3g}"
    assert ours.max() <= theirs.max(), f"{ours.max():.3g}, theirs {theirs.max():.3g}"


def test_pytorchs_operators_err_in_bfloat16_as_transformers(halves: list[Pair]) -> None:
    """They round where transformers does: the mean error, and that of the worst token of a position, are within a
    fiftieth. Which single logit of half a million is worst is chance."""
    ours, theirs = errors(halves, "torch"), errors(halves, None)
    assert ours.mean() <= 1.02 * theirs.mean()
    assert ours.amax(-1).mean() <= 1.02 * theirs.amax(-1).mean()


# The same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(TINY) if ON_GPU else ["llama"])
def test_chunks_of_few_tokens_change_no_bit_of_the_triton_backend(family: str, tmp_path: Path) -> None:
    overrides = OVERRIDES.get(family, {}) if ON_GPU else {"num_hidden_layers": 1, "hidden_size": 24}
    folder = save(TINY[family](5, **overrides), tmp_path, tokenizer=False)
    lm = hl.LM.from_pretrained(folder, backend="triton", device=DEVICE, dtype="float32", kv_cache_tokens=512)
    lengths, new_tokens, cuts = ((18, 3), 20, (FEW, 5, 1)) if ON_GPU else ((9, 2), 2, (FEW, 4))
    found = []
    for most in cuts:
        lm.pool.forget_cached()
        engine = hl.Engine(lm, max_step_tokens=most, prefix_cache=False)
        for seed, length in enumerate(lengths):
            engine.add_request(random_ids(seed, length), max_new_tokens=new_tokens, logprobs=0, **GREEDY)
        events = [event for event in engine.run() if isinstance(event, TokenEvent)]
        found.append(sorted((event.request_id, event.token_id, event.logprob) for event in events))
    assert len(found[0]) == 2 * new_tokens and all(other == found[0] for other in found)
