"""Sequences over the page pool: whatever is appended, computed, forked, rewound and freed, in whatever order,
no page leaks or is shared by mistake, and every sequence reads back exactly its own past."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from handloom.cache.batch import Work, build_batch
from handloom.cache.sequence import PLACEHOLDER, Sequence
from handloom.errors import InvalidParam, OutOfPages
from paged import pool_of

NUM_PAGES, PAGE_SIZE = 9, 4


def compute(sequence: Sequence, num_tokens: int) -> None:
    """What a forward pass does: take slots for the next tokens and write K and V there, here made of the token's id."""
    first = sequence.num_computed
    slots = sequence.slots(num_tokens)
    for number, (k_pages, v_pages) in enumerate(sequence.pool.layers):
        for side, pages in enumerate((k_pages, v_pages)):
            flat = pages.view(-1, *pages.shape[2:])
            for slot, token_id in zip(slots, sequence.token_ids[first : first + num_tokens], strict=True):
                flat[slot] = 10 * token_id + 2 * number + side
    sequence.num_computed += num_tokens


def read_back(sequence: Sequence) -> None:
    """Every computed token's K and V are in the slot that its page table says, in every layer."""
    for number, (k_pages, v_pages) in enumerate(sequence.pool.layers):
        for side, pages in enumerate((k_pages, v_pages)):
            for at in range(sequence.num_computed):
                page, offset = sequence.page_table[at // PAGE_SIZE], at % PAGE_SIZE
                assert (pages[page, offset] == 10 * sequence.token_ids[at] + 2 * number + side).all()


class SequencesOverOnePool(RuleBasedStateMachine):
    """Every appended token has an id of its own, so a K that was overwritten by another past cannot look right."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(NUM_PAGES, PAGE_SIZE, shapes=((1, 2), (2, 1)))
        self.ids = itertools.count(1)
        self.alive: list[tuple[Sequence, list[int]]] = []

    def history(self, sequence: Sequence) -> list[int]:
        return next(tokens for held, tokens in self.alive if held is sequence)

    @rule(target=sequences, length=st.integers(0, 3 * PAGE_SIZE))
    def start(self, length: int) -> Sequence:
        tokens = list(itertools.islice(self.ids, length))
        sequence = Sequence(self.pool, tokens)
        self.alive.append((sequence, tokens))
        return sequence

    @rule(sequence=sequences, count=st.integers(1, 2 * PAGE_SIZE))
    def append(self, sequence: Sequence, count: int) -> None:
        for token_id in itertools.islice(self.ids, count):
            sequence.append(token_id)
            self.history(sequence).append(token_id)

    @rule(sequence=sequences, share=st.floats(0, 1))
    def compute_some(self, sequence: Sequence, share: float) -> None:
        count = round(share * sequence.num_pending)
        needed = sequence.pages_missing(sequence.num_computed + count)
        if self.refused(sequence, needed, lambda: sequence.slots(count)):
            return
        first = sequence.num_computed
        compute(sequence, count)
        for index in range(first // PAGE_SIZE, -(-(first + count) // PAGE_SIZE)):
            assert self.pool.references(sequence.page_table[index]) == 1, "wrote to a page that is shared"

    @rule(sequence=sequences, extra=st.integers(0, 4 * PAGE_SIZE))
    def grow(self, sequence: Sequence, extra: int) -> None:
        wanted = len(sequence) + extra
        if self.refused(sequence, sequence.pages_missing(wanted), lambda: sequence.grow(wanted)):
            return
        sequence.grow(wanted)
        assert len(sequence.page_table) * PAGE_SIZE >= wanted
        free = self.pool.num_free
        sequence.slots(sequence.num_pending)
        assert self.pool.num_free == free, "grown pages were not enough to write to"

    def refused(self, sequence: Sequence, needed: int, act: object) -> bool:
        """If there are too few pages, `act` must say so and leave everything as it was."""
        if needed <= self.pool.num_free:
            return False
        before = list(sequence.page_table), sequence.num_computed, list(sequence.token_ids), self.pool.num_free
        with pytest.raises(OutOfPages, match=f"{needed} more pages.*{self.pool.num_free} of {NUM_PAGES} are free"):
            act()  # type: ignore[operator]
        after = list(sequence.page_table), sequence.num_computed, list(sequence.token_ids), self.pool.num_free
        assert before == after
        return True

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        free = self.pool.num_free
        child = sequence.fork()
        assert self.pool.num_free == free, "a fork takes no page"
        self.alive.append((child, list(self.history(sequence))))
        return child

    @rule(sequence=sequences, share=st.floats(0, 1))
    def rewind(self, sequence: Sequence, share: float) -> None:
        count = round(share * len(sequence))
        sequence.rewind(count)
        if count:
            del self.history(sequence)[-count:]
        assert len(sequence.page_table) <= -(-len(sequence) // PAGE_SIZE)

    @rule(sequence=sequences, share=st.floats(0, 1))
    def forget(self, sequence: Sequence, share: float) -> None:
        sequence.forget(round(share * sequence.num_computed))

    @rule(sequence=sequences)
    def free(self, sequence: Sequence) -> None:
        sequence.free()
        sequence.free()
        assert (sequence.page_table, sequence.num_computed) == ([], 0)

    @rule(sequence=consumes(sequences))
    def drop(self, sequence: Sequence) -> None:
        sequence.free()
        self.alive = [entry for entry in self.alive if entry[0] is not sequence]

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = [page for sequence, _ in self.alive for page in sequence.page_table]
        assert all(self.pool.references(page) == held.count(page) for page in range(NUM_PAGES))
        assert self.pool.num_free == NUM_PAGES - len(set(held))
        for sequence, _ in self.alive:
            assert len(set(sequence.page_table)) == len(sequence.page_table)
            assert 0 <= sequence.num_computed <= min(len(sequence), len(sequence.page_table) * PAGE_SIZE)

    @invariant()
    def every_sequence_reads_its_own_past(self) -> None:
        for sequence, tokens in self.alive:
            assert sequence.token_ids == tokens
            read_back(sequence)

    def teardown(self) -> None:
        for sequence, _ in self.alive:
            sequence.free()
        assert self.pool.num_free == NUM_PAGES


TestSequencesOverOnePool = SequencesOverOnePool.TestCase
TestSequencesOverOnePool.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)


def test_a_fork_copies_one_page_when_it_writes_and_the_parent_keeps_its_own() -> None:
    pool = pool_of(NUM_PAGES, PAGE_SIZE)
    parent = Sequence(pool, range(10))
    compute(parent, 10)
    child = parent.fork()
    assert child.page_table == parent.page_table
    child.append(77)
    compute(child, 1)
    assert child.page_table[:2] == parent.page_table[:2]
    assert child.page_table[2] != parent.page_table[2]
    parent.append(88)
    compute(parent, 1)
    read_back(parent)
    read_back(child)


def test_a_fork_does_not_share_pages_that_are_only_reserved() -> None:
    """A running request reserves all the pages it may need; a fork in the middle must leave them its own."""
    pool = pool_of(NUM_PAGES, PAGE_SIZE)
    parent = Sequence(pool, range(5))
    parent.grow(5 * PAGE_SIZE)
    compute(parent, 5)
    child = parent.fork()
    assert len(child.page_table) == 2
    assert parent.pages_missing(5 * PAGE_SIZE) == 1


def test_growing_looks_only_at_the_pages_it_writes_to() -> None:
    pool = pool_of(NUM_PAGES, PAGE_SIZE)
    parent = Sequence(pool, range(12))
    compute(parent, 12)
    child = parent.fork()
    child.num_computed = 0  # as if all of it were to run again, in chunks
    assert [child.pages_missing(n) for n in (0, 4, 5, 12, 13)] == [0, 1, 2, 3, 4]


def test_what_cannot_be_rewound_is_refused_with_the_numbers() -> None:
    sequence = Sequence(pool_of(NUM_PAGES, PAGE_SIZE), range(3), torch.zeros(2, 8))
    for count in (-1, 4):
        with pytest.raises(InvalidParam, match=f"cannot rewind {count} tokens: the sequence has 3"):
            sequence.rewind(count)
    assert len(sequence) == 5
    sequence.rewind(3)
    assert sequence.token_ids == [PLACEHOLDER] * 2


def test_a_batch_lays_works_end_to_end() -> None:
    """Two prompts, one of them in its second chunk, and a decode token; page tables padded with 0."""
    pool = pool_of(NUM_PAGES, PAGE_SIZE)
    fresh, chunked, decoding = Sequence(pool, [5, 6, 7]), Sequence(pool, range(20, 30)), Sequence(pool, range(9))
    compute(chunked, 2)
    compute(decoding, 8)
    batch = build_batch([Work(fresh, 3, "all"), Work(chunked, 7, "none"), Work(decoding, 1, "last")], pool).on(
        pool.device
    )
    assert batch.input_ids.tolist() == [5, 6, 7, *range(22, 29), 8]
    assert batch.positions.tolist() == [0, 1, 2, *range(2, 9), 8]
    assert batch.cu_seqlens.tolist() == [0, 3, 10, 11]
    assert batch.context_lens.tolist() == [3, 9, 9]
    assert batch.logits_rows.tolist() == [0, 1, 2, 10]
    tables = [fresh.page_table, chunked.page_table, decoding.page_table]
    assert batch.page_table.tolist() == [table + [0] * (3 - len(table)) for table in tables]
    firsts, counts = (0, 2, 8), (3, 7, 1)
    expected = [
        table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        for table, first, count in zip(tables, firsts, counts, strict=True)
        for at in range(first, first + count)
    ]
    assert batch.slot_mapping.tolist() == expected
    assert batch.embeddings is None


def test_embedded_rows_are_named_and_their_ids_are_harmless() -> None:
    pool = pool_of(NUM_PAGES, PAGE_SIZE)
    values = torch.arange(24.0).view(3, 8)
    embedded, plain = Sequence(pool, [9], values), Sequence(pool, [4, 5])
    compute(embedded, 1)
    batch = build_batch([Work(plain, 2, "last"), Work(embedded, 3, "last")], pool).on(pool.device)
    assert batch.input_ids.tolist() == [4, 5, 0, 0, 9]
    assert batch.embeddings is not None
    assert batch.embeddings.rows.tolist() == [2, 3]
    assert torch.equal(batch.embeddings.values, values[1:])
