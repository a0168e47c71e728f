"""Stop strings over random tokens: generation ends at the token where transformers' StopStringCriteria ends it."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import StopStringCriteria

from handloom.decoding.stream_text import StreamText
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import tiny, wrap

BROKEN = "\ufffd"


def stops_at(tokenizer: Tokenizer, ids: list[int], stops: list[str], include: bool = True) -> tuple[int | None, str]:
    """(the index of the token that meets a stop string, the output's text); ids[0] is the prompt."""
    stream = StreamText(
        tokenizer, skip_special_tokens=False, stop_strings=stops, include_stop_text=include, prompt_ids=ids[:1]
    )
    text = ""
    for at, token in enumerate(ids[1:], 1):
        text += stream.push(token)
        if stream.stopped_by is not None:
            return at, text + stream.finish()
    return None, text + stream.finish()


def transformers_stops_at(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> int | None:
    criteria = StopStringCriteria(tokenizer.hf, stops)
    met = (at for at in range(1, len(ids)) if bool(criteria(torch.tensor([ids[: at + 1]]), None)))
    return next(met, None)


def parts_of(data: st.DataObject, text: str) -> list[str]:
    """Stop strings cut out of the text, overlapping as they fall, and one that may not be there."""
    at = st.integers(0, max(0, len(text) - 1))
    cut = st.tuples(at, st.integers(1, 6)).map(lambda part: text[part[0] : part[0] + part[1]])
    drawn = [*data.draw(st.lists(cut, max_size=3)), data.draw(st.text("ab ,1]🙂é", min_size=1, max_size=3))]
    return [stop for stop in drawn if stop and BROKEN not in stop]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tokens_of_bytes_broken_characters_among_them(data: st.DataObject) -> None:
    tokenizer = Tokenizer(wrap(tiny("byte_bpe")))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer.hf) - 1), min_size=2, max_size=14))
    stops = parts_of(data, tokenizer.decode(ids[1:], skip_special_tokens=False))
    assert stops_at(tokenizer, ids, stops)[0] == transformers_stops_at(tokenizer, ids, stops)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tokens_of_characters_and_characters_spelled_in_bytes(data: st.DataObject) -> None:
    tokenizer = Tokenizer(wrap(tiny("sentencepiece")))
    vocabulary = tokenizer.hf.get_vocab()
    whole = [[id_] for token, id_ in sorted(vocabulary.items()) if not token.startswith("<0x")]
    spelled = [[vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()] for character in "aé,日🙂]"]
    pieces = data.draw(st.lists(st.sampled_from(whole + spelled * 8), min_size=1, max_size=9))
    ids = [vocabulary["a"], *(id_ for piece in pieces for id_ in piece)]
    text = tokenizer.decode(ids[1:], skip_special_tokens=False)
    assert BROKEN not in text
    stops = parts_of(data, text)
    assert stops_at(tokenizer, ids, stops)[0] == transformers_stops_at(tokenizer, ids, stops)


def of_words(words: list[str]) -> Tokenizer:
    """A tokenizer whose tokens are these very texts."""
    backend = Backend(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token=words[0]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(wrap(backend))


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("tokens", "stops", "stopped_after", "shown", "cut"),
    [
        (["[", "1,", "1,2", "]"], ["1,2"], 2, "1,1,2", "1,"),
        (["[1", ",1,", "2]x", "y"], ["1,2]"], 2, ",1,2]x", ","),
        (["a", "b", "ab", "abc"], ["babc"], 3, "bababc", "ba"),
        (["x", "ab", "c", "d"], ["bcd", "c"], 2, "abc", "ab"),
        (["x", "ST", "OP", "!"], ["STOP", "TO"], 2, "STOP", "S"),
        (["x", "<|", "end", "|>"], ["<|end|>"], 3, "<|end|>", ""),
        (["x", "ST", "O", "X"], ["STOP"], None, "STOX", "STOX"),
    ],
)
def test_tokens_that_straddle_a_stop_string(tokens, stops, stopped_after, shown, cut, include):
    tokenizer = of_words([*dict.fromkeys(tokens)])
    ids = [tokens.index(token) for token in tokens]
    assert stops_at(tokenizer, ids, stops, include) == (stopped_after, shown if include else cut)


def test_setting_up_costs_nothing_however_large_the_vocabulary() -> None:
    tokenizer = of_words([f"t{id_}" for id_ in range(262144)])
    stops = ["</answer>", "\n\nUser:", "<|im_end|>", "[1,2]"]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        stops_at(tokenizer, [5], stops)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01
