"""How far the workers are, and how often one hears of it."""

from __future__ import annotations

from meshnode.gateway.view import WorkerProgress
from meshnode.pipeline.headway import Headway, Pulling


def told(headway: Headway, *reports: tuple[str, int, int]) -> list[tuple[str, int]]:
    news = headway.take(WorkerProgress(*report) for report in reports)
    return [(worker.node, worker.done_bytes) for worker in news]


def test_a_worker_is_told_of_at_each_quarter_but_the_last() -> None:
    headway = Headway({})
    assert told(headway, ("tower", 0, 100)) == []
    assert told(headway, ("tower", 24, 100)) == []
    assert told(headway, ("tower", 25, 100)) == [("tower", 25)]
    assert told(headway, ("tower", 26, 100)) == []
    assert told(headway, ("tower", 80, 100)) == [("tower", 80)]
    assert told(headway, ("tower", 100, 100)) == []


def test_what_is_loaded_in_one_go_needs_no_words() -> None:
    assert told(Headway({}), ("tower", 100, 100)) == []


def test_each_worker_has_quarters_of_its_own_and_all_together_are_the_whole() -> None:
    headway = Headway({})
    assert headway.done is None
    assert told(headway, ("tower", 50, 100), ("attic", 75, 300)) == [("tower", 50), ("attic", 75)]
    assert headway.done == 125 / 400


def test_the_plan_says_how_much_it_is_where_the_engine_does_not() -> None:
    headway = Headway({"tower": 200})
    assert told(headway, ("tower", 50, 0)) == [("tower", 50)]
    assert headway.workers == (WorkerProgress("tower", 50, 200),)


def test_more_than_all_is_all_and_the_unknown_has_no_share() -> None:
    headway = Headway({"tower": 200})
    told(headway, ("tower", 900, 0), ("attic", 7, 0))
    assert headway.workers == (WorkerProgress("tower", 200, 200), WorkerProgress("attic", 7, 0))


def test_who_pulls_is_told_of_at_each_quarter_with_the_time_left() -> None:
    pulling = Pulling()
    lines = [pulling.take(WorkerProgress("tower", 10 * at, 400), float(at)) for at in range(12)]
    assert [line for line in lines if line] == [
        "tower pulls its part: 100 B of 400 B (25 %), 10 B/s, 30 s left"
    ]
    assert (pulling.done, pulling.text) == (110 / 400, ": 29 s left")


def test_all_are_there_when_the_slowest_is() -> None:
    pulling = Pulling()
    for at in range(4):
        pulling.take(WorkerProgress("tower", 100 * at, 400), float(at))
        pulling.take(WorkerProgress("attic", at, 400), float(at))
    assert pulling.text == ": 6 min left"
    pulling.take(WorkerProgress("cellar", 0, 400), 3.0)
    assert pulling.text == "", "nobody knows of the cellar yet"
