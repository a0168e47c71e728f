"""What the commands share: options, loading with a progress bar, and how text reaches a terminal.

Standard output carries the result and nothing else; all the rest goes to standard error. On a terminal,
control characters in generated text are shown as symbols, so that a model cannot drive the terminal;
written to a pipe or a file, text is passed on as it is.

This module does not know any command. torch and transformers are imported only where a command runs.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer

from handloom.errors import HandloomError, InvalidPrompt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from handloom.lm import LM
    from handloom.model.loading import Progress
    from handloom.output import Output

MODEL_HELP = (
    "A folder, a .gguf file, a model on the Hub ('org/name', 'org/name:file.gguf') or a shipped one. "
    "Default: $HANDLOOM_MODEL, else SmolLM2-135M-Instruct."
)

ModelArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP, show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP, rich_help_panel="Model")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel="Model")]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.", rich_help_panel="Model")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Hold matrices as int8, int4, int8:64, int4-sym:32, … (bits, zero points or not, columns per scale). "
        "Default: as the file has them.",
        rich_help_panel="Model",
        show_default=False,
    ),
]
BackendName = Annotated[str, typer.Option("--backend", help="What computes the model.", rich_help_panel="Model")]
MaxContext = Annotated[
    int | None, typer.Option(help="Tokens a sequence may have; default: the model's own.", rich_help_panel="Model")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel="Model")]

Temperature = Annotated[
    float | None,
    typer.Option(help="0 is greedy; any other value samples. Default: as the model says.", rich_help_panel="Sampling"),
]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely; 0: all.", rich_help_panel="Sampling")]
TopP = Annotated[float | None, typer.Option(help="… from the most likely that make up p.", rich_help_panel="Sampling")]
MinP = Annotated[
    float | None, typer.Option(help="… from those above p times the most likely.", rich_help_panel="Sampling")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: tokens seen before get less likely.", rich_help_panel="Sampling")
]
Seed = Annotated[
    int | None,
    typer.Option(help="Same seed, same tokens. Implies sampling. Default: a fresh one.", rich_help_panel="Sampling"),
]
Stop = Annotated[
    list[str] | None, typer.Option(help="End at this text; may be given several times.", rich_help_panel="Sampling")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on standard error but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a --debug option: an error that says what is wrong is one line and exit status 1, Ctrl-C is 130.

    A closed pipe is left to typer, which ends quietly.
    """

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **options: Any) -> None:
        try:
            command(*args, **options)
        except (HandloomError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            complain(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    hints = {**get_type_hints(command, include_extras=True), "debug": Debug}
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()]
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__annotations__ = hints
    run.__signature__ = inspect.Signature([*own, debug])  # type: ignore[attr-defined]
    return run


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: None and empty lists mean that the model, or the engine, decides."""
    return {name: value for name, value in options.items() if value is not None and value != []}


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
    return f"{timing.prompt_tokens} + {timing.new_tokens} tokens{rate}, {first} · ended by {why}{seed}"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What decides which model is loaded, and how; the fields are arguments of `LM.from_pretrained`."""

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    quantize: str | None = None
    max_context: int | None = None
    kv_cache_tokens: int | None = None
    revision: str | None = None


def load_model(options: ModelOptions, *, quiet: bool = False) -> LM:
    """Load a model, with a bar on a terminal; say which it is and why. Raises what LM.from_pretrained raises."""
    started = time.perf_counter()
    with waiting("starting", quiet):
        from handloom.lm import LM
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with notices(quiet), weights_bar(quiet) as progress:
        lm = LM.from_pretrained(
            options.model,
            device=options.device,
            dtype=options.dtype,
            backend=options.backend,
            quantize=options.quantize,
            max_context=options.max_context,
            kv_cache_tokens=options.kv_cache_tokens,
            revision=options.revision,
            progress=progress,
        )
    held = ", ".join(f"{size(nbytes)} {name}" for name, nbytes in lm.held.items())
    say(f"model: {lm.origin}", quiet)
    say(f"{held} on {lm.device}, {lm.backend.name} backend, ready in {time.perf_counter() - started:.1f} s", quiet)
    return lm


@contextmanager
def notices(quiet: bool = False) -> Iterator[None]:
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
def waiting(what: str, quiet: bool = False) -> Iterator[None]:
    """A spinner on standard error while something runs; nothing where that is no terminal."""
    console = error_console()
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield


@contextmanager
def tokens_bar(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
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
def weights_bar(quiet: bool = False) -> Iterator[Progress]:
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
