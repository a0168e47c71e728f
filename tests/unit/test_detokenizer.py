"""Streamed text is the decoded text, with no broken character and none later than certain."""

from __future__ import annotations

import time
from itertools import product

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from handloom.errors import InvalidPrompt, TokenizerError
from handloom.text.decoder_stages import BYTE_OF, CLEAN_UP
from handloom.text.detokenizer import Detokenizer
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import BUILDERS, SETTINGS, STRINGS, tiny, wrap


def make(name: str, **settings: object) -> Tokenizer:
    return Tokenizer(wrap(tiny(name), **{**SETTINGS[name], **settings}))


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special_tokens)
    return [*(stream.push(index) for index in ids), stream.flush()]


def common_start(texts: list[str]) -> str:
    """What all the texts begin with."""
    low, high = min(texts), max(texts)
    return low[: next((at for at, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))]


def of_tokens(tokens: list[str], decoder: object) -> Tokenizer:
    """A tokenizer whose ids are the places of `tokens`."""
    backend = Backend(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.decoder = decoder
    return Tokenizer(wrap(backend))


# The same text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_joined_pieces_are_the_decoded_text(name: str, skip: bool) -> None:
    tokenizer = make(name)
    for text in STRINGS:
        ids = tokenizer.encode(text)
        out = pieces(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(out) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(out) == tokenizer.hf.decode(ids, skip_special_tokens=skip)


def test_push_many_is_push_after_push() -> None:
    tokenizer = make("byte_bpe")
    ids = tokenizer.encode(STRINGS[-5])
    one, many = Detokenizer(tokenizer), Detokenizer(tokenizer)
    assert many.push_many(ids) == "".join(one.push(index) for index in ids)
    assert many.flush() == one.flush()


def test_special_tokens_are_skipped_and_added_ones_are_verbatim() -> None:
    tokenizer = make("byte_bpe")
    text = "<|im_start|>user\n<think>two words日本éé<|im_end|>"
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids)).startswith("user\n<think>two words日本")
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)).endswith("<|im_end|>")


def test_a_skipped_special_token_does_not_cut_a_character() -> None:
    tokenizer = make("byte_bpe")
    euro = [
        tokenizer.hf.convert_tokens_to_ids(character) for character in BYTE_OF if BYTE_OF[character] in b"\xe2\x82\xac"
    ]
    special = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    by_byte = {BYTE_OF[tokenizer.hf.convert_ids_to_tokens(index)]: index for index in euro}
    ids = [by_byte[0xE2], special, by_byte[0x82], special, by_byte[0xAC]]
    assert pieces(tokenizer, ids) == ["", "", "", "", "€", ""] == [*[""] * 4, tokenizer.decode(ids), ""]


def test_ids_without_a_token_have_no_text() -> None:
    tokenizer = make("byte_bpe")
    stream = Detokenizer(tokenizer)
    assert [stream.push(index) for index in (tokenizer.vocab_size, 2**31, 2**32 - 1)] == ["", "", ""]
    assert stream.push(tokenizer.encode("a")[0]) == "a" == tokenizer.hf.decode([2**32 - 1, *tokenizer.encode("a")])
    for index in (-1, 2**32, -(2**70)):
        with pytest.raises(InvalidPrompt, match="outside"):
            stream.push(index)


# Neither broken nor late -------------------------------------------------------------------------


REPRESENTATIVE = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEF]
REPRESENTATIVE += [0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]  # a byte of every class that UTF-8 tells apart


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """Byte-level, one token for each byte, in order."""
    spelled = {byte: character for character, byte in BYTE_OF.items()}
    return of_tokens([spelled[byte] for byte in range(256)], decoders.ByteLevel())


def test_replacement_characters_are_as_many_as_in_rust(bytewise: Tokenizer) -> None:
    for length in (1, 2, 3):
        for ids in product(REPRESENTATIVE, repeat=length):
            assert "".join(pieces(bytewise, list(ids))) == bytewise.hf.decode(list(ids))


def test_byte_level_text_is_out_as_soon_as_it_is_certain(bytewise: Tokenizer) -> None:
    after = [(), *((byte,) for byte in (0x00, 0x80, 0x90, 0xA0, 0xBF, 0xF4))]
    after += [(byte, 0xBF) for byte in (0x80, 0x90, 0xA0)] + [(byte, 0xBF, 0x80) for byte in (0x80, 0x90, 0xA0)]
    for length in (1, 2, 3):
        for ids in product(REPRESENTATIVE, repeat=length):
            certain = common_start([bytewise.hf.decode([*ids, *more]) for more in after])
            assert "".join(pieces(bytewise, list(ids))[:-1]) == certain


@pytest.mark.parametrize("name", [name for name in BUILDERS if "byte" not in name])
@pytest.mark.parametrize("clean_up", [False, True])
def test_text_is_out_as_soon_as_no_later_token_can_change_it(name: str, clean_up: bool) -> None:
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    tokenizer = make(name, clean_up_tokenization_spaces=clean_up, **{forced: clean_up})
    followers: list[list[int]] = [[], *([index] for index in range(tokenizer.vocab_size))]
    if "sentencepiece" in name:
        byte = tokenizer.hf.convert_tokens_to_ids("<0x00>")
        followers += [[byte + start, *[byte + 0x80] * 2] for start in (0x41, 0x80, 0xBF, 0xE1)]
    for text in [*STRINGS[5:15], "a 's b 've ' x n't . , 're don' "]:
        ids = tokenizer.encode(text)[:12]
        stream, out = Detokenizer(tokenizer), ""
        for count, index in enumerate(ids, 1):
            out += stream.push(index)
            certain = common_start([tokenizer.hf.decode(ids[:count] + more, True) for more in followers])
            if clean_up:  # spaces wait, and whether " n" may become " n't" is asked of the text, not of this vocabulary
                assert certain.startswith(out)
                late = certain.removeprefix(out)
                assert len(late) - len(late.lstrip(" ")) <= len(CLEAN_UP)
                assert late.lstrip(" ") in ("", "'", "' ", "n", "n'", "'v", "'r")
            else:
                assert out == certain


def test_bytes_that_can_never_be_text_do_not_hold_up_the_stream(bytewise: Tokenizer) -> None:
    stream = Detokenizer(bytewise)
    assert [stream.push(0xFF) for _ in range(100)] == ["\ufffd"] * 100
    assert [stream.push(byte) for byte in (0xED, 0xA0, 0x41)] == ["", "\ufffd\ufffd", "A"]
    fallback = make("sentencepiece")
    zero = fallback.hf.convert_tokens_to_ids("<0x00>")
    stream = Detokenizer(fallback)
    assert stream.push(zero + 0xFF) == "\ufffd"
    assert [stream.push(zero + 0x41) for _ in range(100)] == ["\ufffd"] * 100, "the run is lost: each byte is certain"


def test_a_run_of_byte_tokens_comes_out_whole_where_it_ends() -> None:
    tokenizer = make("sentencepiece")
    zero = tokenizer.hf.convert_tokens_to_ids("<0x00>")
    run = [zero + byte for byte in "🙂é".encode()]
    letter = tokenizer.encode("a", add_special_tokens=False)
    assert pieces(tokenizer, run + letter) == [*[""] * len(run), "🙂é" + tokenizer.decode(letter), ""]
    assert pieces(tokenizer, run) == [*[""] * len(run), "🙂é"]
    assert "".join(pieces(tokenizer, run[:-1])) == "\ufffd" * (len(run) - 1) == tokenizer.decode(run[:-1])


@pytest.mark.parametrize("name", BUILDERS)
def test_pending_completes_what_was_pushed_and_changes_nothing(name: str) -> None:
    tokenizer = make(name)
    for text in STRINGS:
        ids = tokenizer.encode(text)
        stream, out = Detokenizer(tokenizer), ""
        for count, index in enumerate(ids, 1):
            out += stream.push(index)
            assert out + stream.pending == out + stream.pending == tokenizer.decode(ids[:count])
        assert stream.pending == stream.flush()


# Cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte_bpe", "sentencepiece_prefix_space", "wordpiece"])
def test_a_token_costs_the_same_at_position_ten_and_ten_thousand(name: str) -> None:
    tokenizer = make(name)
    ids = (tokenizer.encode(STRINGS[4] + STRINGS[13] + STRINGS[16]) * 2000)[:20_000]
    stream = Detokenizer(tokenizer)
    times = []
    for start in range(0, len(ids), 1000):
        begin = time.perf_counter()
        stream.push_many(ids[start : start + 1000])
        times.append(time.perf_counter() - begin)
    assert min(times[-5:]) < 4 * min(times[:5]), "20 times, were it the square of the length"


# Decoders that cannot be streamed ----------------------------------------------------------------


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.WordPiece()]),
        decoders.Sequence([decoders.BPEDecoder(), decoders.ByteFallback()]),
        decoders.BPEDecoder(suffix=""),
        decoders.Replace("", "x"),
        decoders.Replace("x" * 65, "y"),
    ],
    ids=repr,
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: object) -> None:
    with pytest.raises(TokenizerError, match=r"stream"):
        Detokenizer(of_tokens(["a", "b"], decoder))


def test_a_tokenizer_class_with_its_own_decoding_is_refused() -> None:
    tokenizer = make("byte_bpe")

    class Odd(type(tokenizer.hf)):  # type: ignore[misc]
        def _decode(self, *args: object, **options: object) -> str:
            return "odd"

    tokenizer.hf.__class__ = Odd
    with pytest.raises(TokenizerError, match="Odd decodes in a way of its own"):
        Detokenizer(tokenizer)
