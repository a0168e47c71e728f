"""A fast tokenizer that needs no transformers: a `tokenizers.Tokenizer`, its special tokens and its chat templates.

Importing transformers and making its tokenizer takes most of a second. Its Python code adds nothing to the ids of most
tokenizers; of those, this is what we use, under the same names.

This module does not know files, or for which tokenizers that holds (kept_tokenizers.py, gguf_tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast


class PlainTokenizer:
    """What `PreTrainedTokenizerFast` does with text, where no class of its own changes that.

    Attributes:
        backend_tokenizer: neither cuts nor pads what it encodes.
        special_tokens_map: the named ones, such as {"eos_token": "</s>"}.
        chat_template: Jinja source, or a dict of several by name, or None.
    """

    clean_up_tokenization_spaces = False

    def __init__(
        self,
        backend: Backend,
        special_tokens_map: Mapping[str, str],
        chat_template: Any,
        transformers: Callable[[], PreTrainedTokenizerFast],
    ) -> None:
        """transformers: makes the same tokenizer there."""
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.special_tokens_map, self.chat_template = dict(special_tokens_map), chat_template
        self._transformers = transformers

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """The same as transformers has it."""
        hf = self._transformers()
        hf.chat_template = self.chat_template
        return hf

    def encode(self, text: str, *, add_special_tokens: bool = True, **returned: bool) -> list[int]:
        """Token ids; returned: what else transformers would give, which is not made here."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        text: str = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        added: dict[int, AddedToken] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        index: int | None = None if token is None else self.backend_tokenizer.token_to_id(token)
        return index
