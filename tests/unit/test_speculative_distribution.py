"""Sampled with drafts, right and wrong ones, tokens follow the exact distribution of the processed probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chi_square import p_value
from drafting import Oracle, draft_freely
from engines import lm_with
from handloom.cache.batch import Work, build_batch
from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.lm import LM
from handloom.output import Output
from handloom.sampling.processors import temperature, top_k, top_p
from handloom.sampling.repetition import repetition_penalty
from tiny_models import random_ids

PROMPT = random_ids(3, 6) * 2
SEEDS = 3000
KEEP = 4
OPTIONS: dict[str, Any] = {
    "do_sample": True, "temperature": 0.3, "top_k": KEEP, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 4,
    "eos_token_id": None,
}  # fmt: skip


def exact(lm: LM) -> dict[tuple[int, ...], float]:
    """The probability of every possible beginning of three tokens."""

    def following(ids: list[int]) -> dict[int, float]:
        pool = PagePool(lm.spec, 1, len(ids), dtype=lm.dtype, device=lm.device)
        scores = lm.transformer.forward(build_batch([Work(Sequence(pool, ids), len(ids), "last")], pool), pool.layers)
        scores = scores.float().clone()
        repetition_penalty(scores, [1.2], [ids])
        temperature(scores, [0.3])
        top_k(scores, [KEEP])
        top_p(scores, [0.95])
        probabilities = scores[0].double().softmax(0)
        return {at: float(probabilities[at]) for at in probabilities.nonzero().flatten().tolist()}

    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        joint = {
            (*before, token): mass * probability
            for before, mass in joint.items()
            for token, probability in following([*PROMPT, *before]).items()
        }
    return joint


def assistant(lm: LM) -> LM:
    """The model with another head, so that its distribution is another one."""
    pool = PagePool(lm.spec, 2000, 4, dtype=lm.dtype, device=lm.device)
    other = LM(lm.transformer, lm.tokenizer, pool, name="assistant")
    noise = torch.randn(lm.spec.vocab_size, generator=torch.Generator().manual_seed(2)) * 0.3
    run = other.runner().run

    class Noisy:
        def run(self, works: Any) -> tuple[torch.Tensor, dict[int, Any]]:
            logits, errors = run(works)
            return logits + noise, errors

    other.runner = lambda: Noisy()  # type: ignore[method-assign, assignment, return-value]
    return other


DRAFTERS: dict[str, dict[str, Any]] = {
    "a model": {},
    "a text": {"speculation": "suffix"},
    "a lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_three_tokens_follow_their_joint_distribution(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_freely(monkeypatch)
    lm = lm_with(12_000)
    joint = exact(lm)
    likely = max(joint, key=joint.__getitem__)
    for name in ("SuffixAutomaton", "PromptLookup"):
        monkeypatch.setattr(f"handloom.decoding.speculative.{name}", lambda *_: Oracle(PROMPT, likely, wrong=0.3))
    drafts = DRAFTERS[drafter] or {"assistant_model": assistant(lm)}
    each = [{"seed": seed} for seed in range(SEEDS)]
    outputs = lm.generate([PROMPT] * SEEDS, params=each, progress=False, **OPTIONS, **drafts)
    assert p_value_of(outputs, joint) > 1e-6
    accepted, drafted = (sum(getattr(o.drafts, name) for o in outputs) for name in ("accepted", "drafted"))
    assert 0 < accepted < drafted
    assert len(joint) > 2 * KEEP


def p_value_of(outputs: list[Output], joint: dict[tuple[int, ...], float]) -> float:
    places = {tokens: at for at, tokens in enumerate(joint)}
    counts = torch.bincount(
        torch.tensor([places[tuple(output.token_ids[:3])] for output in outputs]), minlength=len(joint)
    )
    return p_value(counts, torch.tensor(list(joint.values()), dtype=torch.float64))


def test_several_outputs_of_one_prompt_follow_it_too() -> None:
    lm = lm_with(12_000)
    each = [{"seed": seed} for seed in range(SEEDS // 50)]
    outputs = lm.generate([PROMPT] * len(each), params=each, progress=False, num_return_sequences=50, **OPTIONS)
    assert len(outputs) == SEEDS
    assert p_value_of(outputs, exact(lm)) > 1e-6


def test_the_test_sees_a_distribution_that_is_a_little_off() -> None:
    lm = lm_with(12_000)
    each = [{"seed": seed} for seed in range(SEEDS)]
    outputs = lm.generate([PROMPT] * SEEDS, params=each, progress=False, **{**OPTIONS, "temperature": 0.4})
    joint = exact(lm)
    places = {tokens: at for at, tokens in enumerate(joint)}
    found = [places[tokens] for output in outputs if (tokens := tuple(output.token_ids[:3])) in places]
    counts = torch.bincount(torch.tensor(found), minlength=len(joint))
    assert p_value(counts, torch.tensor(list(joint.values()), dtype=torch.float64)) < 1e-6
