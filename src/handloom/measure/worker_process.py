"""An engine in a process of its own: started, asked, and ended, whatever it does; see `handloom.measure.workers`.

This module does not know what is measured, or which engines there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from handloom.errors import RequestFailed
from handloom.measure.speed import check_counts

WORKERS = Path(__file__).with_name("workers")
MAX_LINE = 1 << 26
LAST_WORDS = 300


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine to measure: its name, the file of its adapter, the Python that has it, and keywords of its own."""

    name: str
    adapter: Path
    python: str = sys.executable
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one generation: seconds, new tokens of each prompt, and the most bytes its process has held until then."""

    seconds: float
    tokens: list[list[int]]
    peak: int


class Worker:
    """A running engine; `close` it, or use it as a context manager.

    timeout: seconds that loading, or an answer, may take. Methods raise RequestFailed with the process's own last words
    where it ends, is too slow, or answers with something else.
    """

    def __init__(self, contender: Contender, settings: dict[str, Any], timeout: float) -> None:
        self.name, self._timeout = contender.name, timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        command = [
            contender.python,
            str(WORKERS / "worker.py"),
            str(contender.adapter),
            json.dumps({**settings, **contender.options}),
        ]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(contender.python, settings["threads"]),
            )
        except OSError as cause:
            self._errors.close()
            raise RequestFailed(f"{contender.name} does not start: {cause}") from cause
        assert self._process.stdout is not None
        self._lines: SimpleQueue[bytes] = SimpleQueue()
        self._pump = threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True)
        self._pump.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def loaded(self) -> tuple[float, dict[str, Any]]:
        """Seconds of loading, what was imported before apart, and what the adapter says about the engine."""
        found = self._answer()
        try:
            return float(found["load"]), dict(found["about"])
        except (KeyError, TypeError, ValueError) as cause:
            raise RequestFailed(f"{self.name} answered with {str(found)[:100]} when it was loaded") from cause

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Answer:
        """Generate `new_tokens` greedy tokens for each prompt, their number checked."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failed("ended") from None
        found = self._answer()
        try:
            answer = Answer(float(found["seconds"]), [list(row) for row in found["tokens"]], int(found["peak"]))
        except (KeyError, TypeError, ValueError) as cause:
            raise RequestFailed(f"{self.name} answered with {str(found)[:100]}") from cause
        if len(answer.tokens) != len(prompts):
            raise RequestFailed(f"{self.name} answered {len(answer.tokens)} prompts of {len(prompts)}")
        check_counts(self.name, [len(row) for row in answer.tokens], new_tokens)
        return answer

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._timeout)
        except Empty:
            self._process.kill()
            raise self._failed(f"gave no answer within {self._timeout:g} s") from None
        if not line:
            raise self._failed("ended")
        try:
            found = json.loads(line)
        except ValueError as cause:
            raise RequestFailed(f"{self.name} answered with {line[:100]!r}") from cause
        if not isinstance(found, dict):
            raise RequestFailed(f"{self.name} answered with {line[:100]!r}")
        return found

    def _failed(self, how: str) -> RequestFailed:
        """What to raise for a process that ended, or will: its last line on standard error says why."""
        status = self._process.wait()
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4096))
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f": {words[-1][:LAST_WORDS]}" if words else ""
        return RequestFailed(f"{self.name} {how}, exit status {status}{last}")

    def close(self) -> None:
        """End the process, and wait for that."""
        self._process.kill()
        self._process.wait()
        self._pump.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # of a line that it did not read
                stream.close()
        self._errors.close()


def _pump(stream: IO[bytes], lines: SimpleQueue[bytes]) -> None:
    """Lines of the stream to the queue; an empty one is its end."""
    while True:
        line = stream.readline(MAX_LINE)
        lines.put(line)
        if not line:
            return


def _environment(python: str, threads: int) -> dict[str, str]:
    """Variables of a worker: so many threads; another Python does not look for packages where this one was told to."""
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if python != sys.executable:
        found.pop("PYTHONPATH", None)
    return found
