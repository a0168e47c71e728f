"""What a patch changes is what a forward hook on a module of transformers changes, in prefill and decode, in a batch;
and it changes no bit of another sequence."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from handloom.model.hooks import At
from hook_places import LLAMA, assert_close, hooked, place
from parity_checks import BACKENDS, Pair, assert_logits_equal, hf_logits
from tiny_models import ragged_prompts, random_ids

PROMPT, STEPS = 9, 3


PATCHED = sorted(set(LLAMA) - {"hook_resid_mid"})  # what a norm is given is not what is added to later


def halves(x: Tensor) -> Tensor:
    return 0.7 * x + 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PATCHED)
def test_a_patched_run_is_transformers_with_the_same_forward_hook(pair: Pair, name: str, backend: str) -> None:
    lm, ids = pair.lm(backend=backend), random_ids(3, PROMPT + STEPS)
    point = name if name in lm.hook_points() else f"blocks.1.{name}"
    module, side = place(lm, point)
    with hooked(pair.hf.get_submodule(module), side, halves):
        expected = hf_logits(pair.hf, ids)[PROMPT - 1 :]
    assert (expected - hf_logits(pair.hf, ids)[PROMPT - 1 :]).abs().max() > 0.01 * expected.abs().max()
    rows = []
    with lm.sequence(ids[:PROMPT]) as sequence, lm.patch(point, lambda x, at: halves(x)):
        for token in (*ids[PROMPT:], 0):
            rows.append(sequence.logits)
            sequence.append(token)
    assert_logits_equal(torch.stack(rows), expected, point, tolerance=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_patching_the_middle_of_a_block_equals_patching_what_is_added_there(pair: Pair, backend: str) -> None:
    lm, ids = pair.lm(backend=backend), random_ids(3, PROMPT)
    vector = torch.randn(lm.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    with lm.patch("blocks.1.hook_resid_mid", lambda x, at: x + vector):
        middle = lm.sequence(ids).logits
    with lm.patch("blocks.1.hook_attn_out", lambda x, at: x + vector):
        assert_close(lm.sequence(ids).logits, middle, "logits")


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_goes_where_a_patched_pattern_says(pair: Pair, backend: str) -> None:
    """Each token to itself alone: what comes out are its own values. Keys and queries of zero: the mean of values."""
    lm, ids = pair.lm(backend=backend), random_ids(3, 6)
    mixer = lm.spec.layers[1].mixer
    group = mixer.num_heads // mixer.num_kv_heads
    sequence, points = lm.sequence(ids[:4]), ["blocks.1.attn.hook_v", "blocks.1.attn.hook_z"]

    def diagonal(pattern: Tensor, at: At) -> None:
        pattern.zero_()
        pattern[:, torch.arange(len(at.positions)), at.positions] = 1

    with lm.patch("blocks.1.attn.hook_pattern", diagonal), lm.capture(points) as acts:
        _ = sequence.logits
        sequence.append(ids[4:])
        _ = sequence.logits
    values = acts[points[0]].repeat_interleave(group, 1)
    assert_close(acts[points[1]], values, "itself")
    for name in ("rot_q", "rot_k"):
        with lm.patch(f"blocks.1.attn.hook_{name}", lambda x, at: x * 0), lm.capture(points) as acts:
            _ = lm.sequence(ids).logits
        values = acts[points[0]].repeat_interleave(group, 1)
        means = values.cumsum(0) / torch.arange(1, 7)[:, None, None]
        assert_close(acts[points[1]], means, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_patch_of_one_sequence_changes_no_bit_of_the_others(pair: Pair, backend: str) -> None:
    lm, prompts = pair.lm(backend=backend), ragged_prompts(6, (9, 1, 14, 5))

    def run(points: list[str]) -> tuple[Tensor, Tensor]:
        sequences = [lm.sequence(ids) for ids in prompts]
        with ExitStack() as stack:
            for point in points:
                stack.enter_context(lm.patch(point, lambda x, at: x * 0.5 + 1, sequence=sequences[2]))
            first = lm.step(sequences)
            for sequence in sequences:
                sequence.append(7)
            return first, lm.step(sequences)

    plain = run([])
    for point in lm.hook_points():
        if point.startswith("blocks.") and not point.startswith("blocks.1."):
            continue
        for before, after in zip(plain, run([point]), strict=True):
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [True, True, False, True], point


def test_a_patch_holds_for_each_request_of_a_generation_and_ends_with_the_block(pair: Pair) -> None:
    lm, prompts = pair.lm(), ragged_prompts(6, (9, 4))
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": []}
    plain = [output.token_ids for output in lm.generate(prompts, **options)]
    with lm.patch("blocks.1.hook_resid_post", lambda x, at: -x):
        turned = [output.token_ids for output in lm.generate(prompts, **options)]
        assert [lm.generate(prompt, **options).token_ids for prompt in prompts] == turned
    assert all(a != b for a, b in zip(plain, turned, strict=True))
    assert [output.token_ids for output in lm.generate(prompts, **options)] == plain
    module, side = place(lm, "blocks.1.hook_resid_post")
    with hooked(pair.hf.get_submodule(module), side, torch.neg):
        for prompt, tokens in zip(prompts, turned, strict=True):
            logits = hf_logits(pair.hf, [*prompt, *tokens])[len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == tokens


def test_logits_read_under_a_patch_are_not_kept_for_later_nor_the_other_way_round(pair: Pair) -> None:
    lm = pair.lm()
    sequence = lm.sequence(random_ids(1, 6))
    before = sequence.logits
    with lm.patch("ln_final.hook_normalized", lambda x, at: x * 0):
        assert sequence.logits.abs().max() == 0
        assert sequence.fork().logits.abs().max() == 0
    assert_close(sequence.logits, before, "after the block")


def test_logprobs_are_those_under_the_sequences_own_patch(pair: Pair) -> None:
    lm = pair.lm()
    sequence = lm.sequence(random_ids(1, 6))
    with lm.patch("ln_final.hook_normalized", lambda x, at: x * 0, sequence=sequence):
        assert sequence.logprobs == pytest.approx([-torch.tensor(lm.spec.vocab_size).log().item()] * 5)


def test_hooks_run_in_the_order_they_were_opened(pair: Pair) -> None:
    lm, point = pair.lm(), "blocks.0.hook_resid_post"
    with (
        lm.capture(point) as before,
        lm.patch(point, lambda x, at: x + 1),
        lm.patch(point, lambda x, at: x.mul_(2)),
        lm.capture(point) as after,
    ):
        _ = lm.sequence([5, 6]).logits
    assert torch.equal(after[point], (before[point] + 1) * 2)


def test_values_a_patch_was_given_are_its_own_to_keep(pair: Pair) -> None:
    lm, point = pair.lm(), "blocks.0.hook_resid_post"
    kept: list[Tensor] = []
    with lm.capture(point) as acts, lm.patch(point, lambda x, at: kept.append(x)), lm.patch(point, lambda x, at: x + 1):
        _ = lm.sequence([5, 6]).logits
    assert torch.equal(kept[0], acts[point])


def test_the_logit_lens_reads_every_layer_and_ends_at_the_logits(pair: Pair) -> None:
    lm, ids = pair.lm(), random_ids(2, 12)
    with torch.no_grad():
        hidden = pair.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1]
        norm = pair.hf.get_submodule(place(lm, "ln_final.hook_normalized")[0])
        expected = [pair.hf.get_output_embeddings()(norm(state))[0, -1] for state in hidden]
    sequence = lm.sequence(ids)
    lens = lm.logit_lens(sequence)
    assert lens.shape == (len(lm.spec.layers) + 1, lm.spec.vocab_size)
    assert_close(lens, torch.stack([*expected, hf_logits(pair.hf, ids)[-1]]), "lens")
    assert_close(lm.logit_lens(sequence), lens, "a second look")
