"""A tokenizer with guarded inputs: text to ids and back, as transformers' fast tokenizers do it.

This module does not know models, streaming (detokenizer.py) or how a chat template is rendered (chat.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast


class Tokenizer:
    """One fast tokenizer (`tokenizers` library) with its special tokens and chat template."""

    def __init__(self, hf: PreTrainedTokenizerFast) -> None:
        self.hf = hf

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """The tokenizer in a model folder, giving the same ids as `transformers.AutoTokenizer`."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included."""
        raise NotImplementedError

    @property
    def bos_token_id(self) -> int | None:
        raise NotImplementedError

    @property
    def eos_token_id(self) -> int | None:
        raise NotImplementedError

    @property
    def pad_token_id(self) -> int | None:
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""
        raise NotImplementedError

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation, rendered by the model's chat template."""
        raise NotImplementedError
