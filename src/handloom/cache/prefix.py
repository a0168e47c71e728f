"""Which page holds which tokens: an index of full pages, so that what begins alike is computed once.

A page is known by the tokens in it and by the page before it, all the way back to the first, whose predecessor is a
salt: two sequences share pages only where all their tokens up to there are equal, compared one by one, and their salts
are. So a hit changes no token (a page's K and V depend on nothing else), and a hash that collides costs
time, never a wrong page. Keys are bytes, which Python hashes with a secret of the process: nobody can
make them collide on purpose.

The index holds no references. The pool keeps indexed pages that no sequence holds until it needs their room.
This is the radix tree of SGLang (Zheng et al. 2024) over pages of fixed size, each entry naming its parent.

This module does not know who computes pages, who holds them, or when they are given up.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

Parent = int | str
Key = tuple[Parent, bytes]


class PrefixIndex:
    """Full pages by their tokens and all tokens before them. One page stands for one run of tokens."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._names = itertools.count()  # a page's name as a parent: never used again, unlike its number
        self._entries: dict[Key, tuple[int, int]] = {}  # key -> page, its name
        self._keys: dict[int, tuple[Key, int]] = {}  # page -> its key, its name

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    def find(self, salt: str, token_ids: Sequence[int], num_pages: int) -> list[int]:
        """Pages that hold the first tokens, as many as are known, num_pages at most."""
        pages: list[int] = []
        parent: Parent = salt
        for end in range(self.page_size, num_pages * self.page_size + 1, self.page_size):
            found = self._entries.get((parent, _bytes(token_ids[end - self.page_size : end])))
            if found is None:
                break
            page, parent = found
            pages.append(page)
        return pages

    def add(self, parent: int | None, salt: str, token_ids: Sequence[int], page: int) -> int:
        """Enter a page that holds these page_size tokens and follows the page `parent` (None: it is the first).

        Returns the page that stands for them: this one, or one that was entered before.
        """
        key: Key = (salt if parent is None else self._keys[parent][1], _bytes(token_ids))
        known = self._entries.get(key)
        if known is not None:
            return known[0]
        name = next(self._names)
        self._entries[key] = page, name
        self._keys[page] = key, name
        return page

    def discard(self, page: int) -> None:
        """Forget a page, if it is known: its content is about to change. What follows it is not found any more."""
        entry = self._keys.pop(page, None)
        if entry is not None:
            del self._entries[entry[0]]

    def clear(self) -> None:
        self._entries.clear()
        self._keys.clear()


def _bytes(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()
