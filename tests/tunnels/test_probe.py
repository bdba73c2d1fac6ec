"""Two sides search for a path to each other: what they find, and when they give up."""

from __future__ import annotations

import math
import random

import pytest

from tests.lab.searches import (
    ALICE,
    BOB,
    DELAY_S,
    DIALLER,
    LISTENER,
    NEAR,
    Search,
    alone,
    in_the_open,
    probe,
    search,
)
from tunnels.consent import UNASKED_BYTES
from tunnels.handshake import Role
from tunnels.probe import GIVE_UP_S, SETTLE_S, Failed, Found
from tunnels.probe_states import State
from tunnels.probe_wire import Kind, Way

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
