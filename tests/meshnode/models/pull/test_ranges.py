"""Which bytes are asked of whom, in a world without clock or network."""

from __future__ import annotations

import math

import pytest

from meshnode.models.pull.ranges import (
    FAR_LOOKS_EVERY_S,
    FAR_WAITS_S,
    JOIN_GAP_BYTES,
    MAX_ASKED_PAUSE_S,
    MAX_CHUNK_BYTES,
    MAX_PAUSE_S,
    MAX_REJECTIONS,
    MAX_TRIES,
    MIN_CHUNK_BYTES,
    PROGRESS_BYTES,
    Ranges,
    Request,
    Supplier,
    fitting_chunk_bytes,
)
from meshnode.models.spans import Span, joined

MIB = 1 << 20
EVERYTHING = Supplier(connections=1)


def take(ranges: Ranges, lane: int = 0, now: float = 0.0) -> Request:
    request = ranges.take(lane, now)
    assert isinstance(request, Request)
    return request


def fetch(ranges: Ranges, request: Request, now: float = 0.0) -> Span:
    ranges.receive(request, request.span.size_bytes, now)
    ranges.finish(request)
    return request.span


def fetch_all(ranges: Ranges, lane: int = 0, now: float = 0.0) -> list[Span]:
    spans = []
    while isinstance(request := ranges.take(lane, now), Request):
        spans.append(fetch(ranges, request, now))
    return spans


# --- what is asked, and in which order ---------------------------------------------------


def test_neighbours_come_in_one_request_and_distant_spans_in_their_own_in_disk_order() -> None:
    far = 10 * MIB
    wanted = [Span(1, 0, 5), Span(0, far, far + 8), Span(0, 0, 100), Span(0, 132, 200)]
    ranges = Ranges(wanted, [EVERYTHING], now=0.0)
    assert fetch_all(ranges) == [Span(0, 0, 200), Span(0, far, far + 8), Span(1, 0, 5)]
    assert ranges.is_over
    assert ranges.take(0, 0.0) is None


def test_a_gap_larger_than_a_round_trip_is_worth_is_not_fetched() -> None:
    wanted = [Span(0, 0, 10), Span(0, 11 + JOIN_GAP_BYTES, 12 + JOIN_GAP_BYTES)]
    assert len(fetch_all(Ranges(wanted, [EVERYTHING], now=0.0))) == 2


def test_lanes_take_chunks_one_after_the_other() -> None:
    ranges = Ranges([Span(0, 0, 250)], [Supplier(2)], now=0.0, chunk_bytes=100)
    assert ranges.lanes == (0, 0)
    first, second = take(ranges, 0), take(ranges, 1)
    assert (first.span, second.span) == (Span(0, 0, 100), Span(0, 100, 200))
    assert fetch(ranges, first) == Span(0, 0, 100)
    third = take(ranges, 0)
    assert third.span == Span(0, 200, 250)
    assert ranges.take(0, 0.0) == math.inf, "what the others fetch may come back"
    fetch(ranges, third)
    fetch(ranges, second)
    assert ranges.is_over


def test_chunks_are_small_enough_that_all_lanes_end_together_and_never_tiny() -> None:
    assert fitting_chunk_bytes(100 * MIB, 4) == MIN_CHUNK_BYTES
    assert fitting_chunk_bytes(640 * MIB, 4) == 40 * MIB
    assert fitting_chunk_bytes(1 << 40, 4) == MAX_CHUNK_BYTES
    assert fitting_chunk_bytes(0, 0) == MIN_CHUNK_BYTES


def test_nobody_is_waited_for_at_the_end_because_he_is_slow() -> None:
    """One gives twenty megabytes a second, another two, each over four connections."""
    rates = [5e6] * 4 + [0.5e6] * 4
    ranges = Ranges([Span(0, 0, 300_000_000)], [Supplier(4), Supplier(4)], now=0.0)
    running: list[tuple[float, int, Request]] = []
    ended_s = 0.0

    def begin(lane: int, now: float) -> None:
        request = ranges.take(lane, now)
        if isinstance(request, Request):
            running.append((now + request.span.size_bytes / rates[lane], lane, request))

    for lane in range(8):
        begin(lane, 0.0)
    while running:
        ended_s, lane, request = running.pop(running.index(min(running, key=lambda one: one[0])))
        fetch(ranges, request, ended_s)
        begin(lane, ended_s)
    assert ranges.is_over
    assert ended_s < 1.1 * 300 / 22


def test_what_a_lane_will_never_be_through_with_is_taken_over() -> None:
    ranges = Ranges([Span(0, 0, 40 * MIB)], [Supplier(2)], now=0.0, chunk_bytes=20 * MIB)
    slow, fast = take(ranges, 0), take(ranges, 1)
    ranges.receive(slow, 1000, 1.0)
    fetch(ranges, fast, now=2.0)
    assert ranges.laggard(2.0) is None, "it may only have begun late"
    assert ranges.laggard(6.0) == slow
    ranges.fail(slow, 6.0, is_taken_over=True)
    assert isinstance(ranges.take(0, 6.0), float), "others come first"
    rest = take(ranges, 1, now=6.0)
    assert rest.span == Span(0, 1000, 20 * MIB)
    fetch(ranges, rest, now=8.0)
    assert ranges.is_over


def test_nothing_is_taken_from_lanes_that_are_as_slow_as_all() -> None:
    ranges = Ranges([Span(0, 0, 40 * MIB)], [Supplier(2)], now=0.0, chunk_bytes=20 * MIB)
    other, done = take(ranges, 0), take(ranges, 1)
    fetch(ranges, done, now=40.0)
    ranges.receive(other, 8 * MIB, 40.0)
    assert ranges.laggard(40.0) is None


def test_nothing_is_taken_over_by_who_has_it_not_or_is_away() -> None:
    ranges = Ranges([Span(0, 0, 200)], [Supplier(1), Supplier(1, (Span(0, 0, 100),))], now=0.0)
    fetch(ranges, take(ranges, 1), now=0.1)
    take(ranges, 0)
    assert ranges.laggard(60.0) is None
    pair = Ranges([Span(0, 0, 200)], [Supplier(2)], now=0.0, chunk_bytes=100)
    take(pair, 0)
    fetch(pair, take(pair, 1), now=0.1)
    pair.drop(0)
    assert pair.laggard(60.0) is None


def test_nothing_wanted_is_over_at_once() -> None:
    ranges = Ranges([], [EVERYTHING], now=0.0)
    assert ranges.is_over
    assert not ranges.is_stuck
    assert ranges.headway(1.0).eta_s == 0.0


# --- who is asked --------------------------------------------------------------------------


def test_peers_are_asked_first_and_the_internet_for_the_rest() -> None:
    peer = Supplier(1, holds=(Span(0, 100, 200),))
    hub = Supplier(1, rank=1)
    ranges = Ranges([Span(0, 0, 300)], [hub, peer], now=0.0)
    assert fetch_all(ranges, lane=0) == [Span(0, 0, 100), Span(0, 200, 300)]
    assert not ranges.is_over
    assert fetch_all(ranges, lane=1) == [Span(0, 100, 200)]
    assert ranges.is_over


def test_two_peers_share_what_both_hold() -> None:
    both = (Span(0, 0, 400),)
    ranges = Ranges([Span(0, 0, 400)], [Supplier(1, both), Supplier(1, both)], 0.0, chunk_bytes=100)
    spans = [fetch(ranges, take(ranges, lane)) for lane in (0, 1, 0, 1)]
    assert joined(spans) == (Span(0, 0, 400),)


def test_far_members_help_only_where_the_near_ones_take_long() -> None:
    near, far = Supplier(1), Supplier(1, is_far=True)
    ranges = Ranges([Span(0, 0, 1000 * MIB)], [near, far], now=0.0)
    assert ranges.take(1, 0.0) == FAR_WAITS_S
    request = take(ranges, 0)
    ranges.receive(request, 4 * MIB, 4.9)
    assert isinstance(ranges.take(1, FAR_WAITS_S), Request), "it would go on for twenty minutes"


def test_far_members_are_left_alone_where_the_near_ones_have_soon_given_all() -> None:
    near, far = Supplier(1), Supplier(1, is_far=True)
    ranges = Ranges([Span(0, 0, 1000 * MIB)], [near, far], now=0.0)
    now = 0.0
    while now < 6.0:  # a hundred mebibytes a second
        request = take(ranges, 0, now)
        now += request.span.size_bytes / (100 * MIB)
        fetch(ranges, request, now)
    assert ranges.take(1, now) == now + FAR_LOOKS_EVERY_S


def test_what_far_members_alone_have_is_asked_of_them_at_once() -> None:
    near, far = Supplier(1, (Span(0, 0, 100),)), Supplier(1, is_far=True)
    ranges = Ranges([Span(0, 0, 300)], [near, far], now=0.0)
    assert fetch(ranges, take(ranges, 1)) == Span(0, 100, 300)
    assert ranges.take(1, 0.0) == FAR_WAITS_S
    ranges.drop(0)
    assert fetch(ranges, take(ranges, 1)) == Span(0, 0, 100), "nobody nearer is left"


def test_what_a_lost_peer_alone_held_is_asked_of_the_internet() -> None:
    ranges = Ranges([Span(0, 0, 300)], [Supplier(1), Supplier(1, rank=1)], now=0.0)
    assert ranges.take(1, 0.0) == math.inf
    ranges.drop(0)
    assert ranges.take(0, 0.0) is None
    assert fetch_all(ranges, lane=1) == [Span(0, 0, 300)]


def test_bytes_that_nobody_holds_are_said_to_be_missing() -> None:
    ranges = Ranges([Span(0, 0, 300)], [Supplier(1, (Span(0, 0, 299),))], now=0.0)
    assert ranges.is_stuck
    ranges.drop(0)
    assert ranges.is_stuck


# --- failures ------------------------------------------------------------------------------


def test_what_failed_is_handed_out_again_after_a_pause_without_what_had_arrived() -> None:
    ranges = Ranges([Span(0, 0, 100)], [Supplier(2)], now=0.0)
    request = take(ranges)
    ranges.receive(request, 30, 0.0)
    assert ranges.arrived(request) == Span(0, 0, 30)
    ranges.fail(request, 10.0)
    assert ranges.take(0, 10.0) == 10.5, "the lane pauses"
    assert ranges.take(1, 10.0) == 10.5, "and so does the range"
    assert take(ranges, 1, 10.5).span == Span(0, 30, 100)


def test_nothing_of_a_request_may_have_arrived_and_all_of_it_may_have() -> None:
    ranges = Ranges([Span(0, 0, 100)], [EVERYTHING], now=0.0)
    request = take(ranges)
    assert ranges.arrived(request) is None
    ranges.fail(request, 0.0)
    request = take(ranges, now=0.5)
    ranges.receive(request, 100, 0.5)
    ranges.fail(request, 0.5)
    assert ranges.is_over


def test_what_came_from_a_source_that_contradicts_itself_is_not_kept() -> None:
    ranges = Ranges([Span(0, 0, 100)], [Supplier(1), Supplier(1, rank=1)], now=0.0)
    request = take(ranges)
    ranges.receive(request, 60, 0.0)
    ranges.fail(request, 0.0, is_doubtful=True)
    assert ranges.headway(1.0).done_bytes == 0
    ranges.drop(0)
    assert fetch_all(ranges, lane=1, now=1.0) == [Span(0, 0, 100)]


def test_who_cannot_begin_in_the_middle_is_asked_for_everything_at_once() -> None:
    one = Supplier(1, is_sequential=True)
    ranges = Ranges([Span(0, 0, 300)], [one], now=0.0, chunk_bytes=100)
    assert fetch_all(ranges) == [Span(0, 0, 300)]


def test_pauses_double_up_to_a_bound_and_then_the_lane_is_retired() -> None:
    ranges = Ranges([Span(0, 0, 100)], [EVERYTHING], now=0.0)
    now, pauses = 0.0, []
    for _ in range(MAX_TRIES - 1):
        ranges.fail(take(ranges, now=now), now)
        again = ranges.take(0, now)
        assert isinstance(again, float)
        pauses.append(again - now)
        now = again
    assert pauses == [0.5, 1, 2, 4, 8, 16, MAX_PAUSE_S]
    assert not ranges.is_stuck
    ranges.fail(take(ranges, now=now), now)
    assert ranges.is_stuck
    assert ranges.take(0, now) is None


def test_a_server_that_is_gone_is_not_waited_for_by_each_connection_in_turn() -> None:
    ranges = Ranges([Span(0, 0, 100)], [Supplier(4)], now=0.0)
    now = 0.0
    while not ranges.is_stuck:
        for lane in range(4):
            if isinstance(request := ranges.take(lane, now), Request):
                ranges.fail(request, now)
        now += 0.5
    assert now <= 200, "and not a quarter of an hour"


def test_a_server_may_name_a_pause_but_not_one_without_end() -> None:
    ranges = Ranges([Span(0, 0, 100)], [EVERYTHING], now=0.0)
    ranges.fail(take(ranges), 0.0, retry_after_s=7.0)
    assert ranges.take(0, 0.0) == 7.0
    ranges.fail(take(ranges, now=7.0), 7.0, retry_after_s=1e9)
    assert ranges.take(0, 7.0) == 7.0 + MAX_ASKED_PAUSE_S


def test_a_connection_that_is_one_too_many_is_given_up_and_the_others_go_on() -> None:
    ranges = Ranges([Span(0, 0, 10_000)], [Supplier(2)], 0.0, chunk_bytes=100)
    now = 0.0
    for _ in range(MAX_TRIES):
        ranges.fail(take(ranges, 1, now), now)
        now += MAX_PAUSE_S
        fetch(ranges, take(ranges, 0, now), now)
    assert ranges.take(1, now) is None
    assert not ranges.is_stuck
    now += MAX_PAUSE_S
    assert joined(fetch_all(ranges, 0, now))[-1].stop == 10_000
    assert ranges.is_over


def test_a_lane_that_gets_on_between_failures_is_not_given_up() -> None:
    ranges = Ranges([Span(0, 0, 100 * PROGRESS_BYTES)], [EVERYTHING], now=0.0)
    now = 0.0
    for _ in range(3 * MAX_TRIES):
        request = take(ranges, now=now)
        ranges.receive(request, PROGRESS_BYTES, now)
        ranges.fail(request, now)
        again = ranges.take(0, now)
        assert again == now + 0.5
        now = again
    assert not ranges.is_stuck


# --- bytes that prove wrong ------------------------------------------------------------------


def test_bytes_of_a_wrong_digest_are_fetched_anew_also_those_of_an_earlier_run() -> None:
    ranges = Ranges([Span(0, 50, 100)], [EVERYTHING], now=0.0)
    request = take(ranges)
    ranges.receive(request, 50, 0.0)
    ranges.finish(request, [Span(0, 0, 100)])
    assert not ranges.is_over
    assert ranges.headway(1.0).total_bytes == 150
    assert fetch_all(ranges) == [Span(0, 0, 100)]


def test_the_part_that_came_may_prove_wrong_too() -> None:
    ranges = Ranges([Span(0, 50, 100)], [EVERYTHING], now=0.0)
    request = take(ranges)
    ranges.receive(request, 20, 0.0)
    ranges.fail(request, 0.0, rejected=[Span(0, 0, 70)])
    assert fetch_all(ranges, now=1.0) == [Span(0, 0, 70), Span(0, 70, 100)]


def test_who_delivers_wrong_bytes_again_and_again_is_asked_no_more() -> None:
    ranges = Ranges([Span(0, 0, 100)], [Supplier(1), Supplier(1, rank=1)], now=0.0)
    for _ in range(MAX_REJECTIONS):
        request = take(ranges)
        ranges.receive(request, 100, 0.0)
        ranges.finish(request, [Span(0, 0, 100)])
    assert ranges.take(0, 0.0) is None
    assert fetch_all(ranges, lane=1) == [Span(0, 0, 100)]


def test_whose_bytes_were_wrong_is_found_out_by_asking_one_for_all_of_them() -> None:
    """A tensor came half from either: the one who ended it is not to blame for that."""
    ranges = Ranges([Span(0, 0, 200)], [Supplier(1)] * 2, now=0.0, chunk_bytes=100)
    first, second = take(ranges, 0), take(ranges, 1)
    fetch(ranges, first)
    ranges.receive(second, 100, 0.0)
    ranges.finish(second, [Span(0, 0, 200)])
    assert ranges.take(1, 0.0) == math.inf, "all of it is asked of the other"
    fetch(ranges, take(ranges, 0))
    last = take(ranges, 0)
    ranges.receive(last, 100, 0.0)
    ranges.finish(last, [Span(0, 0, 200)])
    assert ranges.take(0, 0.0) == math.inf, "that one lies"
    assert fetch_all(ranges, lane=1) == [Span(0, 0, 100), Span(0, 100, 200)]
    assert ranges.is_over


def test_who_was_to_give_all_of_it_and_goes_away_leaves_it_to_the_others() -> None:
    ranges = Ranges([Span(0, 0, 200)], [Supplier(1)] * 2, now=0.0, chunk_bytes=100)
    first, second = take(ranges, 0), take(ranges, 1)
    fetch(ranges, first)
    ranges.receive(second, 100, 0.0)
    ranges.finish(second, [Span(0, 0, 200)])
    half = take(ranges, 0)
    ranges.drop(0)
    ranges.receive(half, 50, 0.0)
    ranges.fail(half, 0.0)
    assert fetch_all(ranges, lane=1, now=1.0) == [Span(0, 50, 100), Span(0, 100, 200)]
    assert ranges.is_over


# --- headway -----------------------------------------------------------------------------------


def test_speed_is_that_of_the_last_seconds_and_the_eta_follows_from_it() -> None:
    ranges = Ranges([Span(0, 0, 1000)], [EVERYTHING], now=0.0)
    assert ranges.headway(0.0).bytes_per_s is None
    request = take(ranges)
    assert ranges.headway(1.0).eta_s is None, "nothing came yet"
    for now in (1.0, 1.1, 2.0):
        ranges.receive(request, 100, now)
    headway = ranges.headway(2.0)
    assert (headway.done_bytes, headway.total_bytes) == (300, 1000)
    assert headway.bytes_per_s == 150
    assert headway.eta_s == pytest.approx(700 / 150)
    assert ranges.headway(100.0).bytes_per_s == 0
    ranges.receive(request, 100, 200.0)
    assert ranges.headway(200.0).bytes_per_s == 10
