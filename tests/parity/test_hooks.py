"""What hooks see and change is what forward hooks on transformers' modules see and change, in prefill and decode, in a
batch; a capture changes no bit, and a patch none of another sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, DynamicCache

import handloom as hl
from handloom.errors import InvalidParam, RequestFailed
from handloom.model.hooks import At
from parity_checks import BACKENDS, Pair, assert_logits_equal, hf_logits
from tiny_models import ragged_prompts, random_ids

TOLERANCE = 2e-5  # of the largest value at a point
PROMPT, STEPS = 9, 3

LLAMA = {
    "hook_embed": ("model.embed_tokens", "out"),
    "hook_resid_pre": ("model.layers.{i}", "in"),
    "attn.hook_q": ("model.layers.{i}.self_attn.q_proj", "out"),
    "attn.hook_k": ("model.layers.{i}.self_attn.k_proj", "out"),
    "attn.hook_v": ("model.layers.{i}.self_attn.v_proj", "out"),
    "attn.hook_z": ("model.layers.{i}.self_attn.o_proj", "in"),
    "hook_attn_out": ("model.layers.{i}.self_attn.o_proj", "out"),
    "hook_resid_mid": ("model.layers.{i}.post_attention_layernorm", "in"),
    "mlp.hook_post": ("model.layers.{i}.mlp.down_proj", "in"),
    "hook_mlp_out": ("model.layers.{i}.mlp", "out"),
    "hook_resid_post": ("model.layers.{i}", "out"),
    "ln_final.hook_normalized": ("model.norm", "out"),
}
GEMMA = {
    **LLAMA,
    "hook_attn_out": ("model.layers.{i}.post_attention_layernorm", "out"),
    "hook_resid_mid": ("model.layers.{i}.pre_feedforward_layernorm", "in"),
    "hook_mlp_out": ("model.layers.{i}.post_feedforward_layernorm", "out"),
}
GPT2 = {
    "hook_embed": ("transformer.wte", "out"),
    "hook_resid_pre": ("transformer.h.{i}", "in"),
    "attn.hook_q": ("transformer.h.{i}.attn.c_attn", "out 0"),
    "attn.hook_k": ("transformer.h.{i}.attn.c_attn", "out 1"),
    "attn.hook_v": ("transformer.h.{i}.attn.c_attn", "out 2"),
    "attn.hook_z": ("transformer.h.{i}.attn.c_proj", "in"),
    "hook_attn_out": ("transformer.h.{i}.attn.c_proj", "out"),
    "hook_resid_mid": ("transformer.h.{i}.ln_2", "in"),
    "mlp.hook_post": ("transformer.h.{i}.mlp.c_proj", "in"),
    "hook_mlp_out": ("transformer.h.{i}.mlp", "out"),
    "hook_resid_post": ("transformer.h.{i}", "out"),
    "ln_final.hook_normalized": ("transformer.ln_f", "out"),
}
PLACES = {"llama": LLAMA, "gpt2": GPT2, "gemma3_text": GEMMA}
NO_PLACE = {"attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_pattern"}  # inside a module of transformers
PATCHED = sorted(set(LLAMA) - {"hook_resid_mid"})  # what a norm is given is not what is added to later


def place(lm: hl.LM, point: str) -> tuple[str, str]:
    """The module of transformers that has this point's values, and where: "in", "out", or a third of "out"."""
    _, i, name = point.split(".", 2) if point.startswith("blocks.") else ("", "", point)
    module, side = PLACES[lm.spec.model_type][name]
    return module.format(i=i), side


def changing(function: Callable[[Tensor], Tensor], side: str) -> Callable[[Tensor], Tensor]:
    """The function on the side's third of a tensor."""
    if len(side.split()) == 1:
        return function

    def on_third(x: Tensor) -> Tensor:
        thirds = list(x.chunk(3, dim=-1))
        thirds[int(side[-1])] = function(thirds[int(side[-1])])
        return torch.cat(thirds, dim=-1)

    return on_third


@contextmanager
def hooked(module: Module, side: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A forward hook of torch's that puts function(value) in the place of a module's input or output."""
    function = changing(function, side)

    def before(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

    def after(_: Module, __: Any, out: Any) -> Any:
        return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)

    if side == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def theirs(pair: Pair, lm: hl.LM, ids: list[int]) -> dict[str, Tensor]:
    """transformers' values at every point it has a place for, [n, ...] in our shapes."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for point, shape in lm.hook_points().items():
            if point.split(".", 2)[-1] in NO_PLACE:
                continue
            module, side = place(lm, point)

            def look(x: Tensor, point: str = point, shape: tuple[Any, ...] = shape) -> Tensor:
                seen[point] = x[0].reshape(len(ids), *shape[1:])
                return x

            stack.enter_context(hooked(pair.hf.get_submodule(module), side, look))
        hf_logits(pair.hf, ids)
    return seen


def assert_close(ours: Tensor, expected: Tensor, what: str) -> None:
    assert ours.shape == expected.shape, what
    delta = (ours - expected).abs().max() / expected.abs().max()
    assert delta <= TOLERANCE, f"{what}: {delta:.3g} of the largest value"


def halves(x: Tensor) -> Tensor:
    return 0.7 * x + 0.1


# Looking ---------------------------------------------------------------------------------------


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
        logits = seen["ln_final.hook_normalized"] @ lm.transformer.head.T
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


# Changing --------------------------------------------------------------------------------------


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
