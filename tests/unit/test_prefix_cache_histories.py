"""The prefix cache after any history: every page accounted for, every sequence reads its own past."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from handloom.cache.prefix import PrefixIndex
from handloom.cache.sequence import Sequence
from handloom.errors import OutOfPages
from paged import pool_of

PAGE_SIZE = 4
NUM_PAGES = 12


class SequencesThatBeginAlike(RuleBasedStateMachine):
    """Tokens are 1 or 2, so prefixes meet all the time; a token's K and V are made of all tokens up to it and of the
    salt, so that a page of another past, or of another salt, cannot look right."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(NUM_PAGES, PAGE_SIZE, shapes=((1, 1),))
        self.alive: list[Sequence] = []
        self.hits = 0

    def value(self, sequence: Sequence, at: int) -> float:
        return float(hash((sequence.salt, tuple(sequence.token_ids[: at + 1]))) % 2**50)

    @rule(target=sequences, tokens=st.lists(st.integers(1, 2), max_size=14), salt=st.sampled_from(("", "", "x")))
    def start(self, tokens: list[int], salt: str) -> Sequence:
        sequence = Sequence(self.pool, tokens)
        sequence.salt = salt
        self.alive.append(sequence)
        return sequence

    @rule(sequence=sequences)
    def look(self, sequence: Sequence) -> None:
        before = sequence.num_computed
        sequence.adopt_prefix()
        assert sequence.num_computed >= before
        assert sequence.num_computed == before or sequence.num_pending > 0

    @rule(sequence=sequences, share=st.floats(0, 1), offer=st.booleans())
    def compute(self, sequence: Sequence, share: float, offer: bool) -> None:
        count = round(share * sequence.num_pending)
        first = sequence.num_computed
        try:
            slots = sequence.slots(count)
        except OutOfPages:
            assert sequence.pages_missing(first + count) > self.pool.num_free
            return
        k_pages, v_pages = self.pool.layers[0]
        for at, slot in enumerate(slots, start=first):
            assert slot // PAGE_SIZE not in self.pool.prefixes, "wrote to a page that others may find"
            k_pages.view(-1)[slot] = v_pages.view(-1)[slot] = self.value(sequence, at)
        sequence.num_computed += count
        if offer:
            sequence.publish()

    @rule(sequence=sequences, tokens=st.lists(st.integers(1, 2), min_size=1, max_size=6))
    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        sequence.token_ids += tokens

    @rule(sequence=sequences, share=st.floats(0, 1))
    def rewind(self, sequence: Sequence, share: float) -> None:
        sequence.rewind(round(share * len(sequence)))

    @rule(sequence=sequences, share=st.floats(0, 1))
    def forget(self, sequence: Sequence, share: float) -> None:
        sequence.forget(round(share * sequence.num_computed))

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        self.alive.append(sequence.fork())
        return self.alive[-1]

    @rule(sequence=consumes(sequences))
    def drop(self, sequence: Sequence) -> None:
        sequence.free()
        self.alive = [other for other in self.alive if other is not sequence]

    @rule()
    def forget_cached(self) -> None:
        self.pool.forget_cached()
        assert self.pool.num_cached == 0

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = [page for sequence in self.alive for page in sequence.page_table]
        assert all(self.pool.references(page) == held.count(page) for page in range(NUM_PAGES))
        assert self.pool.num_free == NUM_PAGES - len(set(held))
        assert self.pool.num_empty == self.pool.num_free - self.pool.num_cached >= 0
        known = {page for page in range(NUM_PAGES) if page in self.pool.prefixes}
        assert len(known - set(held)) == self.pool.num_cached

    @invariant()
    def every_sequence_reads_its_own_past(self) -> None:
        for sequence in self.alive:
            for at in range(sequence.num_computed):
                page, offset = sequence.page_table[at // PAGE_SIZE], at % PAGE_SIZE
                for pages in self.pool.layers[0]:
                    assert pages[page, offset] == self.value(sequence, at)

    def teardown(self) -> None:
        for sequence in self.alive:
            sequence.free()
        assert self.pool.num_free == NUM_PAGES


TestSequencesThatBeginAlike = SequencesThatBeginAlike.TestCase
TestSequencesThatBeginAlike.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)


def test_an_entry_that_follows_one_that_is_gone_is_not_found_even_when_its_page_number_comes_again() -> None:
    index = PrefixIndex(2)
    assert index.add(None, "", [1, 2], 7) == 7
    assert index.add(7, "", [3, 4], 8) == 8
    assert index.find("", [1, 2, 3, 4], 2) == [7, 8]
    assert index.find("", [1, 2, 3, 4], 1) == [7]
    index.discard(7)
    assert index.add(None, "", [5, 6], 7) == 7
    assert index.find("", [5, 6, 3, 4], 2) == [7]
    assert index.find("", [1, 2, 3, 4], 2) == []
    index.discard(7)
    index.discard(7)
    assert (len(index), 8 in index, 7 in index) == (1, True, False)
