"""Token healing by brute force: every token of a vocabulary tried.

Nothing here knows where tokens' bytes or a model's logits come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

MAX_BACK = 4


def healed(ids: list[int], values: Sequence[bytes], logits_after: Callable[[list[int]], Tensor]) -> list[int]:
    """The prompt that should come of `ids`. values: the bytes of each token, b"" of one that is no text."""

    def may_come(left: list[int]) -> set[int]:
        text = b"".join(values[id_] for id_ in left)
        whole = [id_ for id_, value in enumerate(values) if value.startswith(text) and _is_text(value[len(text) :])]
        return {left[0], *whole} if all(values[id_] for id_ in left) else {left[0]}

    counts = range(MAX_BACK, 0, -1)
    count = next((n for n in counts if n < len(ids) and len(may_come(ids[-n:])) > 1), 0)
    kept, left = ids[: len(ids) - count], ids[len(ids) - count :]
    while left:
        candidates = may_come(left)
        logits = logits_after(kept).clone()
        logits[left[0]] += 1.0
        chosen = max(sorted(candidates), key=lambda id_: float(logits[id_]))
        kept, left = [*kept, chosen], left[1:] if chosen == left[0] else []
    return kept


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
