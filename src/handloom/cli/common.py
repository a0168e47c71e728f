"""What the commands share: loading with a progress bar, and how text reaches a terminal.

Standard output carries the result and nothing else; all the rest goes to standard error. On a terminal,
control characters in generated text are shown as symbols, so that a model cannot drive the terminal;
written to a pipe or a file, text is passed on as it is.

This module does not know any command. torch and transformers are imported only where a command runs.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from handloom.errors import InvalidPrompt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from handloom.cli.arguments import Generation, Loading
    from handloom.lm import LM
    from handloom.measure.peer import Transformers
    from handloom.model.loading import Progress
    from handloom.output import Output

# Standard error --------------------------------------------------------------------------------


def error_console() -> Console:
    """Standard error as rich sees it, without markup, so that file names are shown as they are."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty())


def say(text: str, quiet: bool = False) -> None:
    """A line for people on standard error, dimmed on a terminal."""
    if not quiet:
        error_console().print(printable(text), style="dim")


def complain(error: Exception) -> None:
    """An error in one line on standard error."""
    error_console().print("error: " + printable(" ".join(str(error).split())), style="red")


# Standard output -------------------------------------------------------------------------------

_SYMBOLS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}


def printable(text: str) -> str:
    r"""`text` with control characters (C0 but \t and \n, DEL, C1) as symbols: ESC becomes ␛, U+009B becomes \x9b."""
    return text.translate(_SYMBOLS)


class Writer:
    """Writes generated text as it comes; on a terminal made `printable`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self._last = "\n"

    def write(self, text: str) -> None:
        if text:
            self.stream.write(printable(text) if self.is_terminal else text)
            self.stream.flush()
            self._last = text[-1]

    def end_line(self) -> None:
        """A newline, unless the text ended with one."""
        if self._last != "\n":
            self.write("\n")


def show_table(table: Table) -> None:
    """A rich table on standard output; where that is no terminal, lines are neither wrapped nor filled with spaces."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 10_000
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)


def facts(rows: Mapping[str, str]) -> Table:
    """A table of two columns: a name, and what there is to say, made `printable`."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, printable(value))
    return table


def emit_json(value: Any, indent: int | None = None) -> None:
    """One JSON object on standard output; numbers that JSON has no words for become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def size(nbytes: float) -> str:
    """Bytes in words: 513 KiB, 1.50 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def summary(output: Output) -> str:
    """One line about a finished output: tokens, speed, why it ended, and the seed that gives it again."""
    timing, ended = output.timing, output.finish_reason
    rate = f", {timing.decode_tokens_per_second:.1f} tok/s" if timing.decode_tokens_per_second else ""
    why = f"{ended} {output.stop_string!r}" if ended == "stop_string" else ended
    first = f"first after {timing.time_to_first_token:.2f} s"
    seed = "" if output.seed is None else f" · seed {output.seed}"
    drafts = output.drafts
    right = f" · {drafts.accepted} of {drafts.drafted} drafted tokens were right" if drafts else ""
    return f"{timing.prompt_tokens} + {timing.new_tokens} tokens{rate}, {first} · ended by {why}{seed}{right}"


# Standard input --------------------------------------------------------------------------------


def read_stdin(max_bytes: int) -> str:
    """All of standard input as UTF-8 text without its final newline. Raises InvalidPrompt."""
    data = sys.stdin.buffer.read(max_bytes + 2)
    return decode_input(data.removesuffix(b"\n").removesuffix(b"\r"), max_bytes)


def decode_input(data: bytes, max_bytes: int, *, what: str = "standard input") -> str:
    """Bytes from a file as text. Raises InvalidPrompt for too many, or for what is not UTF-8."""
    if len(data) > max_bytes:
        raise InvalidPrompt(f"{what} has more than {max_bytes} bytes, which is the limit; shorten it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidPrompt(
            f"{what} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}; convert it first"
        ) from None


# Loading ---------------------------------------------------------------------------------------


def load_model(model: str | None, loading: Loading, *, quiet: bool) -> LM:
    """Load a model, with a bar on a terminal; say which it is and why. Raises what LM.from_pretrained raises."""
    started = time.perf_counter()
    with waiting("starting", quiet):
        from handloom import LM
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with notices(quiet), weights_bar(quiet) as progress:
        lm = LM.from_pretrained(model, **asdict(loading), progress=progress)
    held = ", ".join(f"{size(nbytes)} {name}" for name, nbytes in lm.held.items())
    say(f"model: {lm.origin}", quiet)
    say(f"{held} on {lm.device}, {lm.backend.name} backend, ready in {time.perf_counter() - started:.1f} s", quiet)
    return lm


def load_draft(asked: Generation, loading: Loading, *, quiet: bool) -> dict[str, Any]:
    """The draft model as an option of `LM.generate`, if one is asked for.

    It is loaded first: on a GPU the other one's cache takes what is left.
    """
    if asked.draft_model is None:
        return {}
    own = replace(loading, quantize=asked.draft_quantize, gpu_memory_fraction=None, revision=None)
    return {"assistant_model": load_model(asked.draft_model, own, quiet=quiet)}


def load_peer(path: Path, lm: LM, *, quiet: bool) -> Transformers:
    """transformers with the checkpoint that the model was loaded from. Raises what Transformers.load raises."""
    import transformers

    from handloom.measure.peer import Transformers

    transformers.logging.set_verbosity_error()
    slow = ", which takes tens of seconds for a GGUF file" if path.suffix == ".gguf" else ""
    say(f"transformers loads the same{slow}", quiet)
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():  # it has progress bars of its own
        return Transformers.load(path, lm.dtype, lm.device)


@contextmanager
def notices(quiet: bool) -> Iterator[None]:
    """What handloom logs meanwhile, such as that it compiles, as lines for people."""

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage(), quiet)

    logger, handler = logging.getLogger("handloom"), Said(logging.INFO)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def waiting(what: str, quiet: bool) -> Iterator[None]:
    """A spinner on standard error while something runs; nothing where that is no terminal."""
    console = error_console()
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield


@contextmanager
def tokens_bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A callback for how many of `total` tokens there are, which shows them and their rate until the block ends."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = error_console()
    columns = (
        TextColumn(f"{printable(what)}:"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, {task.fields[rate]}"),
    )
    started = time.perf_counter()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total, rate="")
        yield lambda done: bar.update(
            task, completed=done, rate=f"{done / max(1e-9, time.perf_counter() - started):.0f} tok/s"
        )


@contextmanager
def weights_bar(quiet: bool) -> Iterator[Progress]:
    """A progress callback that shows itself at its first call, and goes when the block ends."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = error_console()
    columns = TextColumn("loading weights"), BarColumn(), DownloadColumn(binary_units=True)
    bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
    task = bar.add_task("")

    def report(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        bar.start()

    try:
        yield report
    finally:
        bar.stop()
