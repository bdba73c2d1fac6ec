"""What a node says of itself: signed anew when it changes, with a number that outlives all else."""

from __future__ import annotations

from pathlib import Path

import pytest

from discovery.distances import step_of, tag
from discovery.grants import GRANT_LIFETIME_S, Role
from discovery.roster import MEMBER_LIFETIME_S, Member
from meshnode.errors import MeshError
from meshnode.member_book import Heard
from meshnode.membership import Membership
from meshnode.own_record import CHANGES_EVERY_S, REFRESH_S, REFRESH_S_A_MEMBER
from meshnode.state import Home
from tests.lab.homes import copy_home
from tunnels import Candidate, Identity, PeerId

NOW = 1_800_000_000.0
HOME = (Candidate("quic", "192.0.2.7", 4433),)
AWAY = (Candidate("quic", "198.51.100.7", 4433),)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ann(tmp_path: Path, clock: Clock) -> Membership:
    return open_node(tmp_path / "ann", clock)


def open_node(folder: Path, clock: Clock) -> Membership:
    with Home(folder) as home:
        return Membership(home, home.identity("node.key"), "ann", clock)


def test_a_record_stays_as_it_is_while_nothing_changes(ann: Membership, clock: Clock) -> None:
    word = ann.record.current(HOME)
    assert word.is_signed()
    assert word.seq == NOW * 1000
    clock.now += REFRESH_S - 1
    assert ann.record.current(HOME) is word
    clock.now += 2
    assert ann.record.current(HOME).seq > word.seq


def test_what_changes_is_said_at_once_to_whom_we_introduce_ourselves(
    ann: Membership, clock: Clock
) -> None:
    word = ann.record.current(HOME)
    clock.now += 0.001
    assert ann.record.current(AWAY, at_leisure=True) is word
    moved = ann.record.current(AWAY)
    assert moved.candidates == AWAY
    assert moved.seq > word.seq
    clock.now += CHANGES_EVERY_S
    assert ann.record.current(HOME, at_leisure=True).candidates == HOME


def test_each_thing_that_may_change_is_news(ann: Membership, clock: Clock) -> None:
    numbers = [ann.record.current(HOME).seq]

    def check() -> None:
        clock.now += 1
        numbers.append(ann.record.current(HOME).seq)
        assert numbers[-1] > numbers[-2]

    ann.name = "anna"
    check()
    ann.record.roles = ("lend",)
    check()
    ann.record.payload = b"more"
    check()
    clock.now += 0.6 * GRANT_LIFETIME_S
    ann.ledger.renew_own_mesh()
    check()


def test_a_large_mesh_is_told_less_often(ann: Membership, clock: Clock) -> None:
    for number in range(200):
        ann.ledger.members.roster.merge(
            Member(PeerId(number.to_bytes(32, "big")), "one", last_seen=NOW)
        )
    word = ann.record.current(HOME)
    clock.now += 200 * REFRESH_S_A_MEMBER - 1
    assert ann.record.current(HOME) is word
    clock.now += 2
    assert ann.record.current(HOME) is not word


# -- the number -------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_gives_no_number_twice(
    tmp_path: Path, ann: Membership, clock: Clock
) -> None:
    before = ann.record.current(HOME).seq
    clock.now -= 3600
    after = ann.record.current(AWAY).seq
    assert after == before + 1
    restarted = open_node(tmp_path / "ann", clock)
    assert restarted.record.current(HOME).seq > after


def test_a_full_disk_does_not_keep_a_node_from_saying_who_it_is(
    ann: Membership, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object) -> None:
        raise MeshError("no room")

    before = ann.record.current(HOME).seq
    clock.now -= 1
    monkeypatch.setattr(ann.ledger, "save_members", full)
    assert ann.record.current(AWAY).seq == before + 1


def test_a_node_on_an_old_disk_goes_beyond_what_it_hears_of_itself(
    tmp_path: Path, clock: Clock
) -> None:
    """Its clock was ahead when it said so."""
    ann = open_node(tmp_path / "ann", clock)
    copy_home(tmp_path / "ann", tmp_path / "old")
    clock.now += 7200
    ahead = ann.record.current(AWAY)
    clock.now = NOW
    old = open_node(tmp_path / "old", clock)
    grant = ann.ledger.grant(ann.ledger.own_mesh)
    assert grant is not None
    first = old.record.current(HOME)
    assert first.seq < ahead.seq
    assert old.ledger.hear_of(ahead, grant) is Heard.OLD
    clock.now += 0.1
    assert old.record.current(HOME, at_leisure=True) is first
    clock.now += CHANGES_EVERY_S
    assert old.record.current(HOME, at_leisure=True).seq == ahead.seq + 1


def test_nobody_else_moves_our_number(ann: Membership) -> None:
    word = ann.record.current(HOME)
    grant = ann.ledger.grant(ann.ledger.own_mesh)
    assert grant is not None
    forged = Member(word.peer, "ann", seq=word.seq + 1000)
    ann.ledger.hear_of(forged.signed(Identity.generate().sign), grant)
    assert ann.record.current(HOME) is word


# -- distances --------------------------------------------------------------------------------


def test_distances_ride_along_and_make_no_news(ann: Membership, clock: Clock) -> None:
    ben = Identity.generate().peer
    mesh = ann.ledger.own_mesh
    grant = ann.ledger.issue_grant(mesh, ben, Role.PEER)
    ann.ledger.remember(Member(ben, "ben", last_seen=NOW), [grant])
    rtt_s = 0.02
    ann.record.round_trips = lambda: [(ben, rtt_s), (Identity.generate().peer, 0.001)]
    word = ann.record.current(HOME)
    assert word.distances == ((tag(mesh, ben), step_of(0.02)),)
    rtt_s = 0.5
    clock.now += 60
    assert ann.record.current(HOME) is word
    clock.now += REFRESH_S
    assert ann.record.current(HOME).distances == ((tag(mesh, ben), step_of(0.5)),)


def test_a_record_too_old_to_keep_is_not_taken(ann: Membership, clock: Clock) -> None:
    ben = Identity.generate()
    grant = ann.ledger.issue_grant(ann.ledger.own_mesh, ben.peer, Role.PEER)
    long_ago = NOW - MEMBER_LIFETIME_S - 1
    word = Member(ben.peer, "ben", seq=int(long_ago * 1000), last_seen=long_ago)
    assert ann.ledger.hear_of(word.signed(ben.sign), grant) is Heard.REFUSED
