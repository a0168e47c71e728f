"""What is promised of speed stands in the rows that are kept, taken while nothing else ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
DRAFTERS = ("prompt lookup", "suffix", "draft model")


def newest(suite: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(peer, case, metric) -> its last row."""
    rows = map(json.loads, (RESULTS / f"{suite}.jsonl").read_text().splitlines())
    return {(row["peer"], row["case"], row["metric"]): row for row in rows}


@pytest.mark.parametrize("suite", ["beams", "modes", "speculation", "rules", "grammar"])
def test_no_row_was_taken_on_a_busy_machine(suite: str) -> None:
    assert not [name for name, row in newest(suite).items() if row["machine_busy"]]


def test_eight_beams_take_half_the_time_and_half_the_memory_of_transformers_at_most() -> None:
    rows = newest("beams")
    cases = {case for _, case, _ in rows if case.startswith("8 beams")}
    assert cases
    for case in cases:
        for metric in ("time", "K and V"):
            ours, theirs = rows["handloom", case, metric], rows["transformers", case, metric]
            assert 2 * ours["p50"] <= theirs["p50"]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_cost_at_most_three_percent_where_there_is_nothing_to_copy(drafter: str) -> None:
    assert newest("speculation")[drafter, "nothing to copy", "gain"]["p50"] >= 0.97


@pytest.mark.parametrize("drafter", DRAFTERS[:2])
def test_drafts_out_of_the_text_double_the_speed_at_least_where_there_is_much_to_copy(drafter: str) -> None:
    assert newest("speculation")[drafter, "text to copy", "gain"]["p50"] >= 2


@pytest.mark.parametrize(("suite", "least"), [("rules", 28), ("modes", 7)])
def test_no_rule_and_no_mode_costs_more_than_in_transformers(suite: str, least: int) -> None:
    rows = newest(suite)
    cases = {case for _, case, _ in rows}
    assert len(cases) >= least
    for case in cases:
        ours, theirs = rows["handloom", case, "time per token"], rows["transformers", case, "time per token"]
        value = "best" if "best" in ours else "p50"
        assert ours[value] <= theirs[value], case
