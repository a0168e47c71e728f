"""What tokenizer libraries raise, as errors of ours.

This module does not know tokenizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from handloom.errors import HandloomError


@contextlib.contextmanager
def typed_errors(kind: type[HandloomError], what: str) -> Iterator[None]:
    """Raise `kind`, cause attached, for whatever a tokenizer library raises on data it was not made for.

    A panic of Rust code derives from BaseException alone, in a class of each library's own: it is known by its name.
    """
    try:
        yield
    except HandloomError:
        raise
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {error}") from error
