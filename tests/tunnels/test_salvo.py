"""The hard and the easy: a NAT whose ports cannot be named, found by many probes at once."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from tests.lab.searches import ALICE, BOB, DIALLER, LISTENER, ON_WIRE_BYTES, Search, alone, probe
from tunnels.binding import Address
from tunnels.consent import UNASKED_BYTES
from tunnels.handshake import Role
from tunnels.probe import SALVO_AFTER_S, SALVO_UNASKED_BYTES, Found
from tunnels.probe_wire import Way
from tunnels.salvo import FAN_SOCKETS, PORTS, SPRAYED_PORTS, fan, hold, spray


class HardAndEasy:
    """The hard side's NAT shows every destination another random port; both NATs let in only who
    was sent to."""

    def __init__(self, hard: Role, seed: int) -> None:
        self._hard = hard
        self._host = (ALICE if hard is DIALLER else BOB)[0]
        self._easy = BOB if hard is DIALLER else ALICE
        self._dice = random.Random(seed)
        self._ports: dict[int, int] = {}  # of a socket, towards the easy side
        self._open: set[Address] = set()  # at the easy side

    def __call__(self, sender: Role, way: Way, now: float) -> Way | None:
        if sender is self._hard:
            port = self._ports.setdefault(way.via, self._dice.randrange(1024, 65536))
            seen = (self._host, port)
            return Way(seen) if way.to == self._easy and seen in self._open else None
        self._open.add(way.to)
        vias = [via for via, port in self._ports.items() if (self._host, port) == way.to]
        return Way(self._easy, vias[0]) if vias else None


def hard_and_easy(hard: Role, seed: int) -> Search:
    named = {DIALLER: BOB, LISTENER: ALICE}
    sides = {
        hard: probe(hard, [named[hard]], salvo=fan(named[hard])),
        hard.other: probe(
            *(hard.other, [named[hard.other]]),
            salvo=spray(named[hard.other][0], seed * 7919),
        ),
    }
    both = Search(sides[DIALLER], sides[LISTENER], HardAndEasy(hard, seed))
    both.run()
    return both


@pytest.mark.parametrize("hard", Role)
def test_the_hard_and_the_easy_find_each_other_by_chance(hard: Role) -> None:
    searches = [hard_and_easy(hard, seed) for seed in range(50)]
    took_s = sorted(both.decided_at_s[hard] for both in searches)
    assert sum(isinstance(both.decided[hard], Found) for both in searches) >= 48
    assert took_s[25] < SALVO_AFTER_S + 1
    for both in searches:
        if not isinstance(both.decided[hard], Found):
            continue
        assert both.found(hard).way.via > 0, "one of the many sockets"
        assert both.found(hard.other).way.via == 0


def test_a_salvo_is_bounded_also_where_nothing_ever_answers() -> None:
    aimed_at = {DIALLER: fan(BOB), LISTENER: spray(ALICE[0], 1)}
    both = Search(
        probe(DIALLER, [BOB], salvo=aimed_at[DIALLER]),
        probe(LISTENER, [ALICE], salvo=aimed_at[LISTENER]),
        lambda *sent: None,
    )
    both.run()
    fanned, sprayed = both.sent[DIALLER], both.sent[LISTENER]
    assert len({way.via for _, way in fanned}) == FAN_SOCKETS + 1
    assert both.bytes_to(BOB[0]) <= FAN_SOCKETS * ON_WIRE_BYTES + UNASKED_BYTES
    assert both.bytes_to(ALICE[0]) <= SPRAYED_PORTS * ON_WIRE_BYTES + SALVO_UNASKED_BYTES
    ports = Counter(way.to[1] for _, way in sprayed if way.to != ALICE)
    assert set(ports.values()) == {1}
    assert min(at_s for at_s, way in sprayed if way.to != ALICE) == SALVO_AFTER_S
    assert sprayed[-1][0] - SALVO_AFTER_S < 3.5
    assert "nothing from" in both.failed(DIALLER)


@pytest.mark.parametrize("waits_as", ["hard", "easy"])
def test_ports_stay_open_while_the_other_side_is_waited_for(waits_as: str) -> None:
    """The dialler has patience; the listener fires its salvo when it is told to begin."""
    salvo, answer, hard = (fan(BOB), spray(ALICE[0], 5), DIALLER)
    if waits_as == "easy":
        salvo, answer, hard = hold(BOB[0], 5), fan(ALICE), LISTENER
    patient = probe(DIALLER, [BOB], salvo=salvo, patience_s=300.0)
    other = probe(LISTENER, [ALICE], salvo=answer, starts_s=130.0)
    both = Search(patient, other, HardAndEasy(hard, 3))
    both.run(400)
    assert 130 < both.decided_at_s[DIALLER] < 134
    assert isinstance(both.decided[DIALLER], Found)
    way = salvo.ways[-1]
    asked_s = [at_s for at_s, one in both.sent[DIALLER] if one == way and at_s < 130]
    assert len(asked_s) > 4
    assert max(after - before for before, after in itertools.pairwise(asked_s)) < 30
    assert both.bytes_to(BOB[0]) / 130 < (1500 if waits_as == "hard" else 5000)
    assert len(patient._asked) < 2 * len(salvo.ways)


def test_the_first_answer_ends_a_salvo() -> None:
    bob = alone(LISTENER, [], salvo=spray(ALICE[0], 1))
    bob.side.handle_timer(SALVO_AFTER_S)
    port, question = next(iter(bob.asked().items()))
    bob.answer(question, port, SALVO_AFTER_S + 0.01)
    while bob.side.next_deadline() < math.inf:
        bob.side.handle_timer(bob.side.next_deadline())
    assert bob.asked() == {}


def test_a_salvo_that_is_not_permitted_is_not_fired() -> None:
    alice = alone(DIALLER, salvo=fan(BOB), may_fire=lambda: False)
    while alice.side.next_deadline() < math.inf:
        alice.side.handle_timer(alice.side.next_deadline())
    assert {way.via for way, _ in alice.said()} == {0}


def test_where_a_path_is_there_no_salvo_is_fired() -> None:
    both = Search(probe(DIALLER, [BOB], salvo=fan(BOB)), probe(LISTENER, [ALICE]))
    both.run()
    assert {way.via for _, way in both.sent[DIALLER]} == {0}


def test_sprayed_ports_lie_evenly_so_that_a_nat_that_counts_up_is_not_missed() -> None:
    for first in (0, 12345, 2**32 - 1):
        ports = sorted(way.to[1] for way in spray(ALICE[0], first).ways)
        assert len(set(ports)) == SPRAYED_PORTS
        assert ports[0] >= 1024
        gaps = [after - before for before, after in itertools.pairwise(ports)]
        assert max(gaps) <= 3 * PORTS // SPRAYED_PORTS < FAN_SOCKETS
