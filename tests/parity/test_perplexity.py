"""Perplexity in windows: every token scored once, with what transformers says of it; the bundled text is there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handloom.errors import InvalidParam, InvalidPrompt
from handloom.lm import LM
from handloom.measure.perplexity import BUNDLED, agreement, perplexity, windows
from parity_checks import Pair

TEXT = "The loom was invented to weave threads into cloth. " * 12


@given(count=st.integers(2, 300), width=st.integers(2, 64))
def test_every_token_but_the_first_is_scored_once_with_half_a_window_before_it(count: int, width: int) -> None:
    pieces = windows(range(count), width)
    scored = [token for ids, last in pieces for token in ids[len(ids) - last :]]
    assert scored == list(range(1, count))
    assert all(len(ids) <= width for ids, _ in pieces)
    assert all(len(ids) - last >= width // 2 for ids, last in pieces[1:])


@pytest.mark.parametrize("window", [16, 33, 256])
def test_the_value_is_that_of_transformers_on_the_same_windows(tiny_pair: Callable[..., Pair], window: int) -> None:
    pair = tiny_pair("llama")
    lm = pair.lm()
    ids = lm.tokenizer.encode(TEXT)
    losses, top = [], []
    for piece, last in windows(ids, window):
        logits = pair.hf(torch.tensor([list(piece)])).logits[0, :-1].detach()
        targets = torch.tensor(list(piece[1:]))
        losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none")[-last:].tolist()
        top += logits.argmax(-1)[-last:].tolist()
    found = perplexity(lm, TEXT, window=window)
    assert found.tokens == len(ids) - 1
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.top == top
    assert agreement(found, found) == 1.0


def test_what_cannot_be_scored_is_an_error(tiny_pair: Callable[..., Pair]) -> None:
    lm = tiny_pair("llama").lm()
    with pytest.raises(InvalidPrompt, match="has 0 tokens; a score needs two"):
        perplexity(lm, "", window=64)
    with pytest.raises(InvalidParam, match="window is 257; expected 2 to 256"):
        perplexity(lm, TEXT, window=257)
    with pytest.raises(InvalidPrompt, match="no tokenizer"):
        perplexity(LM(lm.transformer, None, lm.pool, name=lm.name), TEXT)


def test_a_text_is_bundled() -> None:
    text = BUNDLED.read_text(encoding="utf-8")
    assert text.startswith("The study of mathematics is apt to commence in disappointment.")
    assert len(text.split()) > 4000
