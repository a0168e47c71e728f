"""`handloom bench cpu` with engines that are a few lines of Python: what fails is left out and said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from handloom import machine
from handloom.errors import RequestFailed
from handloom.measure import cpu_suite, limits
from handloom.measure.cpu_suite import Case, Group, Roofs, Settings
from handloom.measure.results import Results
from handloom.measure.worker_process import Contender, Worker
from handloom.model.families import read_config
from tiny_models import tiny_llama

ENGINE = """
import os, sys, time
print("what a library prints while it is imported")
class Engine:
    def __init__(self, *, precision, max_batch, **settings):
        self.precision, self.max_batch, self.settings, self.runs = precision, max_batch, settings, 0
        self.about = {"held": precision, "version": "1.2", "weight_bytes": 1000, "kv_dtype": "float32"}
    def run(self, *, prompts, new_tokens):
        print("what a library prints while it runs")
        self.runs += 1
        rows = [[sum(prompt) % 7 + i for i in range(new_tokens)] for prompt in prompts]
        BODY
        return rows
"""
SETTINGS = {"model": "m", "files": None, "precision": "fp32", "threads": 1, "max_batch": 2, "max_tokens": 9}


def engine(folder: Path, name: str, body: str = "pass") -> Contender:
    path = folder / f"{name}.py"
    path.write_text(ENGINE.replace("BODY", body))
    return Contender(name, path)


def settings(*, starts: int = 0, rounds: int = 2, timeout: float = 60) -> Settings:
    cases = [Case(kind, tokens, batch) for batch in (1, 2) for kind, tokens in (("pp", 8), ("tg", 4))]
    return Settings("m", None, 1, 50, cases, rounds, 1, starts, timeout)


@pytest.fixture(autouse=True)
def round_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda **_: 10e9)
    monkeypatch.setattr(limits, "matmul_rate", lambda *_: 1e12)


def measure(contenders: list[Contender], wanted: Settings, precision: str = "fp32") -> tuple[Group, list[str]]:
    said: list[str] = []
    group = cpu_suite.measure(wanted, precision, contenders, Roofs(), lambda _: None, said.append)
    return group, said


@pytest.mark.parametrize(
    ("precision", "looked_at", "rate"),
    [
        ("fp32", ["float32"], 1e12),
        ("bf16", ["float32", "bfloat16"], 6e12),
        ("int8", ["float32", "bfloat16", "int8"], 6e12),
        ("gguf", ["float32", "bfloat16", "int8"], 6e12),
    ],
)
def test_the_roof_is_the_fastest_product_of_numbers_that_the_weights_may_be_held_in(
    precision: str, looked_at: list[str], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, asked = {"float32": 1e12, "bfloat16": 6e12, "int8": 2e12}, []

    def matmul_rate(dtype: torch.dtype, _: torch.device) -> float:
        asked.append(str(dtype).removeprefix("torch."))
        return rates[asked[-1]]

    monkeypatch.setattr(limits, "matmul_rate", matmul_rate)
    roofs = Roofs()
    roofs.measure(precision, None)
    assert (asked, roofs.matmul(precision)) == (looked_at, rate)
    rates = dict.fromkeys(rates, 1.0)
    roofs.measure(precision, None)
    assert roofs.matmul(precision) == rate, "the best so far"


def test_peers_that_crash_answer_too_little_or_are_not_installed_are_a_line_each(tmp_path: Path) -> None:
    contenders = [
        engine(tmp_path, "handloom"),
        engine(tmp_path, "crashes", "if self.runs == 2: os._exit(7)"),
        engine(tmp_path, "says_why", "if self.runs == 3: raise ValueError('no more')"),
        engine(tmp_path, "too_short", "rows[-1] = rows[-1][:-1]"),
        engine(tmp_path, "too_few", "rows = rows[1:]"),
        engine(tmp_path, "missing"),
        Contender("no_python", tmp_path / "handloom.py", str(tmp_path / "nowhere" / "python")),
        engine(tmp_path, "differs", "rows = [[row[0]] + [9] * (len(row) - 1) for row in rows]"),
    ]
    (tmp_path / "missing.py").write_text("import a_package_that_nobody_has")
    group, said = measure(contenders, settings(starts=1))
    assert set(group.failed) == {"crashes", "says_why", "too_short", "too_few", "missing", "no_python"}
    assert said == [f"fp32: not measured: {group.failed[name]}" for name in group.failed]
    assert "exit status 7" in group.failed["crashes"]
    assert "ValueError: no more" in group.failed["says_why"]
    assert "generated [0] tokens; 1 were to be timed" in group.failed["too_short"]
    assert "answered 0 prompts of 1" in group.failed["too_few"]
    assert "No module named 'a_package_that_nobody_has'" in group.failed["missing"]
    assert "does not start" in group.failed["no_python"]
    for rates in group.rates.values():
        assert list(rates) == ["handloom", "differs"]
        assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    assert {name: list(peaks) for name, peaks in group.peaks.items() if name in ("handloom", "differs")} == {
        "handloom": [1, 2],
        "differs": [1, 2],
    }
    assert group.agreement == {"differs": pytest.approx(6 / 15)}  # of 1 + 4 + 2 + 8 tokens, the first of each row
    assert {name: len(starts) for name, starts in group.starts.items()} == {"handloom": 1, "differs": 1}


def test_no_engine_gains_by_answers_that_it_has_kept(tmp_path: Path) -> None:
    body = "seen = self.__dict__.setdefault('seen', []); assert prompts not in seen; seen.append(prompts)"
    group, said = measure([engine(tmp_path, "handloom", body)], settings())
    assert not said
    assert all(len(rates["handloom"]) == 2 for rates in group.rates.values())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tokens_are_compared_only_where_engines_hold_the_same_weights(tmp_path: Path, precision: str) -> None:
    group, _ = measure([engine(tmp_path, "handloom"), engine(tmp_path, "other")], settings(), precision)
    assert set(group.rates) and not group.agreement


def test_a_peer_that_hangs_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    contender = engine(tmp_path, "hangs", "time.sleep(600)")
    with Worker(contender, SETTINGS, timeout=1) as worker, pytest.raises(RequestFailed, match="no answer within 1 s"):
        worker.loaded()
        worker.run([[1]], 1)


@pytest.mark.parametrize("other_python", [False, True])
def test_an_engine_gets_settings_options_of_its_own_and_so_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_python: bool
) -> None:
    path, python = tmp_path / "shows.py", tmp_path / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    told = 'settings | {"omp": os.environ["OMP_NUM_THREADS"], "path": os.environ.get("PYTHONPATH")}'
    path.write_text(ENGINE.replace("BODY", "pass").replace('"held": precision', f'"held": {told}'))
    contender = Contender("shows", path, str(python) if other_python else sys.executable, {"extra": False})
    with Worker(contender, SETTINGS | {"threads": 3}, 60) as worker:
        load, about = worker.loaded()
    assert load >= 0
    held = about["held"]
    assert (held["omp"], held["model"], held["extra"]) == ("3", "m", False)
    assert held["path"] == (None if other_python else str(tmp_path / "packages"))


def test_what_is_no_answer_is_an_error_that_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "odd.py"
    path.write_text(ENGINE.replace("BODY", "rows = 5"))
    with Worker(Contender("odd", path), SETTINGS, 60) as worker:
        worker.loaded()
        with pytest.raises(RequestFailed, match="odd answered with"):
            worker.run([[1]], 1)


def test_prompts_of_a_batch_differ_and_are_the_same_every_time() -> None:
    case = Case("tg", 4, 32)
    prompts = case.prompts(50)
    assert len({tuple(prompt) for prompt in prompts}) == 32
    assert prompts == Case("tg", 4, 32).prompts(50)
    assert case.prompts(50, 1) == Case("tg", 4, 32).prompts(50, 1) != prompts
    assert [len(prompt) for prompt in Case("pp", 8, 2).prompts(50)] == [8, 8]
    assert len(Case("tg", 4, 60).prompts(50)) == 60


def test_the_limit_is_the_slower_roof_of_a_step() -> None:
    spec = read_config(tiny_llama().config.to_dict(), "tiny")[1]
    about = {"handloom": {"weight_bytes": 10**6, "kv_dtype": "float32"}}
    case, slow = Case("tg", 4, 8), Group("fp32", about=about, bandwidth=1e6, matmul=1e15)
    kv = machine.kv_bytes_read(spec, torch.float32, 2)
    assert cpu_suite.limit(slow, spec, case) == pytest.approx(8 / ((10**6 + 8 * kv) / 1e6))
    fast = Group("fp32", about=about, bandwidth=1e15, matmul=1e6)
    assert cpu_suite.limit(fast, spec, case) == pytest.approx(1e6 / limits.prefill_flops(spec, 1))
    prompt = Case("pp", 16, 8)
    assert cpu_suite.limit(fast, spec, prompt) == pytest.approx(limits.prefill_limit(spec, 16, 1e6))
    assert cpu_suite.limit(slow, spec, prompt) == pytest.approx(8 * 16 / 1.0)
    assert cpu_suite.limit(Group("fp32"), spec, case) is None


def test_rows_say_how_each_engine_held_its_weights(tmp_path: Path) -> None:
    group, said = measure([engine(tmp_path, "handloom"), engine(tmp_path, "peer")], settings(starts=1, rounds=1))
    assert said == []
    results = Results(tmp_path / "rows.jsonl", {"suite": "cpu", "dtype": "float32"}, show=lambda _: None)
    cpu_suite.add_rows(group, read_config(tiny_llama().config.to_dict(), "tiny")[1], results)
    assert {row["dtype"] for row in results.rows} == {"fp32"}
    assert {(row["held"], row["version"]) for row in results.rows if row["peer"] == "peer"} == {("fp32", "1.2")}
    rates = [(row["case"], row["peer"]) for row in results.rows if row["unit"] == "tok/s"]
    names = ("pp8 b1", "tg4 b1", "pp8 b2", "tg4 b2")
    assert rates == [(name, peer) for name in names for peer in ("handloom", "peer", "limit")]
    starts = [row["metric"] for row in results.rows if row["case"] == "process start" and row["peer"] == "peer"]
    assert starts == ["first token", "load", "peak memory"]
    assert sys.executable == Contender("x", tmp_path).python
