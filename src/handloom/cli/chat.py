"""`handloom chat`: a conversation in the terminal.

Standard input may be a pipe: then every line is a message, and the exit status is 1 if one of them had no answer.

This module does not know chat templates or the KV cache.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handloom.cli import common
from handloom.cli.arguments import Generation, Loading, ModelOption, Quiet
from handloom.errors import HandloomError, InvalidParam

if TYPE_CHECKING:
    from handloom.conversation import Conversation

NEW_TOKENS = 1024
PROMPT = "> "
HELP = """\
/system TEXT  set the system message (without TEXT: show it)
/reset        forget the conversation
/help         this
/exit         leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""


def chat(
    model: ModelOption = None,
    *,
    system: Annotated[str | None, typer.Option(help="System message. Default: the chat template's own.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help=f"At most so many in an answer; fewer where the context ends. Default: {NEW_TOKENS}.",
            min=1,
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    asked: Generation,
    loading: Loading,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."""
    options = asked.options(max_new_tokens=max_new_tokens)
    said = options.get("generation_config", {}) | options
    options = {"num_return_sequences": 1} | options | {"max_new_tokens": said.get("max_new_tokens", NEW_TOKENS)}
    if "max_length" in said:
        raise InvalidParam("max_length counts the whole conversation; limit an answer with --max-new-tokens")
    options |= common.load_draft(asked, loading, quiet=quiet)
    lm = common.load_model(model, loading, quiet=quiet)
    from handloom.conversation import Conversation

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        common.say("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.", quiet)
    failures = 0
    with Conversation(lm, system) as conversation:
        conversation.check(**options)  # fails now, if ever
        for line in _read_terminal() if terminal else _read_pipe():
            if line.startswith("/"):
                if not _command(conversation, line):
                    break
            elif line.strip():
                failures += not _answer(conversation, line, options, quiet or not terminal)
    if failures and not terminal:
        raise typer.Exit(1)


# Input -----------------------------------------------------------------------------------------


def _read_terminal() -> Iterator[str]:
    """Messages typed at the prompt, until Ctrl-D; with readline's editing and history where there is one."""
    if sys.platform != "win32":
        import readline  # noqa: F401  (importing it is what turns it on)
    while True:
        try:
            line = input(PROMPT)
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input(" " * len(PROMPT))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            common.say("Ctrl-D or /exit leaves")
            continue
        yield line


def _read_pipe() -> Iterator[str]:
    """Lines of standard input. Raises InvalidPrompt for one that is too long or not UTF-8."""
    from handloom.text.tokenizer import MAX_TEXT_BYTES

    while data := sys.stdin.buffer.readline(MAX_TEXT_BYTES + 2):
        line = common.decode_input(data.removesuffix(b"\n").removesuffix(b"\r"), MAX_TEXT_BYTES)
        while line.endswith("\\") and (data := sys.stdin.buffer.readline(MAX_TEXT_BYTES + 2)):
            line = line[:-1] + "\n" + common.decode_input(data.removesuffix(b"\n").removesuffix(b"\r"), MAX_TEXT_BYTES)
        yield line


# One turn --------------------------------------------------------------------------------------


def _command(conversation: Conversation, line: str) -> bool:
    """Carry out a line that begins with a slash; False to leave."""
    name, _, rest = line.partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        conversation.reset()
        common.say("the conversation is forgotten")
    elif name == "/system":
        conversation.system = rest.strip() or conversation.system
        common.say("system message: " + (conversation.system or "the chat template's own"))
    elif name == "/help":
        common.say(HELP)
    else:
        common.say(f"there is no {name}; /help lists the commands. To send it as a message, put a space before it")
    return True


def _answer(conversation: Conversation, text: str, options: dict[str, Any], quiet: bool) -> bool:
    """Stream one answer. An error is shown (then False) and the conversation goes on without the question."""
    writer = common.Writer()
    try:
        with _on_interrupt(conversation.stop):
            for piece in conversation.send(text, **options):
                writer.write(piece.text)
    except HandloomError as error:
        writer.end_line()
        common.complain(error)
        return False
    writer.end_line()
    output = conversation.output
    assert output is not None
    if output.finish_reason == "aborted":
        common.say("stopped")
    elif output.finish_reason == "length":
        common.say(f"cut after {len(output.token_ids)} tokens: {_limit(conversation, len(output.token_ids), options)}")
    elif not quiet:
        kept = f"{conversation.num_reused} of {len(output.prompt_token_ids)} prompt tokens were cached"
        used = f"{conversation.num_tokens} of {conversation.lm.max_context} tokens of context used"
        common.say(f"{output.timing.decode_tokens_per_second:.1f} tok/s · {kept} · {used}")
    return True


def _limit(conversation: Conversation, new_tokens: int, options: dict[str, Any]) -> str:
    if new_tokens == options["max_new_tokens"]:
        return "--max-new-tokens"
    return f"the context of {conversation.lm.max_context} is full; /reset starts anew"


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block Ctrl-C calls `stop` and raises nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
