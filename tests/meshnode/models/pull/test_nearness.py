"""Whom of several members to ask, by how far away they are."""

from __future__ import annotations

from meshnode.models.pull.nearness import MAX_ASKED, Turn, turns


def far(*rtts_s: float | None) -> list[bool]:
    return [turn.is_far for turn in turns(rtts_s)]


def test_neighbours_are_near_and_who_is_across_an_ocean_is_not() -> None:
    assert far(0.090, 0.0004, 0.003) == [True, False, False]


def test_members_that_are_all_far_away_are_as_near_as_each_other() -> None:
    assert far(0.090, 0.110, 0.150) == [False, False, False]


def test_one_that_nobody_has_measured_is_farther_than_all() -> None:
    assert far(None, 0.080) == [True, False]
    assert far(None, None) == [False, False]


def test_of_many_the_nearest_are_asked_and_the_others_where_those_lack_something() -> None:
    rtts_s = [0.001 * (20 - number) for number in range(20)]
    asked = [number for number, turn in enumerate(turns(rtts_s)) if turn.rank == 0]
    assert asked == list(range(20 - MAX_ASKED, 20))
    assert turns([None] * 20)[:MAX_ASKED] == [Turn(0, is_far=False)] * MAX_ASKED


def test_nobody_is_no_trouble() -> None:
    assert turns([]) == []
