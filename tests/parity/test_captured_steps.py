"""Decode steps on the Triton backend that run ahead of the host: captured or launched one by one, alone or in company,
the bits are the same, and greedy tokens are those of transformers.

On a GPU they are CUDA graphs. Without one the kernels run in Triton's interpreter, on a queue that is late: few tokens,
one family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from handloom.decoding.decoder import TokenEvent
from handloom.engine import Engine
from handloom.engine.decode_step import DecodeRow, DecodeStep
from handloom.engine.graphs import DecodeGraphs
from handloom.engine.stream import CudaStream, EagerStream, Stream
from handloom.lm import LM
from handloom.ops.triton_ops import FEW
from late_stream import LateStream
from parity_checks import assert_tokens_equal
from tiny_models import TINY, random_ids, save

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
NEW_TOKENS = 40 if ON_GPU else 3
COMPANY = 11 if ON_GPU else 3
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2, "n_embd": 48},
    "gemma3_text": {"num_hidden_layers": 2, "sliding_window_pattern": 2},
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "drawn": {"do_sample": True, "top_k": 0, "temperature": 0.9, "seed": 3},
    "cut": {"do_sample": True, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 4},
}


@pytest.fixture(scope="module", params=sorted(TINY) if ON_GPU else ["llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TINY[request.param](12, **SMALL[request.param]), tmp_path_factory.mktemp(request.param))


def load(folder: Path, stream: Stream) -> LM:
    lm = LM.from_pretrained(folder, device=DEVICE, dtype="float32", backend="triton", kv_cache_tokens=2048)
    lm.graphs = DecodeGraphs(lm.transformer, lm.pool, stream)
    return lm


def captured() -> Stream:
    return CudaStream(DEVICE) if ON_GPU else LateStream()


def generated(lm: LM, requests: dict[int, dict[str, Any]]) -> dict[int, list[tuple[int, float | None]]]:
    """Tokens and log-probabilities of the prompts of these seeds."""
    engine, found = Engine(lm, max_step_tokens=FEW), {}
    for seed, options in requests.items():
        request = engine.add_request(
            random_ids(seed, 5 + seed), **options, max_new_tokens=NEW_TOKENS, eos_token_id=[], logprobs=0
        )
        found[request] = (seed, [])
    for event in engine.run():
        if isinstance(event, TokenEvent):
            found[event.request_id][1].append((event.token_id, event.logprob))
    assert engine.stats().num_captured_steps >= NEW_TOKENS // 3 and not engine.stats().other_decode_steps
    return dict(found.values())


@pytest.mark.parametrize("ways", [*([way] for way in WAYS if ON_GPU), [*WAYS]], ids="+".join)
def test_the_bits_of_captured_steps(folder: Path, ways: list[str]) -> None:
    """Captured or not, and in company, whatever way that chooses: in steps of few tokens, where bits keep to a row."""
    requests = {seed: WAYS[ways[seed % len(ways)]] for seed in range(COMPANY)}
    steps = generated(load(folder, EagerStream()), requests)
    graphs = generated(load(folder, captured()), requests)
    assert steps == graphs
    assert generated(load(folder, captured()), {1: requests[1]})[1] == graphs[1]


def test_greedy_tokens_equal_generate(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    lm = load(folder, captured())
    found = generated(lm, dict.fromkeys(range(COMPANY), WAYS["greedy"]))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for seed, tokens in found.items():
        ours = [token for token, _ in tokens]
        assert_tokens_equal(theirs, random_ids(seed, 5 + seed), ours, max_new_tokens=NEW_TOKENS, eos_token_id=None)


@pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing to wait for")
def test_queueing_a_step_never_waits_for_the_device(folder: Path) -> None:
    lm = load(folder, captured())
    assert lm.graphs is not None
    step = DecodeStep(lm.transformer, lm.pool, 2, 4)
    stream = lm.graphs.stream
    row = DecodeRow(7, 0, [3, 1], 1, seed=2**63, counter=1, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)
    for values, into in step.beginning([row]):
        stream.upload(values, into)
    for drawn, cut in ((False, False), (True, False), (True, True)):
        step.run(drawn=drawn, cut=cut)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.run(drawn=drawn, cut=cut)
            stream.upload(torch.tensor([3, -1]), step.pages)
            wait = stream.fetch(step.out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert wait()[0, 0] >= 0
