"""A sequence: token ids, how many of them are computed, and the pages their K and V live in.

A token's position is its index. Its place in the cache is the same, less the evicted tokens before it.

Append, rewind and fork are page-table operations. A fork shares every page with its parent; whoever
writes to a shared page first takes a copy of it (copy-on-write). Sequences that begin alike find each other's full
pages through the pool's prefix index, if they look (`adopt_prefix`) and offer (`publish`).

This module does not know models, sampling or requests.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from handloom.cache.pages import PagePool, locked
from handloom.cache.spill import HostPages
from handloom.errors import InvalidParam, OutOfPages

PLACEHOLDER = -1


class Sequence:
    """Token ids [n] and their pages.

    Invariant: num_computed <= len(token_ids), and the page table covers at least the cached tokens, which are the
    computed ones less the evicted.

    Attributes:
        evicted: ranges (start, stop), in order, of computed tokens whose K and V were dropped. A token that is computed
            again (`forget`, `recompute_last`) is cached again.
        embeddings: [e, hidden_size] or None; they stand in for the first e tokens, whose ids are PLACEHOLDER.
        ahead: drafted ids that the next step tries after the last token. They are not part of the sequence, though
            their K and V may be written to its pages.
        spilled: the content of its pages in host memory, while others have the pages (`spill`); its tokens still count
            as computed.
        salt: only sequences with the same salt find each other's pages.
        private: its K and V are not what the model makes of the tokens (edited, or from a file), so nobody else may
            find its pages; nor those of a sequence with embeddings.
    """

    def __init__(self, pool: PagePool, token_ids: Iterable[int] = (), embeddings: Tensor | None = None) -> None:
        self.pool, self.lock = pool, pool.lock
        self.embeddings = embeddings
        self.token_ids: list[int] = [PLACEHOLDER] * self.num_embeddings + list(token_ids)
        self.num_computed = 0
        self.evicted = ()
        self.page_table: list[int] = []
        self.ahead: list[int] = []
        self.spilled: HostPages | None = None
        self.salt = ""
        self.private = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_embeddings(self) -> int:
        return 0 if self.embeddings is None else len(self.embeddings)

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def evicted(self) -> tuple[tuple[int, int], ...]:
        return self._evicted

    @evicted.setter
    def evicted(self, ranges: tuple[tuple[int, int], ...]) -> None:
        self._evicted, self.num_evicted = ranges, sum(stop - start for start, stop in ranges)

    @property
    def num_cached(self) -> int:
        """Tokens whose K and V are in the cache."""
        return self.num_computed - self.num_evicted

    @property
    def _shares(self) -> bool:
        return not self.private and self.embeddings is None

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    @property
    def room(self) -> int:
        """Tokens that its pages could hold after its last one."""
        return len(self.page_table) * self.pool.page_size + self.num_evicted - len(self.token_ids)

    def pages_missing(self, num_tokens: int) -> int:
        """Free pages needed before the sequence can hold num_tokens tokens and write those not computed yet."""
        wanted = -(-(num_tokens - self.num_evicted) // self.pool.page_size)
        return max(0, wanted - len(self.page_table)) + len(self._shared(wanted))

    def _shared(self, end: int) -> list[int]:
        """Indices below `end` in the page table of the pages to write to that another sequence holds too."""
        first, end = self.num_cached // self.pool.page_size, min(end, len(self.page_table))
        return [index for index in range(first, end) if self.pool.references(self.page_table[index]) > 1]

    def grow(self, num_tokens: int) -> None:
        """Own pages for num_tokens tokens, writable from num_computed on. Raises OutOfPages, changing nothing."""
        if not self._is_grown(num_tokens):
            self._grow(num_tokens)

    def _is_grown(self, num_tokens: int) -> bool:
        """Whether `grow` has nothing to do. No lock is needed: a page that nobody else holds or can find stays so."""
        pool, table, num_evicted = self.pool, self.page_table, self.num_evicted
        first = (self.num_computed - num_evicted) // pool.page_size
        end = -(-(num_tokens - num_evicted) // pool.page_size)
        return end <= len(table) and all(map(pool.is_own, table[first:end]))

    @locked
    def _grow(self, num_tokens: int) -> None:
        missing, free = self.pages_missing(num_tokens), self.pool.num_free
        if missing > free:
            raise OutOfPages(
                f"the sequence needs {missing} more pages of {self.pool.page_size} tokens for {num_tokens} tokens, and "
                f"{free} of {self.pool.num_pages} are free; free other sequences, or load the model with a larger "
                "kv_cache_tokens"
            )
        self.bring_back()
        num_slots = num_tokens - self.num_evicted
        self.own(self.num_cached, num_slots)
        while len(self.page_table) * self.pool.page_size < num_slots:
            self.page_table.append(self.pool.allocate())

    @locked
    def own(self, start: int, stop: int) -> None:
        """Make the pages of cached tokens start..stop (counted among the cached) safe to write to: shared pages are
        copied, and the prefix index forgets the others. Raises OutOfPages."""
        page_size = self.pool.page_size
        for index in range(start // page_size, min(-(-stop // page_size), len(self.page_table))):
            page = self.page_table[index]
            if self.pool.references(page) > 1:
                cached = min(page_size, max(0, self.num_cached - index * page_size))
                self.page_table[index] = self.pool.copy(page, cached)
                self.pool.release(page)
            else:
                self.pool.prefixes.discard(page)

    def slots(self, num_tokens: int) -> list[int]:
        """Flat cache slots (page * page_size + offset) of the next num_tokens pending tokens; grows as needed."""
        self.grow(self.num_computed + num_tokens)
        page_size, table, first = self.pool.page_size, self.page_table, self.num_computed - self.num_evicted
        return [table[at // page_size] * page_size + at % page_size for at in range(first, first + num_tokens)]

    def cached_slots(self, start: int, stop: int) -> Tensor:
        """Flat cache slots [stop - start] int64 of the cached tokens start..stop, counted among these."""
        page_size = self.pool.page_size
        at = torch.arange(start, stop, device=self.pool.device)
        table = torch.tensor(self.page_table, dtype=torch.int64, device=self.pool.device)
        return table[at // page_size] * page_size + at % page_size

    def rewind(self, num_tokens: int) -> None:
        """Forget the last num_tokens tokens and free the pages only they used. Raises InvalidParam."""
        if not 0 <= num_tokens <= len(self.token_ids) - self.num_embeddings:
            raise InvalidParam(
                f"cannot rewind {num_tokens} tokens: the sequence has {len(self.token_ids) - self.num_embeddings}"
            )
        if num_tokens:
            del self.token_ids[-num_tokens:]
        self.forget(min(self.num_computed, len(self.token_ids)))

    @locked
    def forget(self, num_computed: int) -> None:
        """Keep the K and V of the first num_computed tokens only; the others are pending again."""
        self._set_computed(num_computed)
        self._keep_pages(num_computed)

    def recompute_last(self) -> None:
        """Make the last token pending again, if there is one and it is not: its logits are wanted. Keeps the pages."""
        if self.num_computed >= len(self.token_ids) > 0:
            self._set_computed(len(self.token_ids) - 1)

    def _set_computed(self, num_computed: int) -> None:
        self.num_computed = num_computed
        if self.evicted:
            self.evicted = tuple(
                (start, min(stop, num_computed)) for start, stop in self.evicted if start < num_computed
            )

    def trim(self) -> None:
        """Give back the pages reserved past what the next step may write."""
        self._keep_pages(len(self.token_ids) + len(self.ahead))

    @locked
    def _keep_pages(self, num_tokens: int) -> None:
        while len(self.page_table) > -(-(num_tokens - self.num_evicted) // self.pool.page_size):
            self.pool.release(self.page_table.pop())
        if self.spilled is not None and not self.num_cached:
            self._drop_spilled()

    # Host memory ----------------------------------------------------------------------------------

    @property
    def num_spillable(self) -> int:
        """Pages that `spill` would copy."""
        return min(len(self.page_table), -(-self.num_cached // self.pool.page_size))

    @locked
    def spill(self) -> None:
        """Move what is cached to host memory, and give every page back."""
        if self.num_spillable:
            self.spilled = HostPages(self.pool, self.page_table[: self.num_spillable])
        while self.page_table:
            self.pool.release(self.page_table.pop())
        self.ahead = []

    @locked
    def bring_back(self) -> None:
        """Move what was spilled to pages of its own, bit for bit. Raises OutOfPages, changing nothing."""
        if self.spilled is None:
            return
        count = -(-self.num_cached // self.pool.page_size)
        if count > self.pool.num_free:
            raise OutOfPages(
                f"the sequence was moved to host memory, and to come back it needs {count} pages where "
                f"{self.pool.num_free} of {self.pool.num_pages} are free; free other sequences"
            )
        pages = [self.pool.allocate() for _ in range(count)]
        try:
            self.spilled.write(pages)
        except BaseException:
            for page in pages:
                self.pool.release(page)
            raise
        self.page_table = pages
        self._drop_spilled()

    def _drop_spilled(self) -> None:
        if self.spilled is not None:
            self.spilled.drop()
            self.spilled = None

    # Taking tokens out of the middle --------------------------------------------------------------

    def cached_before(self, at: int) -> int:
        """How many tokens before token `at` are in the cache; for a cached token, its place there."""
        return at - sum(min(stop, at) - start for start, stop in self.evicted if start < at)

    def evict(self, start: int, stop: int) -> None:
        """Take the K and V of computed tokens start..stop out of the cache; all tokens keep their ids and positions.

        Those that follow in the cache move up, and pages that nothing is left in are freed. Raises InvalidParam,
        OutOfPages where a page to write to is shared and none is free for a copy: then nothing is evicted.
        """
        self._close_gap(start, stop)
        ranges: list[tuple[int, int]] = []
        for first, end in sorted([*self.evicted, (start, stop)]):
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
            elif first < end:
                ranges.append((first, end))
        self.evicted = tuple(ranges)
        self._keep_pages(self.num_computed)

    def remove(self, start: int, stop: int) -> None:
        """Take computed tokens start..stop out of the sequence, with their K and V; those after them move up.

        Their positions are then lower, and their K are what they were. Raises as `evict`.
        """
        self._close_gap(start, stop)
        moved = stop - start
        ranges = [tuple(at if at <= start else max(start, at - moved) for at in pair) for pair in self.evicted]
        self.evicted = tuple((first, end) for first, end in ranges if first < end)
        del self.token_ids[start:stop]
        if self.embeddings is not None and start < self.num_embeddings:
            rest = torch.cat((self.embeddings[:start], self.embeddings[stop:]))
            self.embeddings = rest if len(rest) else None
        self.num_computed -= moved
        self._keep_pages(self.num_computed)

    def _close_gap(self, start: int, stop: int) -> None:
        """Move K and V of the cached tokens from `stop` on to where those from `start` on are, on pages of its own."""
        if not 0 <= start <= stop <= self.num_computed:
            raise InvalidParam(
                f"tokens {start} to {stop} are not in the cache: {self.num_computed} of {len(self)} tokens are computed"
            )
        if start == stop:
            return
        into, source, end = self.cached_before(start), self.cached_before(stop), self.num_cached
        if source < end:
            self.bring_back()
            self._move(source, end, into)
        self.private = True

    def _move(self, start: int, stop: int, into: int) -> None:
        """Copy cached tokens start..stop, counted among these, down to `into`, in every layer. Raises OutOfPages."""
        self.own(into, into + stop - start)
        slots = self.cached_slots(into, stop)
        for storage in self.pool.storages.values():
            flat = storage.flatten(2, 3)
            flat[:, :, slots[: stop - start]] = flat[:, :, slots[start - into :]]

    @locked
    def adopt_prefix(self) -> None:
        """Take over the known pages that hold its first tokens, where they are more than it has computed.

        The last token stays pending, since its logits are wanted.
        """
        if not self._shares:
            return
        page_size = self.pool.page_size
        pages = self.pool.prefixes.find(self.salt, self.token_ids, (len(self) - 1) // page_size)
        if len(pages) * page_size <= self.num_computed:
            return
        for page in pages:
            self.pool.share(page)
        self.forget(0)
        self.page_table, self.num_computed = pages, len(pages) * page_size

    def awaits(self, other: Sequence) -> bool:
        """Whether the page that `other` computes next, once full, is one that this sequence needs and can take over."""
        page_size = self.pool.page_size
        end = (other.num_computed // page_size + 1) * page_size
        if not self.num_computed < end < len(self) or end > len(other):
            return False
        if not (self._shares and other._shares and self.salt == other.salt):
            return False
        return self.token_ids[:end] == other.token_ids[:end]

    def publish(self) -> None:
        """Let others find its full computed pages. Where equal ones are known already, it goes on with those."""
        full = self.num_computed // self.pool.page_size
        if full and self._shares and self.page_table[full - 1] not in self.pool.prefixes:
            self._publish()

    @locked
    def _publish(self) -> None:
        table, known, page_size = self.page_table, self.pool.prefixes, self.pool.page_size
        first = full = self.num_computed // page_size
        while first and table[first - 1] not in known:
            first -= 1
        for index in range(first, full):
            own = table[index]
            tokens = self.token_ids[index * page_size : (index + 1) * page_size]
            table[index] = known.add(table[index - 1] if index else None, self.salt, tokens, own)
            if table[index] != own:
                self.pool.share(table[index])
                self.pool.release(own)

    @locked
    def fork(self) -> Sequence:
        """A copy that shares every computed page; K and V are copied only when one of the two writes to such a page."""
        child = Sequence(self.pool, self.token_ids[self.num_embeddings :], self.embeddings)
        child.num_computed, child.salt, child.private = self.num_computed, self.salt, self.private
        child.evicted = self.evicted
        child.spilled = None if self.spilled is None else self.spilled.share()
        child.page_table = self.page_table[: -(-self.num_cached // self.pool.page_size)]
        for page in child.page_table:
            self.pool.share(page)
        return child

    @locked
    def adopt(self, other: Sequence, num_tokens: int) -> None:
        """Share the pages of the first num_tokens tokens, which `other` begins with too and has computed, for its own.

        None of them may be evicted. Raises OutOfPages where they are in host memory and cannot come back.
        """
        other.bring_back()
        self.forget(0)
        self.page_table = other.page_table[: -(-num_tokens // self.pool.page_size)]
        for page in self.page_table:
            self.pool.share(page)
        self.num_computed = num_tokens

    def free(self) -> None:
        """Give every page back; the token ids stay, uncomputed. Freeing twice does nothing."""
        self.forget(0)
