"""Tokens taken out of the middle of the cache: what is computed afterwards is what transformers computes over a cache
with the same rows cut out, whatever else is done to the sequence."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import handloom as hl
from engines import all_free, close, fresh_logits, lm_in_float64, lm_with
from handloom.errors import CheckpointError, InvalidParam, OutOfPages, UnsupportedOption
from tiny_models import TINY, random_ids, save

IDS, MORE = random_ids(1, 11), random_ids(2, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: save(TINY[family](), tmp_path_factory.mktemp(family)))


def opened(folder: Path) -> tuple[Any, hl.LM]:
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        hl.LM.from_pretrained(folder, kv_cache_tokens=96),
    )


def without(past: DynamicCache, start: int, stop: int) -> None:
    """Cut rows out of transformers' cache."""
    for layer in past.layers:
        layer.keys = torch.cat((layer.keys[:, :, :start], layer.keys[:, :, stop:]), dim=2)
        layer.values = torch.cat((layer.values[:, :, :start], layer.values[:, :, stop:]), dim=2)


# Against transformers --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 7), (4, 8), (7, 11), (0, 11)])
def test_after_an_eviction_logits_are_those_over_a_cache_with_these_rows_cut_out(
    folders: Any, family: str, start: int, stop: int
) -> None:
    model, lm = opened(folders(family))
    past, sequence = DynamicCache(), lm.sequence(IDS)
    model(torch.tensor([IDS]), past_key_values=past)
    _ = sequence.logits
    sequence.evict(start, stop)
    without(past, start, stop)
    for _round in range(2):  # the second time over tokens that were computed with the gap
        sequence.append(MORE)
        at = torch.arange(len(sequence) - len(MORE), len(sequence))
        expected = model(torch.tensor([MORE]), past_key_values=past, position_ids=at[None]).logits[0, -1]
        assert close(sequence.logits, expected)
        assert not close(fresh_logits_of(lm, sequence.token_ids), expected)
    assert sequence.evicted == ((start, stop),)


def fresh_logits_of(lm: hl.LM, ids: list[int]) -> torch.Tensor:
    with lm.sequence(ids) as sequence:
        return sequence.logits


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 6), (1, 5), (3, 3)])
def test_after_a_removal_logits_are_those_over_a_cache_cut_and_rotated_back(
    folders: Any, family: str, start: int, stop: int
) -> None:
    """The rotation is transformers' own, by a negative position; 6 tokens are within gemma's window."""
    model, lm = opened(folders(family))
    ids = IDS[:6]
    past, sequence = DynamicCache(), lm.sequence(ids)
    model(torch.tensor([ids]), past_key_values=past)
    _ = sequence.logits
    sequence.remove(start, stop)
    without(past, start, stop)
    rotate = inspect.getmodule(type(model.model)).apply_rotary_pos_emb  # type: ignore[union-attr]
    for i, layer in enumerate(past.layers):
        kind = [model.config.layer_types[i]] if family == "gemma3_text" else []
        cos, sin = model.model.rotary_emb(layer.keys, torch.tensor([[start - stop]]), *kind)
        layer.keys[:, :, start:] = rotate(layer.keys, layer.keys, cos, sin)[0][:, :, start:]
    assert sequence.token_ids == ids[:start] + ids[stop:]
    for i, layer in enumerate(past.layers):
        for ours, theirs in zip(sequence.kv(i), (layer.keys, layer.values), strict=True):
            assert not len(ours) or close(ours, theirs[0].transpose(0, 1))
    at = torch.arange(len(sequence), len(sequence) + 2)
    sequence.append(MORE[:2])
    expected = model(torch.tensor([MORE[:2]]), past_key_values=past, position_ids=at[None]).logits[0, -1]
    assert close(sequence.logits, expected)


def test_k_that_was_rotated_back_is_that_of_a_sequence_without_these_tokens_in_the_first_layer() -> None:
    """Where K depends on the token and its position alone; every later layer has seen what was removed."""
    lm = lm_with()
    sequence, fresh = lm.sequence(IDS), lm.sequence(IDS[:2] + IDS[7:])
    lm.step([sequence, fresh])
    sequence.remove(2, 7)
    assert close(sequence.kv(0)[0], fresh.kv(0)[0])
    assert not close(sequence.kv(1)[0], fresh.kv(1)[0])


# What else is done to it -----------------------------------------------------------------------


def gapped(lm: hl.LM, start: int = 2, stop: int = 8) -> hl.LiveSequence:
    sequence = lm.sequence(IDS)
    _ = sequence.logits
    sequence.evict(start, stop)
    return sequence


def test_logits_read_after_an_eviction_are_those_of_the_last_token_over_what_is_left() -> None:
    lm = lm_with()
    before = lm.sequence(IDS).logits
    sequence, again = gapped(lm), lm.sequence(IDS[:-1])
    _ = again.logits
    again.evict(2, 8)
    again.append(IDS[-1])
    assert close(sequence.logits, again.logits)
    assert not close(sequence.logits, before)


@pytest.mark.parametrize(("start", "stop"), [(2, 8), (5, 11), (0, 11)])
def test_a_generation_goes_on_from_a_gap_as_step_by_step_and_the_last_token_is_cached_again(
    start: int, stop: int
) -> None:
    lm = lm_with()
    sequence, steps = gapped(lm, start, stop), gapped(lm, start, stop)
    tokens = lm.generate(sequence, max_new_tokens=6, eos_token_id=[]).token_ids
    for token in tokens:
        assert int(steps.logits.argmax()) == token
        steps.append(token)
    assert sequence.evicted == steps.evicted == ((start, min(stop, len(IDS) - 1)),)
    assert all(close(a, b) for a, b in zip(sequence.kv(1, 12), steps.kv(1, 12), strict=True))


def test_pages_that_are_left_empty_are_freed_and_a_gap_may_grow() -> None:
    lm = lm_with(page_size=4)
    sequence = lm.sequence(random_ids(3, 20))
    _ = sequence.logits
    assert len(sequence.page_table) == 5
    sequence.evict(3, 7)
    assert (len(sequence.page_table), sequence.evicted) == (4, ((3, 7),))
    sequence.evict(7, 11)
    sequence.evict(15, 16)
    sequence.evict(2, 12)
    assert (len(sequence.page_table), sequence.evicted) == (3, ((2, 12), (15, 16)))
    assert (sequence.num_cached, sequence.num_computed, len(sequence)) == (9, 20, 20)
    sequence.free()
    assert (sequence.evicted, all_free(lm)) == ((), True)


def test_a_fork_and_a_saved_sequence_have_the_gap_and_go_on_alike(tmp_path: Path) -> None:
    lm = lm_with()
    sequence = gapped(lm)
    sequence.evict(9, 10)
    sequence.save(tmp_path / "s")
    restored, branch = lm.restore(tmp_path / "s"), sequence.fork()
    assert restored.evicted == branch.evicted == ((2, 8), (9, 10))
    for other in (sequence, restored, branch):
        other.append(MORE)
    logits = lm.step([sequence, restored, branch])
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("kept", [10, 8, 7, 5, 3, 2])
def test_a_rewind_into_a_gap_keeps_what_is_before_and_computes_its_last_token_again(kept: int) -> None:
    lm = lm_with()
    sequence = gapped(lm)
    sequence.rewind(len(IDS) - kept)
    assert sequence.evicted == (((2, min(kept, 8)),) if kept > 2 else ())
    expected = lm.sequence(IDS[: kept - 1])
    if kept > 3:
        _ = expected.logits
        expected.evict(2, min(kept - 1, 8))
    expected.append(IDS[kept - 1])
    assert close(sequence.logits, expected.logits)
    assert sequence.num_cached == expected.num_cached == kept - max(0, min(kept - 1, 8) - 2)


def test_truncating_and_reading_logprobs_compute_the_evicted_tokens_again() -> None:
    lm = lm_with()
    sequence, whole = gapped(lm), lm.sequence(IDS)
    assert sequence.logprobs == pytest.approx(whole.logprobs)
    assert sequence.evicted == ((2, 8),)
    sequence.truncate_left(1)
    assert sequence.evicted == ()
    assert close(sequence.logits, fresh_logits(lm, IDS[1:]))


def test_removing_what_was_evicted_closes_the_gap_in_positions_and_leaves_a_fork_alone() -> None:
    lm = lm_with()
    sequence, at_once = gapped(lm), lm.sequence(IDS)
    _ = at_once.logits
    at_once.remove(2, 8)
    branch = sequence.fork()
    before = [torch.cat(sequence.kv(layer, 8)) for layer in range(2)]
    branch.remove(2, 8)
    for layer in range(2):
        assert all(close(a, b) for a, b in zip(branch.kv(layer), at_once.kv(layer), strict=True))
        assert torch.equal(torch.cat(sequence.kv(layer, 8)), before[layer])
    assert (branch.evicted, branch.token_ids) == ((), at_once.token_ids)


def test_a_removal_moves_the_gaps_after_it_and_the_embeddings_before() -> None:
    lm = lm_with()
    sequence = lm.sequence(lm.transformer.embedding[torch.tensor(IDS[:6])])
    sequence.append(IDS[6:])
    _ = sequence.logits
    sequence.evict(1, 3)
    sequence.evict(8, 10)
    sequence.remove(2, 9)
    assert (sequence.evicted, sequence.token_ids, sequence.num_embeddings) == (((1, 2), (2, 3)), [-1, -1, *IDS[9:]], 2)
    assert sequence.embeddings is not None
    assert torch.equal(sequence.embeddings, lm.transformer.embedding[torch.tensor(IDS[:2])])
    assert (sequence.num_cached, sequence.num_computed) == (2, 4)
    sequence.append(MORE)
    assert torch.isfinite(sequence.logits).all()


def test_k_and_v_beside_a_gap_are_read_and_written_and_in_it_refused() -> None:
    lm = lm_with()
    whole, sequence = lm.sequence(IDS), gapped(lm)
    _ = whole.logits
    k, v = whole.kv(1, 8, 11)
    assert all(torch.equal(a, b) for a, b in zip(sequence.kv(1, 8, 11), (k, v), strict=True))
    sequence.set_kv(1, 9, v=v[:1] * 2)
    assert torch.equal(sequence.kv(1, 8, 11)[1], torch.stack((v[0], v[0] * 2, v[2])))
    for start, stop in ((0, 3), (7, 9), (3, 4), (0, None)):
        with pytest.raises(InvalidParam, match="tokens 2 to 8 were evicted"):
            sequence.kv(1, start, stop)
    with pytest.raises(InvalidParam, match="evicted"):
        sequence.set_kv(1, 7, k=k)


def test_what_was_edited_is_found_by_nobody() -> None:
    """But for the page before the gap, which is as it was."""
    lm, options = lm_in_float64(page_size=4), {"max_new_tokens": 9, "eos_token_id": []}
    expected = lm_in_float64(page_size=4).generate(IDS, **options).token_ids
    for edit in (hl.LiveSequence.evict, hl.LiveSequence.remove):
        lm.pool.forget_cached()
        with lm.sequence(IDS) as sequence:
            _ = sequence.logits
            edit(sequence, 4, 8)
            lm.generate(sequence, **options)
        assert lm.pool.num_cached <= 1
        assert lm.generate(IDS, **options).token_ids == expected


# What cannot be --------------------------------------------------------------------------------


def test_models_with_windows_or_learned_positions_refuse_what_they_cannot_do() -> None:
    windowed, learned = lm_with(family="gemma3_text").sequence(IDS), lm_with(family="gpt2").sequence(IDS)
    with pytest.raises(UnsupportedOption, match=r"window.*sequence\.remove"):
        windowed.evict(0, 0)
    with pytest.raises(UnsupportedOption, match=r"learned positions.*truncate_left"):
        learned.remove(0, 0)


@pytest.mark.parametrize("edit", [hl.LiveSequence.evict, hl.LiveSequence.remove])
@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (5, 12), (0, 12)])
def test_tokens_that_are_not_computed_are_refused_and_nothing_changes(edit: Any, start: int, stop: int) -> None:
    lm = lm_with()
    sequence = lm.sequence(IDS)
    _ = sequence.logits
    sequence.append(7)
    with pytest.raises(InvalidParam, match=f"tokens {start} to {stop} .* 11 of 12 tokens are computed"):
        edit(sequence, start, stop)
    assert close(sequence.logits, fresh_logits(lm, [*IDS, 7]))


def test_without_a_page_for_a_copy_nothing_is_evicted() -> None:
    lm = lm_with(num_pages=3, page_size=4)
    sequence = lm.sequence(IDS)
    expected = sequence.logits
    with sequence.fork() as branch:
        with pytest.raises(OutOfPages):
            branch.evict(2, 4)
        assert (branch.evicted, branch.private) == ((), False)
        assert torch.equal(branch.kv(1, 0)[0], sequence.kv(1, 0)[0])
    assert torch.equal(sequence.logits, expected)


@pytest.mark.parametrize(
    ("evicted", "why"),
    [
        (torch.tensor([[2, 8], [4, 10]]), "evicted tokens 4 to 10"),
        (torch.tensor([[-1, 5]]), "evicted tokens -1 to 5"),
        (torch.tensor([[8, 8]]), "evicted tokens 8 to 8"),
        (torch.tensor([[5, 2**60]]), "evicted tokens 5 to"),
        (torch.tensor([[2, 3]]), "'logits' is not expected"),
        (torch.tensor([[1, 8]]), "12 computed"),
        (torch.tensor([[2.0, 8.0]]), "evicted is F32"),
        (torch.tensor([2, 8]), r"evicted is I64 \[2\]"),
        (torch.zeros((0, 2), dtype=torch.int64), r"evicted is I64 \[0, 2\]"),
    ],
)
def test_safety_27_a_file_whose_gaps_cannot_be_is_refused(tmp_path: Path, evicted: torch.Tensor, why: str) -> None:
    lm, path = lm_with(), tmp_path / "s"
    sequence = gapped(lm)
    _ = sequence.logits
    sequence.save(path)
    sequence.free()
    with safe_open(path, "pt") as file:
        said = file.metadata()
    save_file({**load_file(path), "evicted": evicted}, path, said)
    with pytest.raises(CheckpointError, match=why):
        lm.restore(path)
    assert all_free(lm)
