"""Structured output: the tokens that keep an output within a grammar, by llguidance's parser.

The grammar speaks of the bytes of the output's tokens, from the first new one on. Every token whose bytes may come next
is allowed, however the text is cut; special tokens are no text. An end-of-sequence token is allowed exactly where the
output may end, so it is forced where nothing else can come. A `Matcher` follows the tokens that it is shown, and goes
back where they are others than before, so that it can be shown drafts and survives preemption; `fork` is for a second
way to go on.

Method: Earley parsing over lexemes, whose regular expressions are matched by derivatives (llguidance). Its limits are
set here, and what it refuses or gives up at is an error of the one request.

This module does not know where options come from, or how a token is chosen.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handloom.errors import GrammarError, InvalidParam
from handloom.sampling import on_cpu
from handloom.text.token_bytes import TokenBytes, token_bytes
from handloom.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

T = TypeVar("T")

MAX_KEPT = 32
"""Compiled grammars that one model keeps."""
LIMITS = {
    "max_grammar_size": 500_000,  # symbols
    "initial_lexer_fuel": 1_000_000,  # to build the lexer: about 20 ms
    "step_lexer_fuel": 200_000,  # per token: about 15 ms
    "step_max_items": 50_000,  # parser items per token
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,  # of one request: about 2 kB each
}
DEEP_STACK_BYTES = 128 << 20
"""For compiling: about 20 times what the deepest grammar that `structure_options` lets through takes."""
_STACK_SIZE = threading.Lock()  # the size for new threads is the process's
_ALL_TOKENS = '\n%llguidance {"no_forcing": true}\n'  # not only those of the tokenizer's own cut of what must come
_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_END = b"<|end of output|>"


class Grammars:
    """The grammars of one model's tokens. The set-up, some 0.1 s for 50k tokens, happens when one is first asked for.

    Any thread may compile.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: dict[str, int] | None = None) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._limits = LIMITS if limits is None else {**LIMITS, **limits}
        self._lock = threading.Lock()
        self._tokens: _Tokens | None = None
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def compile(self, option: str, source: str) -> Grammar:
        """A grammar from what `read_structure` made of an option.

        Raises InvalidParam for one that llguidance refuses, TokenizerError where tokens have no bytes of their own.
        """
        with self._lock:
            grammar = self._kept.pop((option, source), None) or self._compile(option, source)
            self._kept[option, source] = grammar
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _compile(self, option: str, source: str) -> Grammar:
        if self._tokens is None:
            self._tokens = _Tokens.of(self._tokenizer, self._vocab_size)
        return Grammar(option, source, self._tokens, self._limits)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A vocabulary as llguidance sees it: one token more, the last, stands for the end of the output."""

    native: LLTokenizer
    special: frozenset[int]
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> _Tokens:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokens = token_bytes(tokenizer, vocab_size)
        native = LLTokenizer(TokenizerWrapper(_Wrapped(tokens, tokenizer)), eos_token=vocab_size)
        return cls(native, tokens.special, vocab_size)

    @property
    def num_words(self) -> int:
        return self.vocab_size // 32 + 1


class _Wrapped:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: TokenBytes, tokenizer: Tokenizer) -> None:
        self.eos_token_id = len(tokens.values)
        self.tokens = [*tokens.values, _END]
        self.special_token_ids = [*tokens.special, self.eos_token_id]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text is expected, not bytes")
        return self._tokenizer.encode(text, add_special_tokens=False)


class Grammar:
    """A compiled grammar, which any number of requests may start from. `option` is the one that it came by.

    Its matchers share the states of one lexer. Where others have made as many of these as the limits allow, a matcher
    goes on with a lexer of its own, so that it fails only where it would have failed alone.
    """

    def __init__(self, option: str, source: str, tokens: _Tokens, limits: dict[str, int]) -> None:
        self.option, self.tokens = option, tokens
        self._limits = limits
        try:
            self._native = _native_grammar(option, source)
        except ValueError as error:
            raise InvalidParam(f"{option}: llguidance does not take it: {error}") from None
        self._start = self._compiled()
        if self._start.is_error():
            raise InvalidParam(f"{option}: llguidance does not take it: {_said(self._start)}{_hint(self._start)}")

    def start(self) -> Matcher:
        """A matcher before the first new token."""
        return Matcher(self, self.begin())

    def begin(self) -> LLMatcher:
        """llguidance's matcher before the first new token."""
        return self._start.deep_copy()

    def begin_anew(self) -> LLMatcher:
        """The same, sharing nothing with those before it; those after it share with it."""
        self._start = self._compiled()
        return self.begin()

    def _compiled(self) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**self._limits, precompute_large_lexemes=True, verbose_errors=False)
        return _on_deep_stack(lambda: LLMatcher(self.tokens.native, self._native, log_level=0, limits=limits))


class Matcher:
    """A grammar on its way along one output."""

    def __init__(self, grammar: Grammar, native: LLMatcher) -> None:
        self.grammar, self._native = grammar, native
        self._taken: list[int] = []
        self.fits = True  # whether all tokens that it was shown are an output's beginning

    def fork(self) -> Matcher:
        """Another, at the same place."""
        other = copy.copy(self)
        other._native, other._taken = self._native.deep_copy(), self._taken.copy()
        return other

    def follow(self, token_ids: Sequence[int]) -> None:
        """Go to where these new tokens [n] of the output lead, forwards or back."""
        if self._native.is_error():  # a parser that gave up cannot go back
            self._native, self._taken = self.grammar.begin(), []
        same = len(self._taken)
        if token_ids[:same] != self._taken:
            same = next(at for at, (a, b) in enumerate(zip([*token_ids, -1], self._taken, strict=False)) if a != b)
            self._native.rollback(len(self._taken) - same)
            del self._taken[same:]
        if more := list(token_ids[same:]):
            self._taken += more[: self._native.try_consume_tokens(more)]
            if self._native.is_error():
                self._start_anew(list(token_ids))
        self.fits = len(self._taken) == len(token_ids)

    def _start_anew(self, token_ids: list[int]) -> None:
        self._native = self.grammar.begin_anew()
        self._taken = token_ids[: self._native.try_consume_tokens(token_ids)]

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole and no token can come any more."""
        return self.fits and self._native.is_stopped() and not self._native.is_error()

    @property
    def num_words(self) -> int:
        """Words of a bitmask."""
        return self.grammar.tokens.num_words

    def fill(self, words: NDArray[np.int32], eos_token_id: Sequence[int]) -> None:
        """Write the bitmask of the tokens that may come next into `words` [num_words]: bit i % 32 of word i // 32.

        Nothing may come where the output so far does not fit. Raises GrammarError where a limit is exceeded.
        """
        words[:] = 0
        if self.fits:
            self._compute(words)
            if self._native.is_error() and not self._is_dead_end:
                self._start_anew(self._taken)
                self._compute(words)
        if self._native.is_error() and not self._is_dead_end:
            raise GrammarError(
                f"{self.grammar.option}: llguidance gave up after {len(self._taken)} tokens: {_said(self._native)}; a "
                "grammar with less choice at this place is needed"
            )
        if not self.fits or self._native.is_error():
            words[:] = 0
            return
        bits = words.view(np.uint8)
        may_end = _take_bit(bits, self.grammar.tokens.vocab_size)
        for token_id in eos_token_id:
            if may_end:
                bits[token_id >> 3] |= 1 << (token_id & 7)
            elif token_id not in self.grammar.tokens.special:  # as text it would end the output too early
                _take_bit(bits, token_id)

    def _compute(self, words: NDArray[np.int32]) -> None:
        self._native.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    @property
    def _is_dead_end(self) -> bool:
        """Whether the parser stopped because no token fits."""
        return self._native.get_error().startswith("NoExtensionBias")


class Complete:
    """A stopping criterion for a request without an end-of-sequence token: the output is whole, and nothing can follow.

    prompt_length counts token ids.
    """

    def __init__(self, grammar: Grammar, prompt_length: int) -> None:
        self._matcher, self._prompt_length = grammar.start(), prompt_length

    def __call__(self, input_ids: Tensor, scores: Any) -> list[bool]:
        """Of each row of input_ids [r, n]."""
        found = []
        for ids in input_ids.tolist():
            self._matcher.follow(ids[self._prompt_length :])
            found.append(self._matcher.is_complete)
        return found


def constrain(
    scores: Tensor, matchers: Sequence[Matcher | None], eos_token_ids: Sequence[Sequence[int]]
) -> dict[int, GrammarError]:
    """Scores [R, V] of tokens that a row's grammar does not allow to -inf, in one pass. Off: None.

    Returns what went wrong, by row.
    """
    on = {row: matcher for row, matcher in enumerate(matchers) if matcher is not None}
    errors: dict[int, GrammarError] = {}
    words = np.empty((len(on), max(matcher.num_words for matcher in on.values())), dtype=np.int32)
    for own, (row, matcher) in zip(words, on.items(), strict=True):
        try:
            matcher.fill(own, eos_token_ids[row])
        except GrammarError as error:
            errors[row] = error
    forbid_unset(scores, list(on), words)
    return errors


def forbid_unset(scores: Tensor, rows: Sequence[int], words: NDArray[np.int32]) -> None:
    """-inf into `scores` [R, V] where a bitmask [len(rows), ceil(V / 32) or more] of these rows has no bit."""
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=scores.shape[1], bitorder="little")
    if scores.device.type == "cpu":
        for row, own in zip(rows, bits, strict=True):
            on_cpu.forbid(scores[row].numpy(), own ^ 1)
        return
    banned = torch.from_numpy(bits == 0).to(scores.device)
    if len(rows) == len(scores):
        scores.masked_fill_(banned, -torch.inf)
        return
    for row, own in zip(rows, banned, strict=True):
        scores[row].masked_fill_(own, -torch.inf)


def _take_bit(bits: NDArray[np.uint8], at: int) -> bool:
    """Clear a bit; returns whether it was set."""
    was = bool(bits[at >> 3] >> (at & 7) & 1)
    bits[at >> 3] &= 0xFF ^ (1 << (at & 7))
    return was


def _native_grammar(option: str, source: str) -> str:
    """llguidance's own description of a grammar. Raises InvalidParam."""
    from llguidance import LLMatcher

    if option == "json_schema":
        described = json.loads(LLMatcher.grammar_from_json_schema(source, defaults=_LAYOUT))
        described["grammars"][0]["name"] = "schema"
        described["grammars"].insert(0, {"lark_grammar": "start: @schema" + _ALL_TOKENS})
        return json.dumps(described)
    if option == "choices":
        texts = [_lark_string(choice) for choice in json.loads(source) if choice]
        maybe = "?" if len(texts) < len(json.loads(source)) else ""
        return LLMatcher.grammar_from_lark(f"start: CHOICE{maybe}\nCHOICE: {' | '.join(texts)}" + _ALL_TOKENS)
    if option == "regex":
        described = json.loads(LLMatcher.grammar_from_regex(source))
        described["grammars"][0]["lark_grammar"] += _ALL_TOKENS
        return json.dumps(described)
    return LLMatcher.grammar_from_lark(source + _ALL_TOKENS)


def _on_deep_stack(function: Callable[[], T]) -> T:
    """Its result, from a thread of its own: llguidance descends into rules and schemas, a stack frame or more each."""
    with ThreadPoolExecutor(1, "handloom grammar") as pool:
        with _STACK_SIZE:
            before = threading.stack_size(DEEP_STACK_BYTES)
            try:
                result = pool.submit(function)
            finally:
                threading.stack_size(before)
        return result.result()


def _lark_string(text: str) -> str:
    """Quoted: as JSON has it, but for the one control character that JSON leaves as it is and Lark does not."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _said(matcher: LLMatcher) -> str:
    """What llguidance says in one line."""
    text = re.sub(r"(?m)^ *(\d+ \| .*|\^)$", "", matcher.get_error().removesuffix("<non-verbose/>"))
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + " …"


def _hint(matcher: LLMatcher) -> str:
    too_much = ("too big", "too large", "too many", "too deeply", "recursion limit")
    return "; make it smaller" if any(words in matcher.get_error() for words in too_much) else ""
