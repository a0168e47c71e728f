"""What a capture sees is what forward hooks on transformers' modules see, in prefill and decode, in a batch; and it
changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import handloom as hl
from handloom.errors import InvalidParam, RequestFailed
from handloom.ops import matrix
from hook_places import assert_close, theirs
from parity_checks import BACKENDS, Pair
from tiny_models import ragged_prompts, random_ids

PROMPT = 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_point_has_transformers_values_and_looking_changes_no_bit(pair: Pair, backend: str) -> None:
    lm, ids = pair.lm(backend=backend), random_ids(1, PROMPT)
    expected = theirs(pair, lm, ids)
    untouched = lm.sequence(ids).logits
    sequence = lm.sequence(ids)
    with lm.capture("*") as acts:
        assert torch.equal(sequence.logits, untouched)
    captured = acts.of(sequence)
    assert set(captured) == set(lm.hook_points()) >= set(expected)
    for point, values in expected.items():
        assert_close(captured[point], values, point)
        assert captured.positions(point).tolist() == list(range(PROMPT))
    for point, shape in lm.hook_points().items():
        assert captured[point].shape == tuple(PROMPT if isinstance(size, str) else size for size in shape)


def test_hidden_states_attentions_and_cache_of_transformers(pair: Pair) -> None:
    """Residual stream, patterns and rotated keys by transformers' own outputs; queries by what they make of them."""
    lm, ids = pair.lm(), random_ids(2, 20)
    eager = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = eager(
            torch.tensor([ids]), output_hidden_states=True, output_attentions=True, past_key_values=DynamicCache()
        )
    with lm.capture("*") as acts:
        _ = lm.sequence(ids).logits
    for i, layer in enumerate(lm.spec.layers):
        mixer, block = layer.mixer, f"blocks.{i}."
        assert_close(acts[block + "hook_resid_pre"], out.hidden_states[i][0], f"hidden state {i}")
        pattern = out.attentions[i][0]
        assert_close(acts[block + "attn.hook_pattern"], pattern, f"attention {i}")
        for name, states in (("attn.hook_rot_k", out.past_key_values.layers[i].keys),
                             ("attn.hook_v", out.past_key_values.layers[i].values)):  # fmt: skip
            kept = states[0].transpose(0, 1)
            assert_close(acts[block + name][-len(kept) :], kept, name)
        q, k = acts[block + "attn.hook_rot_q"], acts[block + "attn.hook_rot_k"]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, 1))
        weights = (scores * mixer.scale).masked_fill(pattern == 0, float("-inf")).softmax(-1)
        assert_close(weights, pattern, f"queries {i}")
    assert_close(acts["ln_final.hook_normalized"], out.hidden_states[-1][0], "the last hidden state")


def test_in_a_batch_in_chunks_and_while_decoding_each_sequence_is_seen_whole(pair: Pair) -> None:
    lm = pair.lm()
    sequences = [lm.sequence(ids) for ids in ragged_prompts(4, (11, 3, 20))]
    engine = hl.Engine(lm, max_step_tokens=7)
    with lm.capture("*") as acts:
        for sequence in sequences:
            engine.add_request(sequence, max_new_tokens=5, eos_token_id=[])
        for _ in engine.run():
            pass
    assert len(acts) == 3
    for sequence in sequences:
        computed = sequence.token_ids[:-1]
        captured = acts.of(sequence)
        for point, values in theirs(pair, lm, computed).items():
            assert captured.positions(point).tolist() == list(range(len(computed)))
            assert_close(captured[point], values, point)
        pattern = captured["blocks.0.attn.hook_pattern"]
        assert pattern.shape[1:] == (len(computed), len(computed))
        assert torch.equal(pattern, pattern.tril())
        assert torch.allclose(pattern.sum(-1), torch.ones(()))


def test_last_positions_are_what_each_token_was_chosen_from(pair: Pair) -> None:
    lm, prompts = pair.lm(), ragged_prompts(5, (30, 4))
    with lm.capture(["ln_final.hook_normalized", "blocks.0.hook_resid_post"], positions="last") as acts:
        outputs = lm.generate(prompts, max_new_tokens=4, eos_token_id=[])
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        seen = acts.of(i)
        assert seen.positions("blocks.0.hook_resid_post").tolist() == list(range(len(prompt) - 1, len(prompt) + 3))
        logits = seen["ln_final.hook_normalized"] @ matrix(lm.transformer.head).T
        assert logits.argmax(-1).tolist() == output.token_ids


def test_a_capture_of_one_sequence_sees_no_other_and_ends(pair: Pair) -> None:
    lm = pair.lm()
    mine, other = lm.sequence(random_ids(1, 5)), lm.sequence(random_ids(2, 5))
    point = "blocks.1.hook_mlp_out"
    with lm.capture(point, sequence=mine) as acts:
        lm.step([other, mine])
    mine.append(5)
    _ = mine.logits
    assert (len(acts), acts[point].shape[0]) == (1, 5)
    with pytest.raises(InvalidParam, match="no token of this sequence"):
        acts.of(other)


def test_a_capture_sees_the_last_token_of_a_sequence_that_was_computed_before(pair: Pair) -> None:
    lm, ids = pair.lm(), random_ids(1, 5)
    sequence = lm.sequence(ids)
    _ = sequence.logits
    with lm.capture("hook_embed") as acts:
        _ = sequence.logits
        _ = sequence.logits
    assert_close(acts["hook_embed"], theirs(pair, lm, ids)["hook_embed"][-1:], "the last token, once")


# What cannot be --------------------------------------------------------------------------------


def test_wrong_points_positions_and_questions_are_errors_with_names(pair: Pair) -> None:
    lm = pair.lm()
    for bad in ("blocks.99.hook_resid_post", "resid", ["hook_embed", 7]):
        with (
            pytest.raises(InvalidParam, match=r"there is no hook point .*blocks\.\d\.hook_resid_post"),
            lm.capture(bad),
        ):
            pass
    with pytest.raises(InvalidParam, match="'all' or 'last'"), lm.capture("hook_embed", positions="first"):  # type: ignore[arg-type]
        pass
    with lm.capture("hook_embed") as acts:
        with pytest.raises(InvalidParam, match="0 sequences ran"):
            _ = acts["hook_embed"]
        lm.generate([[5, 6], [7]], max_new_tokens=1)
    with pytest.raises(InvalidParam, match="2 sequences were captured; say whose"):
        _ = acts["hook_embed"]
    with pytest.raises(InvalidParam, match="was not captured; captured were: hook_embed"):
        _ = acts.of(0)["hook_resid_pre"]


@pytest.mark.parametrize(
    ("function", "error", "why"),
    [
        (lambda x, at: 1 // 0, RequestFailed, "hook_mlp_out raised ZeroDivisionError"),
        (lambda x, at: x[1:], InvalidParam, "hook_mlp_out returned .1, .*; expected a tensor .2, "),
        (lambda x, at: 5, InvalidParam, "returned int"),
        (lambda x: x, RequestFailed, "TypeError"),
    ],
)
def test_a_patch_that_fails_is_named_and_the_model_goes_on(
    pair: Pair, function: Any, error: type[Exception], why: str
) -> None:
    lm = pair.lm()
    expected = lm.generate([5, 6], max_new_tokens=3, eos_token_id=[]).token_ids
    sequence = lm.sequence([5, 6])
    with lm.patch("blocks.0.hook_mlp_out", function):
        with pytest.raises(error, match=why):
            _ = sequence.logits
        with pytest.raises(error, match=why):
            lm.generate([5, 6], max_new_tokens=3)
    assert lm.generate(sequence, max_new_tokens=3, eos_token_id=[]).token_ids == expected
    sequence.free()
    assert lm.pool.num_free == lm.pool.num_pages
