"""A saved sequence goes on bitwise where it stopped; a file of another model, damaged or made up is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engines import all_free, lm_with, loaded
from handloom.cache.pages import PagePool
from handloom.cache.snapshot import fingerprint
from handloom.errors import CheckpointError, ContextOverflow, OutOfPages
from handloom.live import LiveSequence
from handloom.lm import LM
from handloom.model.transformer import Transformer
from tiny_models import random_ids

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": []}


@pytest.fixture(params=["llama", "gpt2", "gemma3_text"])
def lm(request: pytest.FixtureRequest) -> LM:
    return lm_with(family=request.param)


def scattered(lm: LM, length: int = 21) -> LiveSequence:
    """A computed sequence whose pages do not lie side by side, the last one partly filled."""
    first, second = lm.sequence(random_ids(1, 6)), lm.sequence(random_ids(2, length - 9))
    lm.step([first, second])
    first.free()
    second.append(random_ids(3, 9))
    _ = second.logits
    assert second.page_table != sorted(second.page_table)
    return second


def rewrite(path: Path, metadata: dict[str, Any] | None = None, **tensors: Any) -> None:
    """The same file by safetensors' own writer with tensors replaced, added, or left out (None)."""
    with safe_open(path, "pt") as file:
        said = file.metadata()
    merged = {name: value for name, value in {**load_file(path), **tensors}.items() if value is not None}
    save_file(merged, path, {**said, **(metadata or {})})


@pytest.mark.parametrize("fragmented", [False, True])
def test_a_restored_sequence_goes_on_bitwise_as_the_saved_one(lm: LM, tmp_path: Path, fragmented: bool) -> None:
    sequence = scattered(lm)
    sequence.save(tmp_path / "s")
    expected = [sequence.logits, *lm.generate(sequence, **GREEDY, output_logits=True).logits]
    other = lm_with(family=lm.name)
    if fragmented:
        holes = [other.sequence([token]) for token in range(5, 25)]
        other.step(holes)
        for hole in holes[::2]:
            hole.free()
    restored = other.restore(tmp_path / "s")
    assert restored.num_pending == 0
    assert restored.token_ids == sequence.token_ids[:21]
    found = [restored.logits, *other.generate(restored, **GREEDY, output_logits=True).logits]
    assert restored.token_ids == sequence.token_ids
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_logits_not_yet_read_are_bitwise_the_same_after_restoring(lm: LM, tmp_path: Path) -> None:
    sequence = lm.sequence(random_ids(1, 12))
    lm.generate(sequence, **GREEDY)
    sequence.append([7, 8])
    sequence.save(tmp_path / "s")
    restored = lm.restore(tmp_path / "s")
    assert (restored.num_computed, restored.num_pending) == (sequence.num_computed, sequence.num_pending) == (19, 3)
    assert torch.equal(restored.logits, sequence.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    full = loaded("llama").transformer
    half = Transformer(full.spec, {name: w.to(dtype) for name, w in full.weights.items()}, full.backend)
    lm = LM(half, None, PagePool(full.spec, 20, 4, dtype=dtype, device=full.device), name="half")
    sequence = lm.sequence(random_ids(1, 11))
    _ = sequence.logits
    sequence.save(tmp_path / "s")
    restored = lm.restore(tmp_path / "s")
    for k_pages, v_pages in lm.pool.layers:
        for pages in (k_pages, v_pages):
            saved, back = (
                torch.cat([pages[page] for page in s.page_table])[:11].view(torch.int16) for s in (sequence, restored)
            )
            assert torch.equal(saved, back)
    with pytest.raises(CheckpointError, match="saved from another model, named 'half': its weights are not"):
        lm_with().restore(tmp_path / "s")


def test_safetensors_own_reader_finds_what_was_saved(lm: LM, tmp_path: Path) -> None:
    sequence = scattered(lm)
    sequence.save(tmp_path / "s.safetensors")
    found = load_file(tmp_path / "s.safetensors")
    assert found["token_ids"].tolist() == sequence.token_ids
    assert torch.equal(found["logits"], sequence.logits)
    assert len(found) == 2 + 2 * len(lm.spec.layers)
    for i, (k_pages, v_pages) in enumerate(lm.pool.layers):
        for kind, pages in (("k", k_pages), ("v", v_pages)):
            expected = torch.stack([pages[sequence.page_table[at // 4], at % 4] for at in range(21)])
            assert torch.equal(found[f"layers.{i}.{kind}"], expected)


def test_nothing_computed_embeddings_and_forks(lm: LM, tmp_path: Path) -> None:
    new = lm.sequence(random_ids(1, 5))
    new.save(tmp_path / "new")
    assert (lm.restore(tmp_path / "new").token_ids, all_free(lm)) == (new.token_ids, True)
    embedded = lm.sequence(torch.randn(4, lm.spec.hidden_size, dtype=torch.float64))
    embedded.append([5, 6])
    branch = embedded.fork()
    _ = embedded.logits
    for at, sequence in enumerate((embedded, branch, embedded.fork())):
        sequence.save(tmp_path / str(at))
        restored = lm.restore(tmp_path / str(at))
        assert restored.embeddings is not None
        assert torch.equal(restored.embeddings, embedded.embeddings)
        assert torch.equal(restored.logits, embedded.logits)


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(1, 9))
    path = tmp_path / "s"
    path.write_bytes(b"before")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("handloom.cache.snapshot.zlib.crc32", lambda *_: 1 // 0)
        sequence.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert path.read_bytes() == b"before"
    sequence.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert lm.restore(path).token_ids == sequence.token_ids
    with pytest.raises(FileNotFoundError):
        sequence.save(tmp_path / "nowhere" / "s")


def changed_weights(lm: LM, name: str, at: int) -> LM:
    weights = {own: weight.clone() for own, weight in lm.transformer.weights.items()}
    weights[name].view(-1)[at] += 1
    return LM(Transformer(lm.spec, weights, lm.backend), None, lm.pool, name="other")


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(1, 9))
    sequence.save(tmp_path / "s")
    with pytest.raises(CheckpointError, match="named 'llama': its spec is not this model's"):
        lm_with(family="gpt2").restore(tmp_path / "s")
    for name in lm.transformer.weights:
        for at in (0, -1):
            with pytest.raises(CheckpointError, match="its weights are not this model's"):
                changed_weights(lm, name, at).restore(tmp_path / "s")
    same = LM(Transformer(lm.spec, dict(lm.transformer.weights), lm.backend), None, lm.pool, name="renamed")
    assert same.restore(tmp_path / "s").token_ids == sequence.token_ids


def test_a_fingerprint_reads_samples_only() -> None:
    """What is stated of it: a change between the samples is not seen."""
    lm = lm_with()
    between = lm.transformer.embedding.numel() // 4
    assert fingerprint(changed_weights(lm, "embed.weight", between).transformer) == fingerprint(lm.transformer)


def lying(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Edit the JSON header in place."""

    def edit(path: Path) -> None:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return edit


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "too few"),
    "missing": (lambda p: p.unlink(), "missing"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
    "text": (lambda p: p.write_text("hello, hello, hello"), "header of"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "must be .begin, end. within|belong to no tensor"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"0"), "belong to no tensor"),
    "a bit": (lambda p: p.write_bytes(p.read_bytes()[:-5] + b"\x01" + p.read_bytes()[-4:]), "CRC-32"),
    "weights": (lambda p: save_file({"a": torch.zeros(1)}, p), "not a saved sequence"),
    "version": (lambda p: rewrite(p, {"version": "9"}), "version '9'"),
    "layer missing": (lambda p: rewrite(p, **{"layers.1.v": None}), "'layers.1.v' is missing"),
    "ids missing": (lambda p: rewrite(p, token_ids=None), "token_ids is missing"),
    "a layer more": (lambda p: rewrite(p, **{"layers.2.k": torch.zeros(9, 2, 14)}), "'layers.2.k' is not expected"),
    "dtype": (lambda p: rewrite(p, **{"layers.1.v": torch.zeros(9, 2, 14, dtype=torch.float64)}), "F64"),
    "shape": (
        lambda p: rewrite(p, **{"layers.1.v": torch.zeros(9, 14, 2)}),
        r"\[9, 14, 2\]; expected F32 \[9, 2, 14\]",
    ),
    "scalar": (lambda p: rewrite(p, token_ids=torch.tensor(5)), "token_ids is missing or has no length"),
    "ids 2d": (lambda p: rewrite(p, token_ids=torch.zeros(9, 1, dtype=torch.int64)), r"I64 \[9, 1\]"),
    "ids short": (lambda p: rewrite(p, token_ids=torch.zeros(8, dtype=torch.int64)), "9 computed, 0 embedded of 8"),
    "ids floats": (lambda p: rewrite(p, token_ids=torch.zeros(9)), "F32"),
    "ids beyond": (lambda p: rewrite(p, token_ids=torch.full((9,), 331)), "token 0 is 331; ids go from 0 to 330"),
    "ids below": (lambda p: rewrite(p, token_ids=torch.full((9,), -1)), "token 0 is -1"),
    "ids changed": (lambda p: rewrite(p, token_ids=torch.full((9,), 7)), "CRC-32"),
    "logits": (lambda p: rewrite(p, logits=torch.zeros(9)), r"logits is F32 \[9\]; expected F32 \[331\]"),
    "embeddings": (lambda p: rewrite(p, embeddings=torch.zeros(9, 5)), r"expected F32 \[9, 24\]"),
    "embeddings int": (lambda p: rewrite(p, embeddings=torch.zeros(9, 24, dtype=torch.int64)), "is I64"),
    "embeddings NaN": (
        lambda p: rewrite(p, token_ids=torch.full((9,), -1), embeddings=torch.full((9, 24), torch.nan)),
        "NaN",
    ),
    "overlap": (lying(lambda h: h["layers.0.k"].update(data_offsets=h["layers.0.v"]["data_offsets"])), "overlaps|hole"),
    "huge": (lying(lambda h: h["token_ids"].update(shape=[1 << 60])), "takes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name_and_costs_no_page(tmp_path: Path, case: str) -> None:
    spoil, why = BAD[case]
    lm = lm_with()
    path = tmp_path / "the file"
    with lm.sequence(random_ids(1, 9)) as sequence:
        _ = sequence.logits
        sequence.save(path)
    spoil(path)
    with pytest.raises(CheckpointError, match=why) as raised:
        lm.restore(path)
    assert "the file" in str(raised.value)
    assert all_free(lm)


def test_a_file_larger_than_the_context_or_the_cache_is_refused_before_it_is_read(tmp_path: Path) -> None:
    lm = lm_with()
    sequence = lm.sequence(random_ids(1, 30))
    _ = sequence.logits
    sequence.save(tmp_path / "s")
    with pytest.raises(ContextOverflow, match="30 tokens, and the context holds 29"):
        lm_with(max_context=29).restore(tmp_path / "s")
    small = lm_with(num_pages=7)
    with pytest.raises(OutOfPages, match="needs 8 more pages"):
        small.restore(tmp_path / "s")
    assert all_free(small)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_changed_byte_is_refused_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    lm, path = lm_with(num_pages=8), tmp_path / "s"
    with lm.sequence(random_ids(1, 9)) as sequence:
        _ = sequence.logits
        sequence.save(path)
        expected = sequence.token_ids, sequence.logits
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        with lm.restore(path) as restored:
            assert restored.token_ids == expected[0]
            assert torch.equal(restored.logits, expected[1])
    except CheckpointError:
        assert all_free(lm)
