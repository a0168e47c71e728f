"""Drafts are as long as they pay, by what was measured; and what was measured wears off."""

from __future__ import annotations

import random

import pytest

from handloom.decoding.draft_length import Acceptance, StepTimes, best_length, draft_class, expected_gain


def measured(seconds: dict[int, float]) -> StepTimes:
    times = StepTimes()
    for _ in range(40):
        for count, taken in seconds.items():
            times.learn(count, taken)
    return times


def test_times_converge_to_what_is_measured_and_lie_between_in_between() -> None:
    times = measured({1: 2.0, 5: 3.0, 9: 6.0})
    assert [times.seconds(count) for count in (1, 5, 9)] == pytest.approx([2.0, 3.0, 6.0], rel=0.02)
    assert times.seconds(3) == pytest.approx(2.5, rel=0.02)
    assert times.seconds(20) > times.seconds(9) > times.seconds(7)


def test_one_outlier_moves_no_ratio_by_much_and_what_slows_all_moves_none_in_the_end() -> None:
    times = measured({1: 2.0, 5: 3.0})
    times.learn(1, 200.0)
    assert times.seconds(5) / times.seconds(1) > 1.25
    times = measured({1: 2.0, 5: 3.0})
    for _ in range(40):
        times.learn(5, 6.0)
    assert times.seconds(1) == pytest.approx(4.0, rel=0.5)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_the_length_is_the_one_with_the_most_tokens_per_second(rate: float) -> None:
    times = measured({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4, 16: 2.5})
    speeds = [(1 + expected_gain(rate, k)) / times.seconds(1 + k) for k in range(16)]
    best = max(range(16), key=speeds.__getitem__)
    expected = best if speeds[best] > 1.02 * speeds[0] else 0
    assert best_length(times, rate, 15, num_tokens=1, expected=1.0) == expected
    assert best_length(times, rate, 3, num_tokens=1, expected=1.0) <= 3


def test_where_a_step_with_more_tokens_takes_as_much_longer_nothing_is_drafted() -> None:
    times = measured({count: float(count) for count in range(1, 17)})
    assert best_length(times, 0.9, 15, num_tokens=1, expected=1.0) == 0


def test_a_draft_model_as_slow_as_the_model_never_pays() -> None:
    times = measured({count: 1 + 0.02 * count for count in range(1, 17)})
    assert best_length(times, 1.0, 15, num_tokens=1, expected=1.0, draft_seconds=1.0) == 0
    assert best_length(times, 0.9, 15, num_tokens=1, expected=1.0, draft_seconds=0.05) > 3


def test_among_many_sequences_a_draft_has_to_be_worth_more() -> None:
    times = measured({count: max(1.0, count / 8) for count in range(1, 65)})
    assert best_length(times, 0.7, 8, num_tokens=1, expected=1.0) > 3
    assert best_length(times, 0.7, 8, num_tokens=32, expected=32.0) == 0
    assert best_length(measured({1: 1.0, 512: 1.0}), 0.7, 8, num_tokens=256, expected=256.0) > 3


@pytest.mark.parametrize("right", [0.05, 0.5, 0.95])
def test_the_rate_becomes_that_of_what_is_accepted(right: float) -> None:
    rng, acceptance, found = random.Random(0), Acceptance(), []
    for _ in range(400):
        accepted = next((at for at in range(6) if rng.random() > right), 6)
        acceptance.learn(3, 6, accepted)
        found.append(acceptance.rate(3))
    assert sum(found[50:]) / 350 == pytest.approx(right, abs=0.15)
    assert acceptance.rate(2) == Acceptance().rate(2), "classes learn apart"


def test_what_is_known_wears_off_while_nothing_is_drafted() -> None:
    acceptance = Acceptance()
    for _ in range(20):
        acceptance.learn(2, 4, 0)
    low, prior = acceptance.rate(2), Acceptance().rate(2)
    for _ in range(200):
        acceptance.forget(2)
    assert low < prior / 2 and acceptance.rate(2) == pytest.approx(prior, rel=0.05)


def test_longer_matches_are_expected_to_be_right_more_often() -> None:
    rates = [Acceptance().rate(draft_class(matched)) for matched in (1, 2, 4, 8, 16, 500)]
    assert rates == sorted(rates) and draft_class(500) == draft_class(16)
