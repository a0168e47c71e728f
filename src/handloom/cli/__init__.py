"""The command line. One module per command; each imports the heavy libraries only when it runs.

This module does not know what the commands do.
"""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated

import typer

from handloom.cli import bench, chat, env, generate, inspect, parity, score
from handloom.cli.arguments import guarded

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate.generate, chat.chat, score.score, inspect.inspect, parity.parity, env.env):
    app.command()(guarded(command))
app.add_typer(bench.bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        from handloom import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def handloom(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generate text with a language model, and see how it is done."""


def main() -> None:
    """Entry point of the console script; exits with 0, 1 (an error that was explained), 2 (usage) or 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    finally:
        gc.freeze()  # Python would look through all that torch made once more: a quarter of a second
