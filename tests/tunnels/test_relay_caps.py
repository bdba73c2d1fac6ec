"""What a node carries for one peer, and for all strangers together."""

from __future__ import annotations

import contextlib

import pytest

from tunnels.errors import LinkClosed
from tunnels.peer import PeerId
from tunnels.relay_caps import (
    ALL_STRANGERS,
    CAPS,
    DAY_S,
    KIB,
    MAX_ACCOUNTS,
    MAX_STREAMS,
    MIB,
    Accounts,
    CapReached,
    Carriage,
    Standing,
)
from tunnels.relay_suspicions import FIRST_PAUSE_S, LAST_PAUSE_S, MAX_SUSPECTED, Suspicions


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


ANN, BEN, RITA = peer(1), peer(2), peer(3)


def fill(books: Accounts, who: PeerId, standing: Standing, now: float = 0.0) -> list[Carriage]:
    """As many streams as it gets."""
    got: list[Carriage] = []
    with contextlib.suppress(CapReached):
        while True:
            got.append(books.open(who, standing, now))
    return got


@pytest.mark.parametrize("standing", Standing)
def test_a_peer_has_so_many_streams_and_no_more_until_one_is_over(standing: Standing) -> None:
    books = Accounts(0.0)
    got = fill(books, ANN, standing)
    assert len(got) == CAPS[standing].streams == books.streams
    got[0].leave()
    books.open(ANN, standing, 0.0)
    with pytest.raises(CapReached, match="too many streams"):
        books.open(ANN, standing, 0.0)


@pytest.mark.parametrize("standing", Standing)
def test_one_peers_use_takes_nothing_from_another(standing: Standing) -> None:
    books = Accounts(0.0)
    fill(books, ANN, standing)
    books.open(BEN, standing, 0.0)


@pytest.mark.parametrize("standing", Standing)
def test_streams_are_opened_at_a_bounded_rate(standing: Standing) -> None:
    books, openings = Accounts(0.0), CAPS[standing].openings
    for _ in range(int(openings.burst)):
        books.open(ANN, standing, 0.0).leave()
    with pytest.raises(CapReached, match="too often"):
        books.open(ANN, standing, 0.0)
    books.open(ANN, standing, 1 / openings.per_s).leave()


def test_all_together_have_a_bounded_number_of_streams() -> None:
    books = Accounts(0.0)
    for number in range(MAX_STREAMS):
        books.open(peer(number), Standing.CARRIED, 0.0)
    with pytest.raises(CapReached, match="as much as it can"):
        books.open(peer(MAX_STREAMS), Standing.CARRIED, 0.0)


def test_a_thousand_strangers_have_together_what_all_strangers_have() -> None:
    books, got = Accounts(0.0), 0
    for number in range(1000):
        try:
            books.open(peer(number), Standing.STRANGER, 0.0)
        except CapReached:
            continue
        got += 1
    assert got == ALL_STRANGERS.streams
    books.open(peer(1000), Standing.CARRIED, 0.0)


@pytest.mark.parametrize("standing", [Standing.INTRODUCED, Standing.STRANGER])
def test_an_introduction_has_256_kib(standing: Standing) -> None:
    books = Accounts(0.0)
    carriage = books.open(ANN, standing, 0.0)
    assert books.spend(carriage, standing, 256 * KIB, 0.0) == 0.0
    with pytest.raises(CapReached, match="only introductions"):
        books.spend(carriage, standing, 1, 0.0)


def test_the_cap_of_a_stranger_is_lifted_when_it_has_become_a_member() -> None:
    books = Accounts(0.0)
    carriage = books.open(ANN, Standing.STRANGER, 0.0)
    books.spend(carriage, Standing.STRANGER, 256 * KIB, 0.0)
    assert books.spend(carriage, Standing.CARRIED, 8 * MIB, 0.0) == 0.0
    carriage.leave()
    assert books.streams == 0


@pytest.mark.parametrize("standing", Standing)
def test_beyond_its_pace_a_peer_waits(standing: Standing) -> None:
    books, caps, waits_s = Accounts(0.0), CAPS[standing], 0.0
    carriage = books.open(ANN, standing, 0.0)
    for _ in range(int(caps.pace.burst / (256 * KIB)) + 4):
        if carriage.carried_bytes + 256 * KIB > caps.stream_bytes:
            carriage.leave()
            carriage = books.open(ANN, standing, 0.0)
        waits_s = books.spend(carriage, standing, 256 * KIB, 0.0)
    assert 0.9 * MIB / caps.pace.per_s < waits_s < 1.5 * MIB / caps.pace.per_s


def test_strangers_together_wait_for_one_another() -> None:
    books = Accounts(0.0)
    for number in range(int(ALL_STRANGERS.pace.burst / (256 * KIB)) + 4):
        carriage = books.open(peer(number), Standing.STRANGER, 0.0)
        waits_s = books.spend(carriage, Standing.STRANGER, 256 * KIB, 0.0)
    assert waits_s > 1.0


def test_what_is_carried_in_a_day_is_bounded() -> None:
    books, total = Accounts(0.0), CAPS[Standing.CARRIED].total
    carriage = books.open(ANN, Standing.CARRIED, 0.0)
    books.spend(carriage, Standing.CARRIED, int(total.burst), 0.0)
    with pytest.raises(CapReached, match="in a day"):
        books.spend(carriage, Standing.CARRIED, 1, 0.0)
    with pytest.raises(CapReached, match="in a day"):
        books.open(ANN, Standing.CARRIED, 0.0)
    books.open(BEN, Standing.CARRIED, 0.0)
    books.open(ANN, Standing.CARRIED, DAY_S / 100)


def test_of_many_peers_the_idle_and_then_the_oldest_are_forgotten() -> None:
    books = Accounts(0.0)
    standing = books.open(ANN, Standing.CARRIED, 0.0)
    for number in range(10, 10 + 2 * MAX_ACCOUNTS):
        books.open(peer(number), Standing.CARRIED, 0.0).leave()
    assert len(books._accounts) == MAX_ACCOUNTS
    books.open(BEN, Standing.CARRIED, 2.0 * DAY_S)
    assert len(books._accounts) == 2, "the one with a stream, and the new one"
    standing.leave()


# --- suspicions ----------------------------------------------------------------------------


def test_only_this_peer_through_this_relay_is_not_sought() -> None:
    doubts = Suspicions()
    assert doubts.add(RITA, ANN, 0.0)
    with pytest.raises(LinkClosed, match="tried again in 60 s"):
        doubts.check(RITA, ANN, 0.0)
    doubts.check(RITA, BEN, 0.0)
    doubts.check(BEN, ANN, 0.0)
    doubts.check(RITA, ANN, FIRST_PAUSE_S)


def test_the_pause_grows_and_is_told_of_once() -> None:
    doubts, now, pauses = Suspicions(), 0.0, []
    assert doubts.add(RITA, ANN, now)
    for _ in range(8):
        until_s, pause_s = doubts._until[RITA, ANN]
        pauses.append(pause_s)
        assert not doubts.add(RITA, ANN, now), "another connection of the same link"
        assert doubts._until[RITA, ANN] == (until_s, pause_s)
        now = until_s
        assert not doubts.add(RITA, ANN, now)
    assert pauses[:3] == [60.0, 120.0, 240.0]
    assert pauses[-1] == LAST_PAUSE_S


def test_suspicions_are_bounded() -> None:
    doubts = Suspicions()
    told = sum(doubts.add(peer(number), ANN, 0.0) for number in range(2 * MAX_SUSPECTED))
    assert told == MAX_SUSPECTED == len(doubts._until)
