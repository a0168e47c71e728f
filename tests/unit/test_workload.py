"""Requests to measure with: the same for the same seed, within their ranges, and a file without them refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handloom.errors import InvalidParam
from handloom.measure import workload
from handloom.measure.workload import Asked, Lengths

SHORT, LONG = Lengths(1, 3), Lengths(5, 9)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def read(folder: Path, *lines: str | bytes) -> list[Asked]:
    path = folder / "requests.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return workload.read(path, 200, SHORT, encode)


def test_drawn_requests_are_fixed_by_the_seed_and_reach_both_ends_of_their_ranges() -> None:
    drawn = workload.draw(50, 300, LONG, SHORT, seed=4)
    assert drawn == workload.draw(50, 300, LONG, SHORT, seed=4) != workload.draw(50, 300, LONG, SHORT, seed=5)
    assert {len(request.prompt) for request in drawn} == set(range(5, 10))
    assert {request.new_tokens for request in drawn} == {1, 2, 3}
    assert {token for request in drawn for token in request.prompt} == set(range(50))
    assert {request.at for request in drawn} == {0.0}
    assert drawn[:10] == workload.draw(50, 10, LONG, SHORT, seed=4), "fewer requests are the first ones"


def test_arrivals_are_a_poisson_process_in_the_order_of_the_requests() -> None:
    drawn = workload.draw(50, 4000, SHORT, SHORT)
    arriving = workload.arriving(drawn, 8.0, seed=1)
    assert arriving == workload.arriving(drawn, 8.0, seed=1)
    assert [request.prompt for request in arriving] == [request.prompt for request in drawn]
    times = [request.at for request in arriving]
    assert times == sorted(times)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03), "exponential: 1/e"


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(InvalidParam, match="rate is"):
        workload.arriving([], rate)


@pytest.mark.parametrize(("text", "low", "high"), [("64-512", 64, 512), ("7", 7, 7), ("1-1", 1, 1)])
def test_ranges_are_read(text: str, low: int, high: int) -> None:
    assert Lengths.parse(text) == Lengths(low, high)


@pytest.mark.parametrize(
    "text", ["", "-", "5-", "-5", "0", "0-3", "9-5", "a-b", "1e3", "1-2-3", "٣x", "9" * 5000, "5-99999999"]
)
def test_ranges_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidParam, match="lengths"):
        Lengths.parse(text)


def test_a_file_gives_text_ids_or_lengths_and_draws_what_it_leaves_out(tmp_path: Path) -> None:
    found = read(
        tmp_path, '{"prompt": "ab", "new_tokens": 9}', "", '{"prompt": [1, 2, 199]}', '{"prompt_tokens": 70}\r'
    )
    assert found[0] == Asked([97, 98], 9)
    assert found[1].prompt == [1, 2, 199] and 1 <= found[1].new_tokens <= 3
    assert len(found[2].prompt) == 70 and max(found[2].prompt) < 200
    assert found == read(
        tmp_path, '{"prompt": "ab", "new_tokens": 9}', "", '{"prompt": [1, 2, 199]}', '{"prompt_tokens": 70}'
    )


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "prompt": "b"}', "given twice"),
        ('{"prompt": "a", "max_tokens": 5}', "'max_tokens' is not one of prompt"),
        ("{}", "prompt or prompt_tokens"),
        ('{"prompt": "a", "prompt_tokens": 5}', "not both"),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": []}', "not empty"),
        ('{"prompt": null}', "expected text"),
        ('{"prompt": [1, true]}', "token id True"),
        ('{"prompt": [200]}', "token id 200; ids go from 0 to 199"),
        ('{"prompt": [-1]}', "token id -1"),
        ('{"prompt_tokens": 0}', "prompt_tokens is 0"),
        ('{"prompt_tokens": 1e3}', "prompt_tokens is 1000.0"),
        ('{"prompt_tokens": 99999999999}', "prompt_tokens is 99999999999"),
        ('{"prompt": "a", "new_tokens": -3}', "new_tokens is -3"),
        ('{"prompt": "a", "new_tokens": true}', "new_tokens is True"),
        ('{"prompt": "\\ud800"}', "not valid JSON"),
    ],
)
def test_a_line_that_is_no_request_is_refused_by_its_number(tmp_path: Path, line: str | bytes, why: str) -> None:
    with pytest.raises(InvalidParam, match=r"requests\.jsonl: line 3: ") as error:
        read(tmp_path, '{"prompt": "fine"}', "", line)
    assert why in str(error.value)
    assert len(str(error.value)) < 500


def test_a_file_of_nothing_or_of_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidParam, match=r"0 requests in .*expected 1 to"):
        read(tmp_path, "", " ")
    monkeypatch.setattr(workload, "MAX_REQUESTS", 2)
    with pytest.raises(InvalidParam, match="3 requests in"):
        read(tmp_path, *[json.dumps({"prompt": "a"})] * 3)
    with pytest.raises(InvalidParam, match="3 requests asked for"):
        workload.draw(50, 3, SHORT, SHORT)
    monkeypatch.setattr(workload, "MAX_ALL_TOKENS", 20)
    with pytest.raises(InvalidParam, match="prompts of 2 requests have 24 tokens; the limit is 20"):
        read(tmp_path, *[json.dumps({"prompt_tokens": 12})] * 2)
    with pytest.raises(InvalidParam, match="the limit is 20"):
        workload.draw(50, 2, Lengths(12, 12), SHORT)
    monkeypatch.setattr(workload, "MAX_FILE_BYTES", 10)
    with pytest.raises(InvalidParam, match="MiB that are read"):
        read(tmp_path, '{"prompt": "a"}')
