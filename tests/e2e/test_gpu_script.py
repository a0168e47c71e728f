"""benchmarks/gpu.sh with an interpreter that plays every step: what fails, hangs or is killed keeps no other from
running, is said at the end, and is what another call goes on with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PLAYER = """#!/usr/bin/env bash
# called as Python is; what a step does stands in a file named after it
case "$*" in
"-c "*) exit 1 ;;                                      # is a module there?
"- "*) cat >/dev/null && exit 0 ;;                     # the versions
"-m benchmarks.report "*) echo "the tables" && exit 0 ;;
*"-m pytest"*test_same_answers*) step=answers ;;
*"-m pytest"*) step=tests ;;
*gpu.py*) step=$2 ;;
*) step=$(basename "$1" .py) ;;
esac
echo "$step" >>"$PLAYED/begun"
. "$PLAYED/$step"
"""
FINE = {
    "answers": 'echo "tests/a.py::test_b PASSED"',
    "tests": 'echo "tests/a.py::test_b PASSED"',
    **{
        step: f'echo "{{\\"suite\\": \\"{step}\\"}}" >>"$RESULTS/gpu.jsonl"; printf "In short\\n{step}: tok/s 7\\n"'
        for step in ("latency", "batch", "throughput", "prefill", "sampling", "load")
    },
    "kernels": 'echo "kernel      cases failed"',
    "pdl": 'echo "| case | who |"',
}
FILES = {"gpu.jsonl", "gpu.md", "log.txt", "summary.txt", "done"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for bash and GNU timeout")


def environment(folder: Path, steps: dict[str, str], **options: object) -> dict[str, str]:
    for step, code in {**FINE, **steps}.items():
        (folder / step).write_text(code)
    player = folder / "player"
    player.write_text(PLAYER)
    player.chmod(0o755)
    own = {"PYTHON": player, "PLAYED": folder, "RESULTS": folder / "results", "DEVICE": "cpu", **options}
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def play(folder: Path, steps: dict[str, str], **options: object) -> tuple[int, str]:
    done = subprocess.run([SCRIPT], env=environment(folder, steps, **options), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdicts(output: str) -> dict[str, str]:
    """What the end of the output says of each step, the lines below it included."""
    end = re.split(r"\n== In \d+ s:\n", output)[1]
    return {said.partition(":")[0]: said.partition(": ")[2].strip() for said in re.split(r"\n(?! )", end) if said}


def begun(folder: Path) -> list[str]:
    return (folder / "begun").read_text().split()


def test_all_goes_well_and_five_files_are_left(tmp_path: Path) -> None:
    status, output = play(tmp_path, {})
    assert status == 0, output
    found = verdicts(output)
    assert [*found] == begun(tmp_path) and len(found) == 10
    assert all(re.fullmatch(r"ok, \d+ s", verdict) for verdict in found.values())
    assert {path.name for path in (tmp_path / "results").iterdir()} == FILES
    assert (tmp_path / "results" / "gpu.md").read_text() == "the tables\n"
    assert "latency: tok/s 7" in output and "1 PASSED" in output
    assert play(tmp_path, {}, RESUME=1)[0] == 0 and len(begun(tmp_path)) == 10, "nothing is left to do"


def test_what_fails_is_said_and_done_again_and_what_went_well_is_not(tmp_path: Path) -> None:
    steps = {
        "answers": 'echo "tests/a.py::test_c FAILED"; echo "E   assert 1 == 2"; exit 1',
        "batch": 'echo "Traceback"; echo "RuntimeError: no such thing"; exit 1',
        "prefill": 'printf "In short\\nfailed: prefill: 1b: Error: gone\\n"; exit 1',
        "kernels": 'printf "kernel      cases failed\\nnorm: a: handloom: Error: bad\\n"; exit 1',
        "sampling": "kill -SEGV $$",
    }
    status, output = play(tmp_path, steps)
    found = verdicts(output)
    assert status == 1 and len(found) == 10
    assert {step for step, verdict in found.items() if not verdict.startswith("ok")} == set(steps)
    for step, why in {
        "answers": "assert 1 == 2", "batch": "RuntimeError: no such thing", "prefill": "Error: gone",
        "kernels": "norm: a: handloom: Error: bad", "sampling": "status 139",
    }.items():  # fmt: skip
        assert "FAILED" in found[step] and why in found[step]
    assert "test_c FAILED" in found["answers"]
    assert {path.name for path in (tmp_path / "results").iterdir()} == FILES
    rows = (tmp_path / "results" / "gpu.jsonl").read_text().splitlines()
    (tmp_path / "begun").unlink()
    elsewhere = tmp_path / "elsewhere"
    status, output = play(tmp_path, FINE, RESUME=tmp_path / "results", RESULTS=elsewhere)
    assert status == 0 and set(verdicts(output)) == set(begun(tmp_path)) == set(steps)
    kept = (elsewhere / "gpu.jsonl").read_text().splitlines()
    assert kept[: len(rows)] == rows and len(kept) == len(set(kept)) == 6


def test_a_step_that_hangs_has_its_share_and_no_more(tmp_path: Path) -> None:
    hang = 'echo "I had got so far"; sleep 60 & wait'
    status, output = play(tmp_path, {"pdl": hang}, STEPS="pdl load", SECONDS_IN_ALL=17)
    found = verdicts(output)
    assert status == 1 and found["load"].startswith("ok")
    assert re.match(r"OUT OF TIME after \d+ s", found["pdl"]) and "I had got so far" in found["pdl"]
    status, output = play(tmp_path, {}, STEPS="pdl load", SECONDS_IN_ALL=3)
    assert status == 1 and {said.partition(",")[0] for said in verdicts(output).values()} == {"NOT BEGUN"}


def test_very_much_output_leaves_the_verdicts_in_sight(tmp_path: Path) -> None:
    much = 'for i in $(seq 3000); do echo "tests/a.py::test_$i FAILED"; echo "E   $(printf %0300d $i)"; done; exit 1'
    line = 'for i in $(seq 99); do echo "latency: $(printf %0300d $i)"; done'
    steps = {"answers": much, "tests": much, "latency": f"echo In short; {line}; exit 1"}
    status, output = play(tmp_path, steps, MOST_LOGGED=100_000)
    assert status == 1
    last = output[-12_000:]
    assert len(verdicts(last)) == 10 and "of the middle" not in last
    assert (tmp_path / "results" / "log.txt").stat().st_size < 400_000


def test_killed_in_the_middle_it_goes_on_there(tmp_path: Path) -> None:
    steps = {"throughput": FINE["throughput"] + "; sleep 60 & wait"}
    script = subprocess.Popen(
        [SCRIPT], env=environment(tmp_path, steps), stdout=subprocess.PIPE, start_new_session=True
    )
    began = tmp_path / "begun"
    while not began.exists() or "throughput" not in began.read_text():
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGKILL)
    script.communicate()
    assert len([*(tmp_path / "results").iterdir()]) <= 8
    began.unlink()
    assert play(tmp_path, FINE, RESUME=1)[0] == 0
    assert begun(tmp_path) == ["throughput", "prefill", "tests", "kernels", "sampling", "pdl", "load"]


def test_a_step_that_there_is_not_is_said_before_anything_runs(tmp_path: Path) -> None:
    status, output = play(tmp_path, {}, STEPS="latency speed")
    assert status == 2 and "no step is called speed; there are answers" in output
    assert not (tmp_path / "begun").exists()


def test_the_tests_of_the_gpu_need_neither_gguf_nor_llguidance() -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('gguf', 'llguidance')); import pytest; sys.exit(pytest.main())"
    named = re.findall(r"tests/(?:parity|kernels)/[a-z_]+\.py", SCRIPT.read_text())
    assert "tests/parity/test_same_answers.py" in named and "tests/parity/test_triton_backend.py" in named
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    run = subprocess.run(
        [sys.executable, "-c", code, *options, *named, "tests/kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_without_a_gpu_tests_of_one_are_refused_and_others_see_none() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/unit/test_rng.py",
    ]
    for device, what in (("cuda", "torch sees no GPU"), ("tpu", "expected cpu or cuda")):
        given = {**os.environ, "HANDLOOM_TEST_DEVICE": device, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        run = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
        assert run.returncode == 4 and what in run.stderr + run.stdout
    if os.environ.get("HANDLOOM_TEST_DEVICE") != "cuda":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["HIP_VISIBLE_DEVICES"] == ""
