"""SAFETY rows 17 to 19: bad, exploding and endless grammars, in a process of their own with 4 GiB.

Each is refused by name, works, or fails in the middle by name; none crashes, hangs or prints.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REFUSED = {"http://127", "file:///", r"(a)\1", "(?<=a)b", "@nothing", "<nobody>", "os.path"}


@pytest.fixture(scope="module")
def attacks() -> dict[str, object]:
    command = [sys.executable, str(Path(__file__).parents[1] / "grammar_attacks.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stderr == ""
    (line,) = ended.stdout.splitlines()
    found: dict[str, object] = json.loads(line)
    return found


def test_safety_17_18_19_hostile_grammars_are_refused_work_or_give_up_by_name(attacks: dict[str, object]) -> None:
    results = attacks["results"]
    assert isinstance(results, list)
    outcomes = {outcome for _, _, outcome, _ in results}
    assert outcomes == {"refused", "works", "gave up"}
    for option, value, outcome, seconds in results:
        assert seconds < 20, (option, value)
        if any(word in value for word in REFUSED):
            assert outcome == "refused", (option, value)


def test_safety_19_compiling_leaves_no_thread_and_no_setting_behind(attacks: dict[str, object]) -> None:
    assert (attacks["threads"], attacks["stack"]) == (1, 0)
