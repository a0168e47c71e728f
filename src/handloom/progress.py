"""A bar on standard error for many requests: how many are done, and how many tokens come per second.

This module does not know what a request is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from handloom.errors import InvalidParam

SECONDS_BETWEEN = 0.1

Tell = Callable[[bool, bool], None]


@contextmanager
def requests_bar(total: int, show: bool | None) -> Iterator[Tell]:
    """A function to be told of each event, (is it a token, is it the end of a request); the bar goes with the block.

    show: None for where there are several requests and standard error is a terminal. On another standard error a bar
    that is to be shown is one line, written at the end. Raises InvalidParam.
    """
    if show is not None and not isinstance(show, bool):
        raise InvalidParam(f"progress is {show!r}; expected True, False, or None for lists of prompts on a terminal")
    if show is False or (show is None and not (total > 1 and sys.stderr.isatty())):
        yield lambda is_token, is_end: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    started = told = time.monotonic()
    done = tokens = 0
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("", total=total, rate="")

        def tell(is_token: bool, is_end: bool) -> None:
            nonlocal done, tokens, told
            tokens, done, now = tokens + is_token, done + is_end, time.monotonic()
            if now - told > SECONDS_BETWEEN or done == total:
                told = now
                bar.update(task, completed=done, rate=f"{tokens / max(1e-9, now - started):.0f} tok/s")

        yield tell
