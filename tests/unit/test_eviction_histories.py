"""Sequences with gaps after any history: each reads its own past, and every page is accounted for."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from handloom.cache.sequence import Sequence
from handloom.errors import OutOfPages
from paged import pool_of

NUM_PAGES, PAGE_SIZE = 12, 4


class GappedSequences(RuleBasedStateMachine):
    """Every token has an id of its own, which its K and V are made of: `kept` is what must be read back, in order."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(NUM_PAGES, PAGE_SIZE, shapes=((1, 2), (2, 1)))
        self.ids = itertools.count(1)
        self.alive: list[Sequence] = []

    @rule(target=sequences, length=st.integers(1, 3 * PAGE_SIZE))
    def start(self, length: int) -> Sequence:
        sequence = Sequence(self.pool, itertools.islice(self.ids, length))
        self.alive.append(sequence)
        return sequence

    @rule(sequence=sequences, count=st.integers(0, 6))
    def append_and_compute(self, sequence: Sequence, count: int) -> None:
        sequence.token_ids += itertools.islice(self.ids, count)
        sequence.recompute_last()
        first = sequence.num_computed
        try:
            slots = sequence.slots(sequence.num_pending)
        except OutOfPages:
            assert sequence.pages_missing(len(sequence)) > self.pool.num_free
            return
        for pages in itertools.chain(*self.pool.layers):
            for slot, token_id in zip(slots, sequence.token_ids[first:], strict=True):
                pages.view(-1, *pages.shape[2:])[slot] = token_id
        sequence.num_computed = len(sequence)

    @rule(sequence=sequences, ends=st.tuples(st.floats(0, 1), st.floats(0, 1)), remove=st.booleans())
    def take_out(self, sequence: Sequence, ends: tuple[float, float], remove: bool) -> None:
        start, stop = sorted(round(end * sequence.num_computed) for end in ends)
        tokens, cached = list(sequence.token_ids), sequence.num_cached
        expected = [at for at in range(sequence.num_computed) if not start <= at < stop and not self.gone(sequence, at)]
        try:
            (sequence.remove if remove else sequence.evict)(start, stop)
        except OutOfPages:
            assert (sequence.token_ids, sequence.num_cached) == (tokens, cached)
            return
        assert sequence.num_cached == len(expected)
        assert sequence.token_ids == (tokens[:start] + tokens[stop:] if remove else tokens)
        left = [sequence.token_ids[at] for at in range(sequence.num_computed) if not self.gone(sequence, at)]
        assert left == [tokens[at] for at in expected]

    @rule(sequence=sequences, share=st.floats(0, 1))
    def rewind(self, sequence: Sequence, share: float) -> None:
        sequence.rewind(round(share * max(len(sequence) - 1, 0)))

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        self.alive.append(sequence.fork())
        return self.alive[-1]

    @rule(sequence=consumes(sequences))
    def drop(self, sequence: Sequence) -> None:
        sequence.free()
        self.alive = [other for other in self.alive if other is not sequence]

    def gone(self, sequence: Sequence, at: int) -> bool:
        return any(start <= at < stop for start, stop in sequence.evicted)

    @invariant()
    def every_sequence_reads_what_it_kept(self) -> None:
        for sequence in self.alive:
            kept = [sequence.token_ids[at] for at in range(sequence.num_computed) if not self.gone(sequence, at)]
            assert len(kept) == sequence.num_cached
            for at, token_id in enumerate(kept):
                for pages in itertools.chain(*self.pool.layers):
                    assert (pages[sequence.page_table[at // PAGE_SIZE], at % PAGE_SIZE] == token_id).all()

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = [page for sequence in self.alive for page in sequence.page_table]
        assert all(self.pool.references(page) == held.count(page) for page in range(NUM_PAGES))
        assert self.pool.num_free == NUM_PAGES - len(set(held))

    def teardown(self) -> None:
        for sequence in self.alive:
            sequence.free()
        assert self.pool.num_free == NUM_PAGES


TestGappedSequences = GappedSequences.TestCase
TestGappedSequences.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
