"""Chat templates: a conversation in, the model's own text format out, whatever the template tries.

A template comes from the model's repository, so it is a stranger's program. It runs in a child process
(template_worker.py) inside Jinja's immutable sandbox, with caps on processor time, memory and output; one that loops or
explodes costs that child and ends in ChatTemplateError. The child starts at the first render (about 50 ms) and stays:
after that a render costs what the template costs plus about 0.1 ms.

Text and rules are those of transformers' `apply_chat_template(tokenize=False)`, version 5.23.

This module does not know token ids, tokenizer files or which model a template belongs to.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from handloom.errors import ChatTemplateError, InvalidParam, InvalidPrompt

Tool = Mapping[str, Any] | Callable[..., Any]

MAX_TEMPLATE_CHARS = 2**18
MAX_OUTPUT_CHARS = 2**23
MAX_INPUT_CHARS = 2**23
MAX_DEPTH = 64
MAX_INT_BITS = 1024
CPU_SECONDS = 1.0
START_SECONDS = 30.0

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TEMPLATE_INPUTS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
TEMPLATE_GLOBALS = {"raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner"}
# Arguments of transformers' apply_chat_template: as template variables they would do nothing, unnoticed.
FOREIGN_ARGUMENTS = {
    *("conversation", "chat_template", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
RESERVED_KEYS = frozenset(TEMPLATE_INPUTS | TEMPLATE_GLOBALS | FOREIGN_ARGUMENTS)
CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
WORKER = Path(__file__).with_name("template_worker.py")
WORKER_ENVIRONMENT = ("TZ", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


@dataclass(frozen=True)
class ChatLimits:
    """What one rendering may cost. `cpu_seconds` is processor time; the wall-clock limit is ten times that."""

    template_chars: int = MAX_TEMPLATE_CHARS
    input_chars: int = MAX_INPUT_CHARS
    output_chars: int = MAX_OUTPUT_CHARS
    cpu_seconds: float = CPU_SECONDS


def choose_template(templates: object, *, has_tools: bool) -> str:
    """The source to use out of a tokenizer's `chat_template`: one template, or several by name.

    Of several, "tool_use" is taken when there are tools, else "default". Raises ChatTemplateError if there is none.
    """
    if templates is None:
        raise ChatTemplateError(
            "this model has no chat template: prompt it with plain text, or give one first: "
            "tokenizer.chat_template = '<Jinja source>'"
        )
    if isinstance(templates, Mapping):
        name = "tool_use" if has_tools and "tool_use" in templates else "default"
        if name not in templates:
            raise ChatTemplateError(
                f"this model has several chat templates and none is called {name!r}: choose one first: "
                f"tokenizer.chat_template = tokenizer.chat_template[name], name one of {sorted(map(str, templates))}"
            )
        templates = templates[name]
    if not isinstance(templates, str):
        raise ChatTemplateError(f"the chat template must be Jinja source (str), not {type(templates).__name__}")
    return templates


class ChatRenderer:
    """Renders conversations; owns the child process. Safe to use from several threads (they take turns)."""

    def __init__(self, limits: ChatLimits | None = None) -> None:
        self.limits = limits or ChatLimits()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
        mark: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> str:
        """The conversation as the model's text.

        `special_tokens` are the tokenizer's (`bos_token`, …); `variables` are the caller's own template variables
        (`enable_thinking=False`, …) and may not redefine a reserved name. With `continue_final_message` the text ends
        inside the last message, for the model to go on. `mark` changes what the caller gives, as JSON types under
        "messages", "tools" and "variables", before the template sees it.
        Raises InvalidPrompt for messages that are none, InvalidParam for the other arguments, ChatTemplateError for a
        template that fails or exceeds a limit.
        """
        special_tokens = special_tokens or {}
        variables = variables or {}
        if reserved := sorted(set(variables) & (RESERVED_KEYS | special_tokens.keys())):
            raise InvalidParam(f"template variable {reserved[0]!r} is reserved and cannot be set; rename it")
        if continue_final_message and add_generation_prompt:
            raise InvalidParam("continue_final_message and add_generation_prompt exclude each other: choose one")
        if len(template) > self.limits.template_chars:
            raise ChatTemplateError(
                f"the chat template has {len(template)} characters; the limit is {self.limits.template_chars}"
            )
        budget = _Budget(self.limits.input_chars)
        given: dict[str, Any] = {
            "messages": _plain_messages(messages, budget),
            "variables": {
                name: _plain(value, f"template variable {name!r}", budget) for name, value in variables.items()
            },
            "tools": None if tools is None else [_plain_tool(tool, i, budget) for i, tool in enumerate(tools)],
        }
        given = given if mark is None else mark(given)
        conversation = given["messages"]
        context = {
            **special_tokens,
            **given["variables"],
            "messages": conversation,
            "tools": given["tools"],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if not continue_final_message:
            return self._run(template, context)
        final = _mark_final_message(conversation)
        return _cut_at_mark(self._run(template, context), final)

    def _run(self, template: str, context: dict[str, Any]) -> str:
        request = {
            "template": template,
            "context": context,
            "max_output": self.limits.output_chars,
            "cpu_seconds": self.limits.cpu_seconds,
        }
        with self._lock:
            if self._worker is None or not self._worker.usable():
                self._worker = _Worker()
            return self._worker.ask(request, self.limits)


# What a template may see: plain JSON types, bounded ----------------------------------------------


class _Budget:
    """Counts down the characters that one conversation may bring."""

    def __init__(self, chars: int) -> None:
        self.limit = self.left = chars

    def take(self, chars: int) -> None:
        self.left -= chars
        if self.left < 0:
            raise InvalidPrompt(f"the conversation is longer than the limit of {self.limit} characters")


def _plain(value: Any, where: str, budget: _Budget, depth: int = 0) -> Any:
    """A copy of `value` in JSON types: anything else is refused, with its place named."""
    if depth > MAX_DEPTH:
        raise InvalidPrompt(f"{where}: nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        budget.take(1)
        return value
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise InvalidPrompt(f"{where}: an integer of {value.bit_length()} bits; the limit is {MAX_INT_BITS}")
        budget.take(1)
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidPrompt(f"{where}: {value} is not a finite number")
        budget.take(1)
        return float(value)
    if isinstance(value, str):
        budget.take(len(value))
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidPrompt(
                f"{where}: character {error.start} is a lone surrogate, U+{ord(value[error.start]):04X}"
            ) from None
        return str.__str__(value)
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidPrompt(f"{where}: key {key!r} is not a string")
            plain[_plain(key, f"key of {where}", budget)] = _plain(item, f"{where}[{key!r}]", budget, depth + 1)
        return plain
    if isinstance(value, list | tuple):
        budget.take(1)
        return [_plain(item, f"{where}[{i}]", budget, depth + 1) for i, item in enumerate(value)]
    raise InvalidPrompt(f"{where}: {type(value).__name__} is not text, a number, a list or a mapping")


def _plain_tool(tool: Tool, index: int, budget: _Budget) -> Any:
    """A tool as JSON schema; a Python function is described by its type hints and docstring, as in transformers."""
    if callable(tool):
        from transformers.utils.chat_template_utils import get_json_schema

        try:
            tool = get_json_schema(tool)
        except Exception as error:  # several kinds, all about hints and docstring of the caller's function
            raise InvalidParam(f"tools[{index}]: {error}") from error
    if not isinstance(tool, Mapping):
        raise InvalidParam(f"tools[{index}] must be a JSON schema or a function, not {type(tool).__name__}")
    return _plain(tool, f"tools[{index}]", budget)


def _plain_messages(messages: Sequence[Mapping[str, Any]], budget: _Budget) -> list[dict[str, Any]]:
    """Checked copies of `messages`, without keys that are None, with reasoning under the names templates read."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidPrompt(f"messages must be a list of mappings with 'role' and 'content', not {_name(messages)}")
    if not messages:
        raise InvalidPrompt("messages is empty: a conversation needs at least one message")
    plain = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidPrompt(f"{where} must be a mapping with 'role' and 'content', not {_name(message)}")
        copy = _plain({key: item for key, item in message.items() if item is not None}, where, budget)
        if not isinstance(copy.get("role"), str):
            raise InvalidPrompt(f"{where}['role'] must be a string, not {_name(copy.get('role'))}")
        _check_content(copy, where)
        reasoning = next((copy[key] for key in REASONING_KEYS if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        plain.append(copy)
    return plain


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and "tool_calls" in message):
        return
    if not isinstance(content, list):
        raise InvalidPrompt(f"{where}['content'] must be text or a list of text parts, not {_name(content)}")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidPrompt(
                f"{where}['content'][{i}] must be {{'type': 'text', 'text': str}}: only text can be read by this model"
            )


def _name(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


# Leaving the last message open -------------------------------------------------------------------


def _mark_final_message(conversation: list[dict[str, Any]]) -> str:
    """Append a mark to the text of the last message, in place; return that text."""
    content = conversation[-1].get("content")
    if isinstance(content, str):
        conversation[-1]["content"] = content + CONTINUE_MARK
        return content
    if not content:
        raise InvalidPrompt(f"messages[{len(conversation) - 1}] has no text for continue_final_message to go on from")
    text: str = content[-1]["text"]
    content[-1]["text"] = text + CONTINUE_MARK
    return text


def _cut_at_mark(rendered: str, final: str) -> str:
    """`rendered` up to the mark; where the template stripped the message, so is the end of the text."""
    at = rendered.rfind(CONTINUE_MARK.strip())
    if at < 0 or final.strip() not in rendered:
        raise ChatTemplateError(
            "the template changes or drops the last message, so continue_final_message cannot find where to go on"
        )
    kept = rendered[:at]
    return kept if rendered.startswith(CONTINUE_MARK, at) else kept.rstrip()


# The child process -------------------------------------------------------------------------------


class _Worker:
    """One template_worker.py process: a question, an answer, and a kill where none comes."""

    def __init__(self) -> None:
        import jinja2
        import markupsafe

        folders = {str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)}
        if not sys.executable:
            raise ChatTemplateError("chat templates are rendered in a child Python, and sys.executable is not set")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER), *sorted(folders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ},
            )
        except OSError as error:
            raise ChatTemplateError(f"cannot start the process that renders chat templates: {error}") from error
        self._owner = os.getpid()
        self._started = False
        self.close = weakref.finalize(self, _end, self._process, self._owner)

    def usable(self) -> bool:
        """Whether the process lives, and is ours: a fork of this program must start its own."""
        return self.close.alive and self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: dict[str, Any], limits: ChatLimits) -> str:
        """Send one request and wait for the text. Any failure but a polite one ends the process."""
        wall = 10 * limits.cpu_seconds + (0 if self._started else START_SECONDS)
        late = threading.Event()
        message = json.dumps(request).encode()
        timer = threading.Timer(wall, self._give_up, [late])
        timer.daemon = True
        timer.start()
        try:
            status, text = self._exchange(message, 4 * limits.output_chars)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError | EOFError | ValueError):
                raise
            reason = f"took more than {wall:g} s" if late.is_set() else _cause(self._process.returncode, limits)
            raise ChatTemplateError(f"the chat template {reason}") from error
        finally:
            timer.cancel()
        self._started = True
        if status == b"!":
            self.close()
        if status != b"+":
            raise ChatTemplateError(f"the chat template failed: {text}")
        return text

    def _give_up(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def _exchange(self, request: bytes, max_reply: int) -> tuple[bytes, str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(len(request).to_bytes(8, "big") + request)
        self._process.stdin.flush()
        size = int.from_bytes(_read(self._process.stdout, 8), "big")
        if not 1 <= size <= max_reply + 2**16:
            raise ValueError(f"a reply of {size} bytes")
        status = _read(self._process.stdout, 1)
        return status, _read(self._process.stdout, size - 1).decode()


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("the process ended")
    return data


def _cause(returncode: int | None, limits: ChatLimits) -> str:
    if returncode is not None and returncode == -getattr(signal, "SIGPROF", 0):
        return f"took more than {limits.cpu_seconds:g} s of processor time: it loops, or computes something huge"
    return f"ended the process that renders it (exit status {returncode})"


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Close the pipes; in the program that started it, also kill and reap the process."""
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:  # unsent bytes for a process that is gone
            continue
    if os.getpid() == owner:
        process.kill()
        process.wait()
