"""One engine in a process of its own: `python worker.py ADAPTER SETTINGS`.

ADAPTER: a file with a class `Engine` (see this folder's __init__.py); SETTINGS: its keywords, a JSON object. A line of
JSON goes out when the engine is loaded, {"load": seconds, "about": …}, and one for each that comes in: {"prompts": …,
"new_tokens": …} is answered by {"seconds": …, "tokens": …, "peak": bytes}. What libraries print goes to standard error.
Nothing is caught: the last line of standard error says why a process ended.

It runs under any Python from 3.10 with the standard library alone. This module does not know any engine.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def peak_memory() -> int:
    """Most physical memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    adapter = runpy.run_path(sys.argv[1])
    started = time.perf_counter()
    engine = adapter["Engine"](**json.loads(sys.argv[2]))
    answer(load=time.perf_counter() - started, about=engine.about)
    for line in sys.stdin:
        started = time.perf_counter()
        tokens = engine.run(**json.loads(line))
        answer(seconds=time.perf_counter() - started, tokens=tokens, peak=peak_memory())


if __name__ == "__main__":
    main()
