"""A sequence: token ids, how many of them are computed, and the pages their K and V live in.

Append, rewind and fork are page-table operations. A fork shares every page with its parent; whoever
writes to a shared page first takes a copy of it (copy-on-write).

This module does not know models, sampling or requests.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from handloom.cache.pages import PagePool
from handloom.errors import InvalidParam, OutOfPages

PLACEHOLDER = -1


class Sequence:
    """Token ids [n] and their pages.

    Invariant: num_computed <= len(token_ids), and the page table covers at least the computed tokens.
    `embeddings` [e, hidden_size], if given, stand in for the first e tokens, whose ids are PLACEHOLDER.
    """

    def __init__(self, pool: PagePool, token_ids: Iterable[int] = (), embeddings: Tensor | None = None) -> None:
        self.pool = pool
        self.embeddings = embeddings
        self.token_ids: list[int] = [PLACEHOLDER] * self.num_embeddings + list(token_ids)
        self.num_computed = 0
        self.page_table: list[int] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_embeddings(self) -> int:
        return 0 if self.embeddings is None else len(self.embeddings)

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def pages_missing(self, num_tokens: int) -> int:
        """Free pages needed before the sequence can hold num_tokens tokens and write those not computed yet."""
        wanted = -(-num_tokens // self.pool.page_size)
        return max(0, wanted - len(self.page_table)) + len(self._shared(wanted))

    def _shared(self, end: int) -> list[int]:
        """Indices below `end` in the page table of the pages to write to that another sequence holds too."""
        first, end = self.num_computed // self.pool.page_size, min(end, len(self.page_table))
        return [index for index in range(first, end) if self.pool.references(self.page_table[index]) > 1]

    def grow(self, num_tokens: int) -> None:
        """Own pages for num_tokens tokens, writable from num_computed on. Raises OutOfPages, changing nothing."""
        missing, free = self.pages_missing(num_tokens), self.pool.num_free
        if not missing:
            return
        if missing > free:
            raise OutOfPages(
                f"the sequence needs {missing} more pages of {self.pool.page_size} tokens for {num_tokens} tokens, and "
                f"{free} of {self.pool.num_pages} are free; free other sequences, or load the model with a larger "
                "kv_cache_tokens"
            )
        page_size = self.pool.page_size
        for index in self._shared(-(-num_tokens // page_size)):
            page = self.page_table[index]
            self.page_table[index] = self.pool.copy(page, max(0, self.num_computed - index * page_size))
            self.pool.release(page)
        while len(self.page_table) * page_size < num_tokens:
            self.page_table.append(self.pool.allocate())

    def slots(self, num_tokens: int) -> list[int]:
        """Flat cache slots (page * page_size + offset) of the next num_tokens pending tokens; grows as needed."""
        page_size, first = self.pool.page_size, self.num_computed
        self.grow(first + num_tokens)
        return [
            self.page_table[at // page_size] * page_size + at % page_size for at in range(first, first + num_tokens)
        ]

    def rewind(self, num_tokens: int) -> None:
        """Forget the last num_tokens tokens and free the pages only they used. Raises InvalidParam."""
        if not 0 <= num_tokens <= len(self.token_ids) - self.num_embeddings:
            raise InvalidParam(
                f"cannot rewind {num_tokens} tokens: the sequence has {len(self.token_ids) - self.num_embeddings}"
            )
        if num_tokens:
            del self.token_ids[-num_tokens:]
        self.forget(min(self.num_computed, len(self.token_ids)))

    def forget(self, num_computed: int) -> None:
        """Keep the K and V of the first num_computed tokens only; the others are pending again."""
        self.num_computed = num_computed
        self._keep_pages(num_computed)

    def trim(self) -> None:
        """Give back the pages past the last token, which were taken ahead."""
        self._keep_pages(len(self.token_ids))

    def _keep_pages(self, num_tokens: int) -> None:
        while len(self.page_table) > -(-num_tokens // self.pool.page_size):
            self.pool.release(self.page_table.pop())

    def fork(self) -> Sequence:
        """A copy that shares every computed page; K and V are copied only when one of the two writes to such a page."""
        child = Sequence(self.pool, self.token_ids[self.num_embeddings :], self.embeddings)
        child.num_computed = self.num_computed
        child.page_table = self.page_table[: -(-self.num_computed // self.pool.page_size)]
        for page in child.page_table:
            self.pool.share(page)
        return child

    def free(self) -> None:
        """Give every page back; the token ids stay, uncomputed. Freeing twice does nothing."""
        self.forget(0)
