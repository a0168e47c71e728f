"""K and V read from a sequence are those of transformers' cache, and writing them does what writing there does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import handloom as hl
from engines import all_free, close, fresh_logits, lm_with
from handloom.errors import InvalidParam, OutOfPages
from handloom.lm import LM
from tiny_models import TINY, random_ids, save

IDS = random_ids(1, 6)  # shorter than gemma's window, past which transformers' cache forgets


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: save(TINY[family](), tmp_path_factory.mktemp(family)))


@pytest.fixture(params=sorted(TINY))
def folder(folders: Any, request: pytest.FixtureRequest) -> Path:
    made: Path = folders(request.param)
    return made


@torch.no_grad()
def cached(model: Any, ids: list[int]) -> DynamicCache:
    past = DynamicCache()
    model(torch.tensor([ids]), past_key_values=past)
    return past


def heads_last(states: Tensor) -> Tensor:
    """transformers' [1, heads, n, head_dim] as our [n, heads, head_dim]."""
    return states[0].transpose(0, 1)


@torch.no_grad()
def test_reading_and_writing_is_that_of_transformers_cache(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lm = hl.LM.from_pretrained(folder, kv_cache_tokens=64)
    past, sequence = cached(model, IDS), lm.sequence(IDS)
    _ = sequence.logits
    for i, layer in enumerate(past.layers):
        for ours, theirs in zip(sequence.kv(i), (layer.keys, layer.values), strict=True):
            assert close(ours, heads_last(theirs))
    last = past.layers[1]
    last.keys[:, :, 1:4] *= 0.5
    last.values[:, :, 2:4] += 1
    k, v = sequence.kv(1, 1, 4)
    sequence.set_kv(1, 1, k=k * 0.5)
    sequence.set_kv(1, 2, v=v[1:] + 1)
    unchanged = lm.sequence([*IDS, 7]).logits
    expected = model(torch.tensor([[7]]), past_key_values=past).logits[0, -1]
    sequence.append(7)
    assert close(sequence.logits, expected)
    assert not close(expected, unchanged)


def test_what_is_read_is_a_copy_and_what_is_written_back_changes_nothing() -> None:
    lm = lm_with()
    sequence = lm.sequence(IDS)
    before = sequence.logits
    k, v = sequence.kv(0, 2, 5)
    k.zero_()
    v.zero_()
    assert sequence.kv(0, 2, 5)[0].abs().min() > 0
    sequence.set_kv(0, 2, *sequence.kv(0, 2, 5))
    sequence.set_kv(0, 2)
    sequence.append(7)
    assert close(sequence.logits, fresh_logits(lm, [*IDS, 7]))
    sequence.rewind(1)
    assert close(sequence.logits, before)


@pytest.mark.parametrize("length", [1, 6, 9])
def test_kv_moved_to_another_sequence_continues_it(length: int) -> None:
    """All layers of one sequence put into another make the other continue as the first would."""
    lm = lm_with()
    source, target = lm.sequence(random_ids(1, length + 1)), lm.sequence(random_ids(2, length + 1))
    lm.step([source, target])
    for layer in range(len(lm.spec.layers)):
        target.set_kv(layer, 0, *source.kv(layer))
    for sequence in (source, target):
        sequence.rewind(1)
        sequence.append([7, 8])
    assert close(target.logits, source.logits)


def test_a_fork_keeps_what_the_other_changes() -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(1, 10))
    _ = sequence.logits
    branch = sequence.fork()
    k, v = branch.kv(0, 3, 6)
    branch.set_kv(0, 3, k * 0, v * 0)
    assert sequence.kv(0, 3, 6)[0].abs().min() > 0
    sequence.append(7)
    assert close(sequence.logits, fresh_logits(lm, [*random_ids(1, 10), 7]))
    branch.append(7)
    assert not close(branch.logits, sequence.logits)
    assert [len(set(sequence.page_table) & set(branch.page_table))] == [0], "tokens 3 to 5 lie in the two whole pages"
    sequence.free()
    branch.free()
    assert all_free(lm)


def test_a_change_without_a_page_for_it_is_refused_whole() -> None:
    lm = lm_with(num_pages=2)
    sequence = lm.sequence(random_ids(1, 8))
    _ = sequence.logits
    branch = sequence.fork()
    k, v = branch.kv(0, 0, 2)
    with pytest.raises(OutOfPages):
        branch.set_kv(0, 0, k * 0, v * 0)
    assert torch.equal(branch.kv(0, 0, 2)[0], k)


def changed(lm: LM, **arguments: Any) -> None:
    sequence = lm.sequence(IDS)
    _ = sequence.logits
    sequence.append(7)
    k, v = sequence.kv(0, 0, 2)
    sequence.set_kv(**{"layer": 0, "start": 0, "k": k, "v": v, **arguments})


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"layer": 2}, "no layer 2; the model has 2"),
        ({"layer": -1}, "no layer -1"),
        ({"start": 5}, "tokens 5 to 7 have no K and V: 6 of 7 tokens are computed"),
        ({"start": -1}, "tokens -1 to 1"),
        ({"k": torch.zeros(2, 14, 2)}, r"\[2, 14, 2\]; expected \[2, 2, 14\]"),
        ({"v": torch.zeros(3, 2, 14)}, r"\[3, 2, 14\]; expected \[2, 2, 14\]"),
    ],
)
def test_tokens_layers_and_shapes_that_are_not_there_are_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidParam, match=why):
        changed(lm_with(), **arguments)
