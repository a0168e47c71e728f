"""A tokenizer with guarded inputs: text to ids and back, the ids being those of transformers' fast tokenizers.

This module does not know models, streaming (detokenizer.py), how a folder is read safely (tokenizer_folder.py) or how
a chat template is rendered (chat.py).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handloom.errors import InvalidPrompt, TokenizerError
from handloom.text.chat import ChatRenderer, Tool, choose_template
from handloom.text.token_bytes import Extensions, token_bytes
from handloom.text.typed_errors import typed_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from handloom.text.control_tokens import ControlTokens
    from handloom.text.plain_tokenizer import PlainTokenizer

MAX_TEXT_BYTES = 8 * 2**20
MAX_TEMPLATES_KEPT = 4


def check_text(text: object, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """`text` itself, if it is a str that UTF-8 can hold in `max_bytes`.

    Raises InvalidPrompt that says what is wrong and, for a lone surrogate, at which character.
    """
    if not isinstance(text, str):
        raise InvalidPrompt(f"the prompt must be a str, not {type(text).__name__}")
    size = len(text)
    if size <= max_bytes and not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidPrompt(
                f"the prompt is not text: character {error.start} is a lone surrogate, U+{ord(text[error.start]):04X}"
            ) from None
    if size > max_bytes:
        raise InvalidPrompt(f"the prompt has {size} bytes of UTF-8 or more; the limit is {max_bytes}")
    return text


class Tokenizer:
    """One fast tokenizer (`tokenizers` library) with its special tokens and chat templates.

    `fast` is what encodes and decodes: transformers' tokenizer, or one with its names that does without transformers.
    `max_text_bytes` bounds what is tokenised at once, in UTF-8 bytes.
    """

    def __init__(self, fast: PreTrainedTokenizerFast | PlainTokenizer, *, max_text_bytes: int = MAX_TEXT_BYTES) -> None:
        self.fast = fast
        self.max_text_bytes = max_text_bytes
        self._chat = ChatRenderer()
        self._control: dict[tuple[str, int, int], ControlTokens] = {}

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """The tokenizer in a model folder, with the same ids as `transformers.AutoTokenizer` gives there.

        Reads tokenizer.json (or vocab.json and merges.txt), tokenizer_config.json, special_tokens_map.json,
        added_tokens.json, the chat template files, and from config.json what decides the tokenizer's class. No code
        of the folder is imported. Raises TokenizerError.
        """
        from handloom.text import kept_tokenizers

        return cls(kept_tokenizers.load(Path(path)))

    @property
    def hf(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer underneath, made when first asked for; it encodes and decodes from then on.

        Raises TokenizerError where that is made of a folder which is no longer there.
        """
        from handloom.text.plain_tokenizer import PlainTokenizer

        if isinstance(self.fast, PlainTokenizer):
            self.fast = self.fast.to_transformers()
        return self.fast

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included. Ids below it may be without a token."""
        return max(self.fast.get_vocab().values(), default=-1) + 1

    @cached_property
    def fingerprint(self) -> bytes:
        """The same for two tokenizers whose tokens have the same ids."""
        return hashlib.sha256(repr(sorted(self.fast.get_vocab().items())).encode("utf-8", "surrogatepass")).digest()

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Every token that decoding skips when it skips special tokens."""
        return frozenset(token.content for token in self.fast.added_tokens_decoder.values() if token.special)

    @cached_property
    def extensions(self) -> Extensions:
        """Which tokens begin with which bytes. Raises TokenizerError where tokens have no bytes of their own."""
        return Extensions(token_bytes(self, self.vocab_size))

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that starts a text, if there is one."""
        return self._id(self.fast.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self._id(self.fast.eos_token_id)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._id(self.fast.pad_token_id)

    @staticmethod
    def _id(value: Any) -> int | None:
        return None if value is None else int(value)

    def encode(self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model's own format puts around a text (bos, …).

        A special token's text is that token, as in transformers, unless `split_special_tokens`: then it is text like
        any other, as it must be where somebody else wrote it.
        Raises InvalidPrompt for what is no text, or more than `max_text_bytes` of it; TokenizerError for a tokenizer
        that makes special tokens of plain text too.
        """
        check_text(text, max_bytes=self.max_text_bytes)
        with typed_errors(TokenizerError, "the tokenizer failed on this text"):
            if split_special_tokens:
                return self._control_tokens("").encode_typed(text, add_special_tokens=add_special_tokens)
            ids: list[int] = self.fast.encode(
                text,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Raises InvalidPrompt for an id below 0 or not below `vocab_size`."""
        try:
            checked = [operator.index(index) for index in ids]
        except TypeError as error:
            raise InvalidPrompt(f"token ids must be integers: {error}") from None
        size = self.vocab_size
        wrong = next((index for index in checked if not 0 <= index < size), None)
        if wrong is not None:
            raise InvalidPrompt(f"token id {wrong} is outside this tokenizer's 0..{size - 1}")
        with typed_errors(TokenizerError, "the tokenizer failed on these ids"):
            text: str = self.fast.decode(checked, skip_special_tokens=skip_special_tokens)
        return text

    @property
    def chat_template(self) -> Any:
        """Jinja source of the chat template, or a dict of several by name, or None. Assign source to replace it."""
        return self.fast.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.fast.chat_template = template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Tool] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation in the model's chat format. Arguments and errors as `apply_chat_template`.

        Tokens of it would be control tokens wherever one's text stands, typed ones too; `apply_chat_template` knows
        them apart.
        """
        template = choose_template(self.chat_template, has_tools=tools is not None)
        return self._rendered(
            template, messages, add_generation_prompt, tools, continue_final_message, variables=kwargs
        )

    def _rendered(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None,
        tools: Sequence[Tool] | None,
        continue_final_message: bool,
        **how: Any,
    ) -> str:
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        return self._chat.render(
            template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens=self.fast.special_tokens_map,
            **how,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Tool] | None = None,
        continue_final_message: bool = False,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat format.

        `messages`: mappings with `role` and `content` (text, or a list of text parts). `add_generation_prompt` ends
        the ids where the model's answer begins; it is on unless `continue_final_message`, which ends them inside the
        last message. `tools`: JSON schemas or documented functions. `kwargs` are variables for the template
        (`enable_thinking=False`); reserved names are refused.
        Control tokens are those that the template writes, and the text of one in messages, tools or variables is text
        (control_tokens.py says which tokens that concerns); `sanitize_control_tokens=False` makes it the token, which
        is transformers' default.
        Raises InvalidPrompt for the messages, InvalidParam for the other arguments, ChatTemplateError for a template
        that is missing, fails or exceeds its limits, TokenizerError for a tokenizer that makes control tokens of plain
        text too.
        """
        template = choose_template(self.chat_template, has_tools=tools is not None)
        render = partial(
            self._rendered, template, messages, add_generation_prompt, tools, continue_final_message, variables=kwargs
        )
        if not sanitize_control_tokens:
            return self.encode(render(), add_special_tokens=False)
        control_tokens, marks = self._control_tokens(template), None

        def mark(given: dict[str, Any]) -> dict[str, Any]:
            nonlocal marks
            given, marks = control_tokens.mark(given)
            return given

        text, encode = render(mark=mark), partial(self.encode, add_special_tokens=False)
        return encode(text) if marks is None else control_tokens.encode_rendered(text, marks, encode)

    def _control_tokens(self, template: str) -> ControlTokens:
        """Kept for the templates used last: making it costs some milliseconds."""
        from handloom.text.control_tokens import ControlTokens

        backend = self.fast.backend_tokenizer
        key = template, id(backend), backend.get_vocab_size()
        if key not in self._control:
            if len(self._control) >= MAX_TEMPLATES_KEPT:
                self._control.clear()
            self._control[key] = ControlTokens(backend, template, self.fast.special_tokens_map.get("unk_token"))
        return self._control[key]
