"""Two sides of a search, connected by a network that each test invents."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from tunnels.binding import Address
from tunnels.consent import UNASKED_BYTES
from tunnels.errors import BadFrame
from tunnels.handshake import Role
from tunnels.probe import (
    GIVE_UP_S,
    MAX_HEARD,
    MAX_WAYS,
    SALVO_AFTER_S,
    SALVO_UNASKED_BYTES,
    SETTLE_S,
    Action,
    Failed,
    Found,
    Plan,
    Probe,
    Send,
    State,
)
from tunnels.probe_wire import PROBE_BYTES, Kind, Message, Way, direction_key
from tunnels.salvo import FAN_SOCKETS, PORTS, SPRAYED_PORTS, Salvo, fan, hold, spray

SECRET = b"s" * 32
ALICE, BOB = ("11.0.0.1", 4001), ("11.0.0.2", 4002)
STRANGER = ("11.0.0.66", 66)
DIALLER, LISTENER = Role.DIALLER, Role.LISTENER
ON_WIRE_BYTES = PROBE_BYTES + 28
DELAY_S = 0.02

Sight = Callable[[Role, Way, float], Way | None]
"""The way over which the other side sees a probe come; None: it does not arrive."""


def in_the_open(sender: Role, way: Way, now: float) -> Way | None:
    return {(DIALLER, BOB): Way(ALICE), (LISTENER, ALICE): Way(BOB)}.get((sender, way.to))


def probe(
    role: Role,
    candidates: Sequence[Address] = (),
    *,
    starts_s: float = 0.0,
    salvo: Salvo | None = None,
    patience_s: float = 0.0,
    may_fire: Callable[[], bool] = lambda: True,
    allows: Callable[[str], bool] = lambda host: True,
) -> Probe:
    plan = Plan(role, starts_s, candidates, salvo, may_fire, patience_s)
    return Probe(SECRET, plan, allows, random.Random(role.value).randbytes)


class Search:
    """I carry probes between two sides; what they decide ends up in `decided`."""

    def __init__(self, dialler: Probe, listener: Probe, sight: Sight = in_the_open) -> None:
        self.sides = {DIALLER: dialler, LISTENER: listener}
        self.sight = sight
        self.now = 0.0
        self.decided: dict[Role, Found | Failed] = {}
        self.decided_at_s: dict[Role, float] = {}
        self.sent: dict[Role, list[tuple[float, Way]]] = {DIALLER: [], LISTENER: []}
        self._flights: list[tuple[float, int, Role, bytes, Way]] = []
        self._numbers = itertools.count()

    def run(self, until_s: float = 60.0) -> None:
        while True:
            due = min(side.next_deadline() for side in self.sides.values())
            lands = self._flights[0][0] if self._flights else math.inf
            if min(due, lands) > until_s:
                return
            self.now = max(self.now, min(due, lands))
            if lands <= due:
                _, _, receiver, datagram, way = heapq.heappop(self._flights)
                self.sides[receiver].receive_untrusted(datagram, way, self.now)
            else:
                for side in self.sides.values():
                    side.handle_timer(self.now)
            for role, side in self.sides.items():
                self._perform(role, side.actions())

    def _perform(self, role: Role, actions: list[Action]) -> None:
        for action in actions:
            if not isinstance(action, Send):
                self.decided[role] = action
                self.decided_at_s[role] = self.now
                continue
            self.sent[role].append((self.now, action.way))
            if (seen := self.sight(role, action.way, self.now)) is not None:
                flight = (role.other, action.datagram, seen)
                heapq.heappush(self._flights, (self.now + DELAY_S, next(self._numbers), *flight))

    def found(self, role: Role) -> Found:
        found = self.decided[role]
        assert isinstance(found, Found), found
        return found

    def failed(self, role: Role) -> str:
        failed = self.decided[role]
        assert isinstance(failed, Failed), failed
        return failed.reason

    def bytes_to(self, host: str) -> int:
        ways = itertools.chain(*self.sent.values())
        return ON_WIRE_BYTES * sum(way.to[0] == host for _, way in ways)


def search(sight: Sight = in_the_open) -> Search:
    both = Search(probe(DIALLER, [BOB]), probe(LISTENER, [ALICE]), sight)
    both.run()
    return both


# --- finding ------------------------------------------------------------------------------------


def test_two_in_the_open_find_each_other_and_learn_how_they_are_seen() -> None:
    both = search()
    alices, bobs = both.found(DIALLER), both.found(LISTENER)
    assert (alices.way, alices.seen) == (Way(BOB), ALICE)
    assert (bobs.way, bobs.seen) == (Way(ALICE), BOB)
    assert alices.rtt_s == pytest.approx(2 * DELAY_S)
    assert both.decided_at_s[DIALLER] < 0.3
    assert max(both.bytes_to(ALICE[0]), both.bytes_to(BOB[0])) <= UNASKED_BYTES


def test_nothing_is_sent_before_the_agreed_instant() -> None:
    both = Search(probe(DIALLER, [BOB], starts_s=5.0), probe(LISTENER, [ALICE], starts_s=5.0))
    both.run()
    assert min(at_s for at_s, _ in both.sent[DIALLER] + both.sent[LISTENER]) == 5.0
    assert both.decided_at_s[DIALLER] < 5.3


def test_who_is_asked_before_the_agreed_instant_starts() -> None:
    both = Search(probe(DIALLER, [BOB]), probe(LISTENER, [ALICE], starts_s=5.0))
    both.run()
    assert both.decided_at_s[LISTENER] < 0.3


def test_a_peer_that_was_not_where_it_said_is_found_where_it_asks_from() -> None:
    """Its NAT shows us another port than it showed to those who told it."""
    elsewhere = (ALICE[0], 50000)

    def sight(sender: Role, way: Way, now: float) -> Way | None:
        if sender is DIALLER:
            return Way(elsewhere) if way.to == BOB else None
        return Way(BOB) if way.to == elsewhere else None

    both = search(sight)
    assert both.found(LISTENER).way == Way(elsewhere)
    assert both.found(DIALLER).way == Way(BOB)
    assert both.found(DIALLER).seen == elsewhere


def test_probes_lost_at_first_are_said_again() -> None:
    both = search(lambda *sent: in_the_open(*sent) if sent[2] > 2 else None)
    assert both.found(DIALLER).way == Way(BOB)
    assert both.decided_at_s[DIALLER] < 4


@pytest.mark.parametrize("seed", range(40))
def test_of_probes_a_fifth_may_be_lost(seed: int) -> None:
    dice = random.Random(seed)
    both = search(lambda *sent: in_the_open(*sent) if dice.random() > 0.2 else None)
    assert both.found(DIALLER).way == Way(BOB)
    assert both.found(LISTENER).way == Way(ALICE)


# --- one side, and a test that plays the other --------------------------------------------------


class Alone:
    """One side; the test is the other one, who holds the secret and says what it likes."""

    def __init__(self, side: Probe, role: Role) -> None:
        self.side = side
        self._hears, self._says = direction_key(SECRET, role.other), direction_key(SECRET, role)
        self._nonces = itertools.count()
        self.outcome: Found | Failed | None = None

    def said(self) -> list[tuple[Way, Message]]:
        found = []
        for action in self.side.actions():
            if isinstance(action, Send):
                found.append((action.way, self._hears.open_untrusted(action.datagram)))
            else:
                self.outcome = action
        return found

    def asked(self, kind: Kind = Kind.PING) -> dict[Address, Message]:
        return {way.to: message for way, message in self.said() if message.kind is kind}

    def say(self, message: Message, sender: Address, now: float, via: int = 0) -> bytes:
        datagram = self._says.seal(message, next(self._nonces).to_bytes(12, "big"))
        self.side.receive_untrusted(datagram, Way(sender, via), now)
        return datagram

    def ask(self, number: int, sender: Address, now: float, kind: Kind = Kind.PING) -> bytes:
        return self.say(Message(kind, number.to_bytes(8, "big"), ALICE), sender, now)

    def answer(self, question: Message, sender: Address, now: float, via: int = 0) -> None:
        self.say(Message(Kind.PONG, question.transaction, ALICE), sender, now, via)


def alone(role: Role, candidates: Sequence[Address] = (BOB,), **options: object) -> Alone:
    found = Alone(probe(role, candidates, **options), role)  # type: ignore[arg-type]
    found.side.handle_timer(0.0)
    return found


NEAR = ("192.168.1.2", 2)


def test_the_way_with_the_shorter_round_trip_is_nominated_though_it_answers_second() -> None:
    alice = alone(DIALLER, [BOB, NEAR])
    asked = alice.asked()
    alice.answer(asked[BOB], BOB, 0.08)
    alice.side.handle_timer(0.1)
    alice.answer(alice.asked()[NEAR], NEAR, 0.101)
    alice.side.handle_timer(0.08 + SETTLE_S)
    assert list(alice.asked(Kind.NOMINATE)) == [NEAR]


def test_a_nominated_way_that_falls_silent_is_given_up_for_the_next() -> None:
    alice = alone(DIALLER, [BOB, NEAR])
    asked = alice.asked()
    alice.answer(asked[NEAR], NEAR, 0.01)
    alice.answer(asked[BOB], BOB, 0.02)
    while alice.side.next_deadline() < 3:
        alice.side.handle_timer(alice.side.next_deadline())
    nominations = [way.to for way, message in alice.said() if message.kind is Kind.NOMINATE]
    assert nominations[0] == NEAR
    assert nominations[-1] == BOB


def test_when_all_ways_fall_silent_the_reason_says_so() -> None:
    alice = alone(DIALLER)
    alice.answer(alice.asked()[BOB], BOB, 0.01)
    alice.side.handle_timer(0.02)  # early: nothing is due
    assert alice.said() == []
    while alice.side.next_deadline() < math.inf:
        alice.side.handle_timer(alice.side.next_deadline())
    nominated = alice.asked(Kind.NOMINATE)
    assert alice.outcome == Failed("a path was found and fell silent again")
    alice.answer(nominated[BOB], BOB, 7.0)
    assert alice.said() == []
    assert alice.side.state is State.FAILED


def test_who_found_goes_on_answering_for_its_answer_may_have_been_lost() -> None:
    bob = alone(LISTENER, [ALICE])
    bob.ask(1, ALICE, 0.1, Kind.NOMINATE)
    assert bob.asked(Kind.PONG)
    assert isinstance(bob.outcome, Found)
    bob.ask(2, ALICE, 0.3, Kind.NOMINATE)
    assert list(bob.asked(Kind.PONG)) == [ALICE]
    assert bob.side.next_deadline() == math.inf


def test_an_answer_that_comes_after_the_search_is_over_changes_nothing() -> None:
    bob = alone(LISTENER, [ALICE])
    asked = bob.asked()
    bob.ask(1, ALICE, 0.1, Kind.NOMINATE)
    bob.said()
    bob.answer(asked[ALICE], ALICE, 0.2)
    assert bob.said() == []


def test_the_listener_cannot_nominate() -> None:
    alice = alone(DIALLER)
    alice.ask(1, BOB, 0.1, Kind.NOMINATE)
    assert alice.asked(Kind.PONG)
    assert alice.outcome is None


# --- ends ---------------------------------------------------------------------------------------


def test_where_nothing_comes_through_both_end_in_time_and_say_so() -> None:
    both = search(lambda sender, way, now: None)
    assert f"nothing from the other side arrived within {GIVE_UP_S:.0f} s" in both.failed(DIALLER)
    assert both.decided_at_s[DIALLER] == GIVE_UP_S
    assert both.failed(LISTENER)
    assert both.decided_at_s[LISTENER] <= GIVE_UP_S + 1


def test_a_way_that_is_open_in_one_direction_only_is_none() -> None:
    both = search(lambda *sent: in_the_open(*sent) if sent[0] is LISTENER else None)
    assert "ours do not arrive there" in both.failed(DIALLER)
    assert "nothing from" in both.failed(LISTENER)


def test_who_is_patient_is_there_whenever_the_other_begins() -> None:
    """And until then keeps its NAT open, which forgets after five seconds."""
    for begins_s in (3.0, 59.0, 290.0):
        last_s = [0.0]

        def short(sender: Role, way: Way, now: float, last_s: list[float] = last_s) -> Way | None:
            if sender is DIALLER:
                last_s[0] = now
                return Way(ALICE) if now >= begins_s else None  # noqa: B023
            return Way(BOB) if now - last_s[0] < 5 else None

        both = Search(
            probe(DIALLER, [BOB], patience_s=300.0),
            probe(LISTENER, [ALICE], starts_s=begins_s),
            short,
        )
        both.run(400)
        assert both.found(DIALLER).way == Way(BOB)
        assert both.decided_at_s[DIALLER] < begins_s + 0.4


def test_patience_ends() -> None:
    both = Search(probe(DIALLER, [BOB], patience_s=100.0), probe(LISTENER, []), lambda *sent: None)
    both.run(400)
    assert both.decided_at_s[DIALLER] == 100 + GIVE_UP_S
    per_s = both.bytes_to(BOB[0]) / 100
    assert per_s < 40


def test_who_is_patient_and_heard_the_other_gives_up_as_soon_as_anyone() -> None:
    both = Search(
        probe(DIALLER, [BOB], patience_s=300.0),
        probe(LISTENER, [ALICE], starts_s=50.0),
        lambda *sent: in_the_open(*sent) if sent[0] is LISTENER else None,
    )
    both.run(400)
    assert "ours do not arrive there" in both.failed(DIALLER)
    assert both.decided_at_s[DIALLER] < 51 + GIVE_UP_S


# --- who lies, repeats, or names others ---------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_whoever_is_named_and_does_not_answer_gets_one_kilobyte(role: Role) -> None:
    named = [(STRANGER[0], port) for port in range(1, MAX_WAYS + 9)]
    both = Search(probe(DIALLER, named), probe(LISTENER, named), lambda *sent: None)
    both.run()
    for sent in both.sent.values():
        each = Counter(way.to[0] for _, way in sent)
        assert 0 < each[STRANGER[0]] * ON_WIRE_BYTES <= UNASKED_BYTES


def test_over_ipv6_headers_are_longer_and_probes_fewer() -> None:
    alice = alone(DIALLER, [("2001:db8::66", port) for port in range(1, 20)])
    assert len(alice.said()) == UNASKED_BYTES // (PROBE_BYTES + 48)


def test_a_sender_that_never_answers_gets_one_kilobyte_however_much_it_asks() -> None:
    bob = alone(LISTENER, [])
    for number in range(2000):
        bob.ask(number, (STRANGER[0], 1 + number), number / 500)
        bob.side.handle_timer(number / 500)
    assert len(bob.said()) * ON_WIRE_BYTES <= UNASKED_BYTES


def test_a_question_recorded_and_said_again_is_not_heard() -> None:
    bob = alone(LISTENER, [])
    datagram = bob.ask(1, ALICE, 0.1)
    assert bob.asked(Kind.PONG)
    bob.side.receive_untrusted(datagram, Way(STRANGER), 0.2)
    assert STRANGER not in {way.to for way, _ in bob.said()}


def test_an_answer_counts_once_and_only_from_where_the_question_went() -> None:
    alice = alone(DIALLER)
    question = alice.asked()[BOB]
    alice.answer(question, STRANGER, 0.01)
    alice.answer(question, BOB, 0.01, via=3)
    assert alice.side.state is State.PROBING
    alice.answer(question, BOB, 0.03)
    alice.answer(question, BOB, 0.13)
    alice.side.handle_timer(0.03 + SETTLE_S)
    alice.answer(alice.asked(Kind.NOMINATE)[BOB], BOB, 0.2)
    alice.said()
    assert isinstance(alice.outcome, Found)
    assert alice.outcome.rtt_s == pytest.approx(0.2 - 0.03 - SETTLE_S)


def test_an_answer_said_again_does_not_make_a_way_look_longer() -> None:
    alice = alone(DIALLER, [BOB, NEAR])
    asked = alice.asked()
    alice.answer(asked[BOB], BOB, 0.03)
    alice.answer(asked[NEAR], NEAR, 0.05)
    alice.answer(asked[BOB], BOB, 0.13)
    alice.side.handle_timer(0.03 + SETTLE_S)
    assert list(alice.asked(Kind.NOMINATE)) == [BOB]


def test_an_answer_to_no_question_is_nothing() -> None:
    alice = alone(DIALLER)
    alice.answer(Message(Kind.PONG, b"whatever", ALICE), BOB, 0.1)
    assert alice.side.state is State.PROBING


def test_what_is_not_sealed_right_is_refused_and_changes_nothing() -> None:
    alice = alone(DIALLER)
    alice.said()
    with pytest.raises(BadFrame):
        alice.side.receive_untrusted(bytes(PROBE_BYTES), Way(BOB), 0.1)
    assert alice.said() == []


def test_where_the_address_policy_says_no_nothing_is_sent() -> None:
    def allows(host: str) -> bool:
        return host != STRANGER[0]

    alice = alone(DIALLER, [BOB, STRANGER], allows=allows, salvo=spray(STRANGER[0], 0))
    alice.ask(1, STRANGER, 0.1)
    while alice.side.next_deadline() < math.inf:
        alice.side.handle_timer(alice.side.next_deadline())
    assert {way.to for way, _ in alice.said()} == {BOB}


def test_ways_and_what_was_heard_are_bounded() -> None:
    bob = alone(LISTENER, [])
    for number in range(MAX_HEARD + 10):
        bob.ask(number, (f"11.0.{number // 250}.{number % 250}", 1), 0.1)
    said = bob.said()
    answered = sum(message.kind is Kind.PONG for _, message in said)
    assert answered == MAX_HEARD
    assert len({way for way, message in said if message.kind is Kind.PING}) == MAX_WAYS


# --- the hard and the easy ----------------------------------------------------------------------


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
