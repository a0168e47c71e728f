"""A sequence: token ids, how many of them are computed, and the pages their K and V live in.

Append, rewind and fork are page-table operations. A fork shares every page with its parent; whoever
writes to a shared page first takes a copy of it (copy-on-write).

This module does not know models, sampling or requests.
"""

from __future__ import annotations

from collections.abc import Iterable

from handloom.cache.pages import PagePool
from handloom.errors import InvalidParam


class Sequence:
    """Invariant: num_computed <= len(token_ids), and the pages cover exactly the computed tokens or more."""

    def __init__(self, pool: PagePool, token_ids: Iterable[int] = ()) -> None:
        self.pool = pool
        self.token_ids: list[int] = list(token_ids)
        self.num_computed = 0
        self.page_table: list[int] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def reserve(self, num_tokens: int) -> list[int]:
        """Make the slots of the next num_tokens pending tokens writable and return them.

        Allocates pages and copies a shared last page. Raises OutOfPages, leaving the sequence usable.
        Returns flat slots, page * page_size + offset, one per token.
        """
        page_size = self.pool.page_size
        first, end = self.num_computed, self.num_computed + num_tokens
        if first % page_size and num_tokens:
            self._own_page(first // page_size, first % page_size)
        for index in range(-(-first // page_size), min(len(self.page_table), -(-end // page_size))):
            self._own_page(index, 0)
        while len(self.page_table) * page_size < end:
            self.page_table.append(self.pool.allocate())
        return [self.page_table[at // page_size] * page_size + at % page_size for at in range(first, end)]

    def _own_page(self, index: int, num_tokens: int) -> None:
        page = self.page_table[index]
        if self.pool.references(page) > 1:
            self.page_table[index] = self.pool.copy(page, num_tokens)
            self.pool.release(page)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last num_tokens tokens and free the pages only they used. Raises InvalidParam."""
        if not 0 <= num_tokens <= len(self.token_ids):
            raise InvalidParam(f"cannot rewind {num_tokens} tokens: the sequence has {len(self.token_ids)}")
        if num_tokens:
            del self.token_ids[-num_tokens:]
        self.num_computed = min(self.num_computed, len(self.token_ids))
        while len(self.page_table) > -(-self.num_computed // self.pool.page_size):
            self.pool.release(self.page_table.pop())

    def fork(self) -> Sequence:
        """A copy that shares every page; costs no K/V copy until one of the two writes to a shared page."""
        child = Sequence(self.pool, self.token_ids)
        child.num_computed = self.num_computed
        child.page_table = list(self.page_table)
        for page in child.page_table:
            self.pool.share(page)
        return child

    def free(self) -> None:
        """Give every page back; the token ids stay, uncomputed. Freeing twice does nothing."""
        while self.page_table:
            self.pool.release(self.page_table.pop())
        self.num_computed = 0
