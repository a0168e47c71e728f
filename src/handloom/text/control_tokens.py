"""Control tokens that somebody typed, kept apart from those that a chat template writes.

A typed `<|im_end|>` must be text like any other, and the template's own one token. So the values that go into
a template are marked where a control token stands in them, and what comes out says which ones are the template's. Then
the tokenizer is asked under other names: one whose control tokens are called what nobody can guess reads the text with
those names in the place of the template's own. All else is as ever: how words are cut, and what is merged with what.

Control tokens are the special tokens, and of the other added tokens those that the template's source contains, as in
transformers' `apply_chat_template(sanitize_control_tokens=True)`; those others stay tokens in what the assistant said,
which is how the model wrote them.

This module does not know templates' language, files, or models.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, models

from handloom.errors import InvalidPrompt, TokenizerError

if TYPE_CHECKING:
    from collections.abc import Callable

PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Marks:
    """Two characters that occur nowhere in a conversation, put around control tokens in it.

    `after` also follows a text that ends like the beginning of one, which the next text could complete.
    """

    before: str
    after: str

    @classmethod
    def unused(cls, given: str) -> Marks:
        """Two that neither stand in `given`, nor would as JSON spells them. Raises InvalidPrompt."""
        spelled = given.lower()
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in given and f"\\u{code:04x}" not in spelled)
        before, after = next(free, ""), next(free, "")
        if not after:
            raise InvalidPrompt(
                "the conversation holds every character of Unicode's private use area (U+E000 to U+F8FF), so none is "
                "left to tell typed control tokens from the template's; pass sanitize_control_tokens=False"
            )
        return cls(before, after)

    def taken_out(self, text: str) -> tuple[str, frozenset[int], frozenset[int]]:
        """(text without marks, where in it `before` stood, where `after` did)."""
        spellings = {form: mark for mark in (self.before, self.after) for form in (mark, f"\\u{ord(mark):04x}")}
        parts: list[str] = []
        places: dict[str, set[int]] = {self.before: set(), self.after: set()}
        length = end = 0
        for match in re.finditer("|".join(map(re.escape, spellings)), text):
            parts.append(text[end : match.start()])
            length += match.start() - end
            places[spellings[match.group()]].add(length)
            end = match.end()
        parts.append(text[end:])
        return "".join(parts), frozenset(places[self.before]), frozenset(places[self.after])


class Finder:
    """Finds tokens in a text, in time linear in its length, however many they are."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._names = [token.content for token in tokens]
        self._automaton = Tokenizer(models.BPE())
        self._automaton.add_tokens(
            [AddedToken(token.content, single_word=token.single_word, normalized=False) for token in tokens]
        )

    def find(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the leftmost tokens, the longest where several start, in order."""
        return list(self._automaton.encode(text, add_special_tokens=False).offsets)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        """Proper prefixes, but those of letters and digits alone: a word is never marked."""
        return frozenset(name[:end] for name in self._names for end in range(1, len(name)) if not name[:end].isalnum())

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._names), default=1)

    def is_left_open(self, text: str) -> bool:
        """Whether the text ends as a token begins."""
        tail = text[-self._longest + 1 :] if self._longest > 1 else ""
        return any(tail[start:] in self._beginnings for start in range(len(tail)))

    def concerns(self, text: str) -> bool:
        """Whether anything in the text would be marked."""
        return bool(self.find(text)) or self.is_left_open(text)

    def marked(self, text: str, marks: Marks) -> str:
        """The text with marks."""
        parts, end = [], 0
        for start, stop in self.find(text):
            parts += [text[end:start], marks.before, text[start:stop], marks.after]
            end = stop
        parts += [text[end:], marks.after if self.is_left_open(text) else ""]
        return "".join(parts)


class ControlTokens:
    """Those of one tokenizer and one template.

    unknown: the token that stands for what the tokenizer does not know, which any text may contain.
    """

    def __init__(self, backend: Tokenizer, template: str = "", unknown: str | None = None) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {index: token for index, token in sorted(added.items()) if token.content}
        written = [token for token in self._added.values() if not token.special and _is_written(token, template)]
        special = [token for token in self._added.values() if token.special]
        self._ids = {index for index, token in self._added.items() if token.special or token in written}
        self._told = self._ids - {index for index, token in self._added.items() if token.content == unknown}
        self._of_assistant, self._of_others = Finder(special), Finder([*special, *written])

    def mark(self, given: dict[str, Any]) -> tuple[dict[str, Any], Marks | None]:
        """A copy of what goes into a template, marked; no marks, and the very thing, where nothing is to be marked.

        `given` holds JSON types; its "messages" are a list of mappings with a "role".
        """
        if not any(finder.concerns(text) for text, finder in self._texts(given)):
            return given, None
        marks = Marks.unused(json.dumps(given, ensure_ascii=False))
        marked = {
            key: [_mapped(message, self._marker(message, marks)) for message in value]
            if key == "messages"
            else _mapped(value, self._marker({}, marks))
            for key, value in given.items()
        }
        return marked, marks

    def encode_rendered(self, text: str, marks: Marks, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a rendered text with marks. encode: the tokenizer's own, for a text without.

        Raises TokenizerError for a tokenizer that makes a control token of plain text, or cannot be asked under other
        names.
        """
        clean, befores, afters = marks.taken_out(text)
        found = self._of_others.find(clean)
        if self._renamed_ids(clean, found) != encode(clean):
            raise TokenizerError(
                "this tokenizer gives other ids where its control tokens are renamed, so typed ones cannot be told "
                "from the template's; take them out of the messages, or pass sanitize_control_tokens=False"
            )
        own = [
            (start, end)
            for start, end in found
            if start not in befores and end not in afters and not any(start < at < end for at in befores | afters)
        ]
        return self._renamed_ids(clean, own)

    def encode_typed(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text in which nothing is a control token; the tokenizer's own around it, if asked for.

        Raises TokenizerError, as `encode_rendered`.
        """
        return self._ids_of(text, add_special_tokens=add_special_tokens)

    def _texts(self, given: Mapping[str, Any]) -> Iterable[tuple[str, Finder]]:
        for key, value in given.items():
            for part in value if key == "messages" else [value]:
                finder = self._finder(part) if key == "messages" else self._of_others
                yield from ((text, finder) for text in _strings(part))

    def _finder(self, message: Mapping[str, Any]) -> Finder:
        return self._of_assistant if message.get("role") == "assistant" else self._of_others

    def _marker(self, message: Mapping[str, Any], marks: Marks) -> Callable[[str], str]:
        finder = self._finder(message)
        return lambda text: finder.marked(text, marks)

    # Under other names ---------------------------------------------------------------------------

    @cached_property
    def _new_names(self) -> dict[str, str]:
        """Of control tokens: ASCII in small letters, which tokenizers leave alone before they look for tokens."""
        secret = secrets.token_hex(16)
        return {self._added[index].content: f"<{secret}n{index}>" for index in self._ids}

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with control tokens renamed, which shares the model; and its added tokens' old ids by new."""
        made = Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (value := getattr(self._backend, part)) is not None:
                setattr(made, part, value)
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        made.add_tokens(
            [
                AddedToken(self._new_names.get(token.content, token.content), **{f: getattr(token, f) for f in flags})
                for token in self._added.values()
            ]
        )
        old: dict[int, int] = {}
        for index, token in self._added.items():
            new = made.token_to_id(self._new_names.get(token.content, token.content))
            assert new is not None
            old[new] = index
        return made, old

    def _renamed_ids(self, text: str, own: list[tuple[int, int]]) -> list[int]:
        """Ids of the text, with control tokens at `own` alone."""
        parts, end = [], 0
        for start, stop in own:
            parts += [text[end:start], self._new_names[text[start:stop]]]
            end = stop
        return self._ids_of("".join([*parts, text[end:]]), add_special_tokens=False)

    def _ids_of(self, text: str, *, add_special_tokens: bool) -> list[int]:
        backend, old = self._renamed
        encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        for index, is_around in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if index in self._told and index not in old and not is_around:
                raise TokenizerError(
                    f"this tokenizer makes its control token {self._added[index].content!r} of plain text too; take it "
                    "out of the text, or allow control tokens in it"
                )
            ids.append(index if is_around else old.get(index, index))
        return ids


def _is_written(token: AddedToken, template: str) -> bool:
    """Whether a template writes the token; white space in it is text."""
    return token.content in template and not token.content.isspace()


def _strings(value: Any) -> Iterable[str]:
    """Every string in a value of JSON types, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return value
