"""On a device whose tensors do not mix with those in host memory everything computes what it computes on the CPU:
loading, every option of a request, sequences of the caller's, hooks, decode steps in flight."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import handloom as hl
from far_device import Far, FarDevice, near
from features import BESIDE, FEATURES, PROMPT, merged, prompt_of
from flights import flying
from tiny_models import random_ids, save, tiny_llama

GIB = 1 << 30
MORE: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 9, "rng": "torch"},
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "forced words": {"num_beams": 3, "force_words_ids": [[70, 71]]},
    "several": {"do_sample": True, "top_k": 9, "seed": 3, "num_return_sequences": 3},
    "torch's draws": {"do_sample": True, "top_k": 9, "rng": "torch"},
}


class OneAfterAnother:
    """An executor that runs all in the caller's thread: the device is that of a thread."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> OneAfterAnother:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@pytest.fixture(scope="module")
def lms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[hl.LM, hl.LM]]:
    """The same checkpoint in host memory, and on the device."""
    model = tiny_llama(num_hidden_layers=2, hidden_size=24, intermediate_size=32)
    folder = save(model, tmp_path_factory.mktemp("model"))
    how: dict[str, Any] = {"backend": "reference", "kv_cache_tokens": 2048}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        patch.setattr("handloom.model.loading.ThreadPoolExecutor", OneAfterAnother)
        here = hl.LM.from_pretrained(folder, device="cpu", **how)
        with FarDevice():
            there = hl.LM.from_pretrained(folder, device="cuda", **how)
        assert there.device.type == "cuda" and all(isinstance(w, Far) for w in there.transformer.weights.values())
        yield here, there


def both(lms: tuple[hl.LM, hl.LM], compute: Any) -> tuple[Any, Any]:
    """What is computed with the one in host memory, and with the other."""
    torch.manual_seed(0)
    expected = compute(lms[0])
    torch.manual_seed(0)
    with FarDevice():
        return expected, compute(lms[1])


def outputs(lm: hl.LM, prompts: list[list[int]], options: dict[str, Any]) -> list[Any]:
    """Tokens and log-probabilities."""
    made = lm.generate(prompts, **options)
    flat = [each for own in made for each in (own if isinstance(own, list) else [own])]
    return [(each.token_ids, each.logprobs, each.finish_reason) for each in flat]


@pytest.mark.parametrize("name", [*FEATURES, *MORE])
def test_an_option_gives_the_same_tokens(lms: tuple[hl.LM, hl.LM], name: str) -> None:
    shared, own = merged(frozenset({name} & FEATURES.keys()))
    options = {**shared, **own, **MORE.get(name, {}), "max_new_tokens": 4}
    if options.get("do_sample") and options.get("rng") != "torch":
        options["seed"] = 3
    prompts = [prompt_of(own)] if name == "streamer" else [prompt_of(own), BESIDE]
    expected, found = both(lms, lambda lm: outputs(lm, prompts, options))
    assert found == expected


def test_scores_and_what_hooks_see_and_change(lms: tuple[hl.LM, hl.LM]) -> None:
    def compute(lm: hl.LM) -> Any:
        scores = [(each.logprobs, each.top_logprobs) for each in lm.score([PROMPT, BESIDE], top_logprobs=2)]
        seen, points = [], ["blocks.1.hook_resid_post", "blocks.0.attn.hook_q"]
        for positions in ("all", "last"):
            with lm.capture(points, positions=positions) as acts:
                lm.generate(PROMPT, max_new_tokens=2)
            seen += [acts[point] for point in points]
        with lm.patch("blocks.0.hook_mlp_out", lambda value, at: value * 0.5):
            patched = lm.generate(PROMPT, max_new_tokens=3).token_ids
        return scores, [near(each).cpu() for each in seen], patched

    expected, found = both(lms, compute)
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert len(found[1]) == len(expected[1]) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1], expected[1], strict=True))


def test_a_sequence_of_the_callers(lms: tuple[hl.LM, hl.LM], tmp_path: Path) -> None:
    def compute(lm: hl.LM) -> list[Tensor]:
        found = []
        with lm.sequence(random_ids(1, 21)) as sequence:
            found.append(sequence.logits)
            branch = sequence.fork()
            branch.append(7)
            sequence.rewind(3)
            found += [branch.logits, sequence.logits, lm.step([sequence, branch]), lm.logit_lens(sequence)]
            k, v = sequence.kv(0, 1, 6)
            found += [k, v]
            sequence.set_kv(0, 1, k=k * 2, v=v.cpu() * 2)
            sequence.append([5, 6])
            found.append(sequence.logits)
            sequence.evict(2, 5)
            sequence.append(9)
            found.append(sequence.logits)
            sequence.spill()
            sequence.append(11)
            found.append(sequence.logits)
            branch.remove(2, 4)
            found.append(branch.logits)
            branch.save(tmp_path / "branch.safetensors")
            with lm.restore(tmp_path / "branch.safetensors") as restored:
                restored.append(3)
                found.append(restored.logits)
            branch.free()
        with lm.sequence(torch.linspace(-1, 1, 3 * lm.spec.hidden_size).view(3, -1)) as sequence:
            sequence.append_embeddings(torch.ones(2, lm.spec.hidden_size))
            sequence.append(5)
            found.append(sequence.logits)
        return [near(each).cpu() for each in found]

    expected, found = both(lms, compute)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_steps_in_flight(lms: tuple[hl.LM, hl.LM]) -> None:
    def compute(lm: hl.LM) -> Any:
        lm = flying(lm)
        asked = [
            {"do_sample": False},
            {"top_k": 9, "top_p": 0.9, "seed": 1},
            {"top_k": 0, "seed": 2, "temperature": 2.0},
        ]
        engine = hl.Engine(lm)
        for seed, options in enumerate(asked):
            options = {"do_sample": True, "logprobs": 0, "max_new_tokens": 9, "eos_token_id": [], **options}
            engine.add_request(random_ids(seed, 5 + seed), **options)
        events = [(e.request_id, e.token_id, e.logprob) for e in engine.run() if hasattr(e, "token_id")]
        assert engine.stats().num_captured_steps >= 8
        return events

    expected, found = both(lms, compute)
    assert found == expected and len(found) == 27


# The device itself -----------------------------------------------------------------------------


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with FarDevice() as device:
        far, host = torch.arange(6.0, device="cuda"), torch.arange(6.0)
        assert isinstance(far, Far) and far.device == torch.device("cuda", 0) and not isinstance(host, Far)
        for mixed in (
            lambda: far + host,
            lambda: torch.cat((far, host)),
            lambda: torch.where(far > 2, far, host),
            lambda: host[far.long()],
            lambda: far.index_copy_(0, host.long(), far),
        ):
            with pytest.raises(RuntimeError):
                mixed()
        with pytest.raises(TypeError):
            far.numpy()
        assert device.waits == 0
        assert isinstance(far + 1, Far) and isinstance(far * torch.tensor(2.0), Far)
        far.copy_(host * 2)
        far[1:3] = host[:2]
        far += 1
        assert device.waits == 0 and not isinstance(far.cpu(), Far) and not isinstance(far.to("cpu"), Far)
        assert far.tolist() == [1.0, 1.0, 2.0, 7.0, 9.0, 11.0] and bool((far > 0).all()) and device.waits == 2
        assert len(far[far > 2]) == 3 and device.waits == 3, "how many there are is asked of the device"
    assert futures.ThreadPoolExecutor is not OneAfterAnother
