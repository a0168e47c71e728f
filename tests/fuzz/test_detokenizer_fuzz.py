"""For any tokens, any decoder and any ids: the streamed pieces, joined, are what the library decodes at once."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from handloom.errors import TokenizerError
from handloom.text.detokenizer import Detokenizer
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import BUILDERS, SETTINGS, tiny, wrap

FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"

SHAPES = ["", " ", "▁", "a", "b", "##a", "##", " a", "▁▁", "▁a", "a▁", "</w>", "a</w>", "b</w>a</w>", "a b", "aa", "\n"]
SHAPES += [" .", ".", "'", " ' ", "n't", " n't", " do not", "not", "'s", " 've", "é", "Ã©", "Ġa", "Ċ", "ðŁ", "Ļ", "Ĥ"]
SHAPES += ["<0x41>", "<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x+A>", "<0xé>", "<0xGG>", "<0x4>"]
TOKENS = st.lists(st.sampled_from(SHAPES) | st.text(max_size=4), min_size=1, max_size=20, unique=True)

WORDS = st.sampled_from(["▁", " ", "a", "aa", "ab", "</w>", "##", "é", "ba", "aba"])
STEPS = st.one_of(
    st.just({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
    st.just({"type": "ByteFallback"}),
    st.just({"type": "Fuse"}),
    st.fixed_dictionaries(
        {"type": st.just("Replace"), "pattern": st.fixed_dictionaries({"String": WORDS}), "content": WORDS}
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("Strip"),
            "content": st.sampled_from([" ", "a", "▁"]),
            "start": st.integers(0, 3),
            "stop": st.sampled_from([0, 0, 0, 1]),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("Metaspace"),
            "replacement": st.sampled_from(["▁", "a"]),
            "prepend_scheme": st.sampled_from(["always", "never", "first"]),
            "split": st.booleans(),
        }
    ),
    st.fixed_dictionaries({"type": st.just("WordPiece"), "prefix": WORDS, "cleanup": st.booleans()}),
    st.fixed_dictionaries({"type": st.just("BPEDecoder"), "suffix": WORDS}),
)
SEQUENCES = st.fixed_dictionaries({"type": st.just("Sequence"), "decoders": st.lists(STEPS, max_size=5)})
DECODERS = st.none() | STEPS | SEQUENCES
CLEAN_UPS = [{}, {"clean_up_tokenization_spaces": True}, {"clean_up_tokenization_spaces": True, FORCED: True}]


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    return "".join([stream.push(index) for index in ids]) + stream.flush()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(BUILDERS)),
    clean_up=st.sampled_from(CLEAN_UPS),
    skip=st.booleans(),
    data=st.data(),
)
def test_random_ids_of_real_kinds_of_tokenizer(
    name: str, clean_up: dict[str, Any], skip: bool, data: st.DataObject
) -> None:
    tokenizer = Tokenizer(wrap(tiny(name), **{**SETTINGS[name], **clean_up}))
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    short = st.integers(0, min(tokenizer.vocab_size, 260) - 1)  # single bytes and letters
    ids = data.draw(st.lists(short | any_id, max_size=30))
    assert streamed(tokenizer, ids, skip) == tokenizer.hf.decode(ids, skip_special_tokens=skip)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    tokens=TOKENS,
    decoder=DECODERS,
    special=st.sets(st.integers(0, 5)),
    skip=st.booleans(),
    clean_up=st.booleans(),
    data=st.data(),
)
def test_any_tokens_under_any_decoder(
    tokens: list[str],
    decoder: dict[str, Any] | None,
    special: set[int],
    skip: bool,
    clean_up: bool,
    data: st.DataObject,
) -> None:
    backend = Backend(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.add_special_tokens([tokens[index] for index in special if index < len(tokens) and tokens[index]])
    backend = Backend.from_str(json.dumps({**json.loads(backend.to_str()), "decoder": decoder}))
    tokenizer = Tokenizer(wrap(backend, clean_up_tokenization_spaces=clean_up))
    ids = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=15))
    try:
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        pieces = streamed(tokenizer, ids, skip)
    except TokenizerError:  # the library panics, or the decoder cannot be streamed
        assume(False)
    assert pieces == whole
