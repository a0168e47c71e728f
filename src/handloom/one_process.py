"""What lives in one process, and says so to whoever would pickle or copy it.

This module does not know what that is.
"""

from __future__ import annotations

from typing import Never

from handloom.errors import EngineError


class OneProcess:
    """Holds memory, locks or threads of its process. instead: what to do rather than pickle or copy it."""

    __slots__ = ()
    _instead: str

    def __init_subclass__(cls, instead: str | None = None) -> None:
        if instead is not None:
            cls._instead = instead

    def __reduce_ex__(self, protocol: object) -> Never:
        raise EngineError(f"{type(self).__name__} can be neither pickled nor copied; {self._instead}")
