"""What a search with beams tells while it runs costs about as much for each token, however long the output."""

from __future__ import annotations

from typing import Any

import pytest

from engines import lm_with
from handloom.decoding import beams
from tiny_models import random_ids

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "never early": {"early_stopping": "never", "length_penalty": 1.5},
    "groups": {"num_beam_groups": 2, "diversity_penalty": 0.3},
    "forced": {"force_words_ids": [[30, 31]]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_links_looked_at_grow_with_the_length_and_not_faster(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    walked, after = 0, beams.after

    def count(last: Any, told: int) -> Any:
        nonlocal walked
        found = after(last, told)
        walked += len(found)
        return found

    monkeypatch.setattr(beams, "after", count)
    per_token, prompt = [], random_ids(6, 10)
    for length in (60, 180):
        walked = 0
        lm_with(2000).generate(prompt, num_beams=4, max_new_tokens=length, min_new_tokens=length, **OPTIONS[name])
        per_token.append(walked / length)
    assert per_token[1] < 1.5 * per_token[0] + 4
