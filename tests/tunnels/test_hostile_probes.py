"""Who lies, repeats, or names others, while two search for a path to each other."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tests.lab.searches import (
    ALICE,
    BOB,
    DIALLER,
    LISTENER,
    NEAR,
    ON_WIRE_BYTES,
    STRANGER,
    Search,
    alone,
    probe,
)
from tunnels.checklist import MAX_WAYS
from tunnels.consent import UNASKED_BYTES
from tunnels.errors import BadFrame
from tunnels.handshake import Role
from tunnels.probe import MAX_HEARD, SETTLE_S, Found
from tunnels.probe_states import State
from tunnels.probe_wire import PROBE_BYTES, Kind, Message, Way
from tunnels.salvo import spray


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
