"""Where torch makes tensors elsewhere, or of another dtype, by default, all goes on as ever: ours name theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

from engines import all_free, lm_with
from gguf_files import export
from handloom.lm import LM
from tiny_models import random_ids, save, tiny_llama

PROMPT = random_ids(6, 10)
PROMPT[5:7] = PROMPT[2:4]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"do_sample": True, "seed": 1, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "drawn as torch does": {"do_sample": True, "rng": "torch", "typical_p": 0.9, "top_h": 0.9},
    "cut": {"do_sample": True, "seed": 1, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "renormalize_logits": True},
    "repetition": {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "encoder_repetition_penalty": 1.2,
        "encoder_no_repeat_ngram_size": 3,
    },
    "named tokens": {
        "sequence_bias": {(5,): 2.0, (6, 7): 1.0},
        "bad_words_ids": [[8], [9, 10]],
        "suppress_tokens": [11],
        "begin_suppress_tokens": [12],
        "forced_eos_token_id": 17,
        "min_new_tokens": 3,
    },
    "allowed": {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(40, 90))},
    "decay": {"exponential_decay_length_penalty": (1, 1.1), "remove_invalid_values": True, "eos_token_id": 17},
    "watermark": {"watermarking_config": WatermarkingConfig()},
    "selfhash": {"watermarking_config": WatermarkingConfig(seeding_scheme="selfhash")},
    "SynthID": {
        "do_sample": True,
        "seed": 3,
        "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3]),
    },
    "guided": {"guidance_scale": 1.5},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "internals": {"output_scores": True, "output_logits": True, "output_hidden_states": True},
    "cache": {"output_past_key_values": True},
    "several": {"num_return_sequences": 3, "do_sample": True, "seed": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "drawn beams": {"num_beams": 3, "do_sample": True, "seed": 2, "top_k": 30},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beams": {"num_beams": 3, "force_words_ids": [[30, 31]]},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "grammar": {"regex": "[a-c]{4}"},
    "grammar of beams": {"choices": ["yes", "no"], "num_beams": 2},
    "stop": {"stop": ["e"]},
    "healing": {"token_healing": True},
}


@pytest.fixture(params=["llama", "gemma3_text"])
def lm(request: pytest.FixtureRequest) -> Iterator[LM]:
    made = lm_with(family=request.param)
    yield made
    assert all_free(made)


def tokens(lm: LM, options: dict[str, Any]) -> Any:
    if options.get("rng") == "torch":
        torch.manual_seed(3)
    found = lm.generate([PROMPT, PROMPT[:4]], max_new_tokens=6, **options)
    return [(output.token_ids, output.text, output.logprobs, output.finish_reason) for output in found]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_way_of_choosing_goes_on_under_another_default_device(lm: LM, name: str) -> None:
    expected = tokens(lm, OPTIONS[name])
    with torch.device("meta"):
        assert torch.empty(1).is_meta
        assert tokens(lm, OPTIONS[name]) == expected


def test_a_draft_model_goes_on_too(lm: LM) -> None:
    expected = tokens(lm, {"assistant_model": lm_with(family="llama")})
    with torch.device("meta"):
        assert tokens(lm, {"assistant_model": lm_with(family="llama")}) == expected


def _capture(lm: LM) -> Any:
    with lm.capture("blocks.0.hook_resid_post") as acts:
        lm.generate(PROMPT, max_new_tokens=3)
    return acts["blocks.0.hook_resid_post"].tolist()


def _surgery(lm: LM, folder: Path) -> Any:
    with lm.sequence(PROMPT) as sequence, sequence.fork() as branch:
        seen = [sequence.logits.tolist(), lm.step([sequence, branch]).tolist()]
        branch.append(7)
        branch.rewind(3)
        seen.append(branch.logits.tolist())
        sequence.save(str(folder / "kept.safetensors"))
        with lm.restore(str(folder / "kept.safetensors")) as restored:
            return [*seen, restored.logits.tolist(), lm.logit_lens(branch).tolist()]


def _streamed(lm: LM) -> list[Any]:
    async def collect() -> list[Any]:
        return [piece.token_id async for piece in lm.astream(PROMPT, max_new_tokens=4)]

    return [asyncio.run(collect()), [piece.token_id for piece in lm.stream(PROMPT, max_new_tokens=4)]]


CALLS: dict[str, Callable[[LM, Path], Any]] = {
    "score": lambda lm, folder: lm.score([PROMPT, PROMPT[:3]], top_logprobs=2),
    "sequence": _surgery,
    "capture": lambda lm, folder: _capture(lm),
    "streams": lambda lm, folder: _streamed(lm),
    "transformers": lambda lm, folder: lm.generate(PROMPT, max_new_tokens=3).to_transformers().sequences.tolist(),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_rest_of_what_a_model_does_goes_on_too(lm: LM, name: str, tmp_path: Path) -> None:
    expected = CALLS[name](lm, tmp_path)
    with torch.device("meta"):
        assert CALLS[name](lm, tmp_path) == expected


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_models_are_loaded_and_saved_under_another_default_device(
    tmp_path: Path, backend: str, quantize: str | None
) -> None:
    folder = save(tiny_llama(), tmp_path)
    settings: dict[str, Any] = {"backend": backend, "quantize": quantize, "device": "cpu"}
    expected = LM.from_pretrained(folder, **settings).generate(PROMPT, max_new_tokens=5).token_ids
    with torch.device("meta"):
        assert LM.from_pretrained(folder, **settings).generate(PROMPT, max_new_tokens=5).token_ids == expected


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.empty(1).dtype == dtype
        yield
    finally:
        torch.set_default_dtype(before)


DTYPES = [torch.float16, torch.float64]
FINE: dict[str, dict[str, Any]] = {"fine biases": {"sequence_bias": {(i,): 1.001 * i for i in range(100)}}}


@pytest.mark.parametrize("name", [*OPTIONS, *FINE])
def test_every_way_of_choosing_goes_on_under_another_default_dtype(lm: LM, name: str) -> None:
    options = {**OPTIONS, **FINE}[name]
    expected = tokens(lm, {**options, "logprobs": 0} if "num_beams" not in options else options)
    for dtype in DTYPES:
        with default_dtype(dtype):
            assert tokens(lm, {**options, "logprobs": 0} if "num_beams" not in options else options) == expected


@pytest.mark.parametrize("name", CALLS)
def test_the_rest_goes_on_under_another_default_dtype(lm: LM, name: str, tmp_path: Path) -> None:
    expected = CALLS[name](lm, tmp_path)
    for dtype in DTYPES:
        with default_dtype(dtype):
            assert CALLS[name](lm, tmp_path) == expected


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("file", ["safetensors", "gguf"])
def test_models_are_loaded_under_another_default_dtype(tmp_path: Path, file: str, quantize: str | None) -> None:
    model = tiny_llama(hidden_size=96, head_dim=16, intermediate_size=64)
    source = export(model, tmp_path / "m.gguf") if file == "gguf" else save(model, tmp_path)
    how: dict[str, Any] = {"quantize": quantize, "device": "cpu"}
    expected = LM.from_pretrained(source, **how).sequence(PROMPT).logits
    for dtype in DTYPES:
        with default_dtype(dtype):
            assert torch.equal(LM.from_pretrained(source, **how).sequence(PROMPT).logits, expected)
