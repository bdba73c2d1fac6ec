"""A round trip measured, smoothed, and how much it wavers."""

from __future__ import annotations

import pytest

from tunnels.roundtrips import SAMPLES, RoundTrips


def trips(*took_ms: float) -> RoundTrips:
    measured = RoundTrips()
    for one in took_ms:
        measured.add(one / 1000)
    return measured


def test_before_the_first_answer_nothing_is_known() -> None:
    nothing = trips()
    assert (nothing.least_s, nothing.smoothed_s, nothing.jitter_s) == (None, None, None)


def test_one_answer_says_how_far_and_not_how_steadily() -> None:
    one = trips(20)
    assert (one.least_s, one.smoothed_s, one.jitter_s) == (0.02, 0.02, None)


def test_a_steady_path_has_no_jitter() -> None:
    steady = trips(*[20] * 50)
    assert steady.jitter_s == 0
    assert steady.smoothed_s == pytest.approx(0.02)


def test_a_late_answer_moves_the_smoothed_time_an_eighth_of_the_way_and_the_least_not() -> None:
    late = trips(20, 100)
    assert late.smoothed_s == pytest.approx(0.03)
    assert late.least_s == 0.02
    assert late.jitter_s == pytest.approx(0.08)


def test_jitter_is_the_difference_between_neighbours() -> None:
    assert trips(*[20, 30] * 100).jitter_s == pytest.approx(0.01)


def test_a_path_that_has_become_longer_is_believed_after_a_few_answers() -> None:
    longer = trips(20, *[80] * SAMPLES)
    assert longer.least_s == 0.08
