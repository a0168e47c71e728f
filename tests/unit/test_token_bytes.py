"""The bytes of each token: joined, those of the decoded text; and who has none of its own is refused by name."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend

from handloom.errors import TokenizerError
from handloom.text.token_bytes import token_bytes
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import SETTINGS, STRINGS, tiny, wrap

WITH_BYTES = ["byte_bpe", "byte_bpe_with_bos", "sentencepiece_prefix_space", "sentencepiece"]


def tokenizer_of(name: str, **settings: object) -> Tokenizer:
    return Tokenizer(wrap(Backend.from_str(tiny(name).to_str()), **{**SETTINGS[name], **settings}))


@pytest.mark.parametrize("name", WITH_BYTES)
def test_joined_they_are_the_text_of_every_string(name: str) -> None:
    tokenizer = tokenizer_of(name)
    tokens = token_bytes(tokenizer, tokenizer.vocab_size)
    for text in STRINGS:
        ids = [id_ for id_ in tokenizer.encode(text, add_special_tokens=False) if id_ not in tokens.special]
        joined = b"".join(tokens.values[id_] for id_ in ids)
        if name == "sentencepiece_prefix_space":
            joined = joined.removeprefix(b" ")
        assert joined == tokenizer.decode(ids).encode()


@pytest.mark.parametrize("name", [*WITH_BYTES, "unigram"])
def test_of_every_single_token_that_is_text_too(name: str) -> None:
    tokenizer = tokenizer_of(name, clean_up_tokenization_spaces=False)
    tokens = token_bytes(tokenizer, tokenizer.vocab_size)
    compared = 0
    for id_, value in enumerate(tokens.values):
        decoded = tokenizer.decode([id_], skip_special_tokens=False)
        if "\ufffd" not in decoded and not value.startswith(b" "):  # a space at the beginning may be taken off
            assert decoded.encode() == value
            compared += 1
    assert compared > len(tokens.values) // 3


def test_special_tokens_holes_and_rows_beyond_the_tokenizer_are_told() -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokens = token_bytes(tokenizer, tokenizer.vocab_size + 5)
    assert tokens.values[-5:] == [b""] * 5
    named = {tokenizer.hf.convert_ids_to_tokens(id_) for id_ in tokens.special}
    assert named == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert len(token_bytes(tokenizer, 100).values) == 100


@pytest.mark.parametrize("name", ["wordpiece", "suffix_bpe", "words"])
def test_a_decoder_that_joins_tokens_by_context_is_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match="have no bytes of their own"):
        token_bytes(tokenizer_of(name, clean_up_tokenization_spaces=False), 50)


def test_a_tokenizer_that_tidies_spaces_up_is_refused_with_the_way_out() -> None:
    tokenizer = tokenizer_of("unigram", clean_up_tokenization_spaces=True)
    with pytest.raises(TokenizerError, match="clean_up_tokenization_spaces = False"):
        token_bytes(tokenizer, 50)
    tokenizer.hf.clean_up_tokenization_spaces = False
    assert token_bytes(tokenizer, 50).values
