"""The command line. One module per command; each imports the heavy libraries only when it runs.

This module does not know what the commands do.
"""

from __future__ import annotations

import io
import sys

import typer

from handloom.cli import chat, env, generate, inspect
from handloom.cli.common import guarded

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="handloom: generate text with a language model, and see how it is done.",
)
for command in (generate.generate, chat.chat, inspect.inspect, env.env):
    app.command()(guarded(command))


def main() -> None:
    """Entry point of the console script; exits with 0, 1 (an error that was explained), 2 (usage) or 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
