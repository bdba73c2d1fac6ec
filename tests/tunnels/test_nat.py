"""What servers' answers, put side by side, say of the NAT between."""

from __future__ import annotations

import pytest

from tunnels.binding import Address
from tunnels.nat import NatFacts, is_worth_asking, judge
from tunnels.peer import NatKind

HOME = "192.168.1.2"
PORT = 4433
A, B, C = ("192.0.2.1", 3478), ("192.0.2.2", 3478), ("192.0.2.3", 3478)
A2 = (A[0], 3479)
WAN = ("198.51.100.7", 40001)
OTHER_PORT = (WAN[0], 40002)
OTHER_WAN = ("203.0.113.9", 50001)
LIE = ("203.0.113.66", 666)


@pytest.mark.parametrize(
    ("answers", "kind", "reachable_at"),
    [
        pytest.param({}, NatKind.UNKNOWN, (), id="nobody was asked"),
        pytest.param({A: None}, NatKind.UNKNOWN, (), id="the one server may be down"),
        pytest.param({A: None, A2: None}, NatKind.UNKNOWN, (), id="so may its whole machine"),
        pytest.param({A: None, B: None}, NatKind.BLOCKED, (), id="two hosts silent"),
        pytest.param({A: (HOME, PORT), B: None}, NatKind.NONE, (), id="seen as we are"),
        pytest.param({A: WAN}, NatKind.UNKNOWN, (WAN,), id="one server's word"),
        pytest.param({A: WAN, A2: WAN}, NatKind.UNKNOWN, (WAN,), id="twice of one machine"),
        pytest.param({A: WAN, B: None, C: WAN}, NatKind.EASY, (WAN,), id="two agree"),
        pytest.param({A: WAN, B: OTHER_PORT}, NatKind.HARD, (), id="two differ"),
        pytest.param({A: WAN, A2: OTHER_PORT}, NatKind.HARD, (), id="differs by port alone"),
        pytest.param({A: LIE, B: WAN, C: WAN}, NatKind.EASY, (WAN,), id="a liar among three"),
        pytest.param({A: WAN, B: WAN, C: (HOME, 1)}, NatKind.EASY, (WAN,), id="another liar"),
    ],
)
def test_answers_tell_the_kind_of_the_nat(
    answers: dict[Address, Address | None], kind: NatKind, reachable_at: tuple[Address, ...]
) -> None:
    facts = judge(answers, (HOME, "127.0.0.1"), PORT)
    assert (facts.kind, facts.reachable_at) == (kind, reachable_at)
    assert facts.asked == len(answers)
    assert facts.answered == sum(one is not None for one in answers.values())


def test_a_network_with_two_ways_out_is_reached_by_both() -> None:
    answers = {A: WAN, B: WAN, C: OTHER_WAN, ("192.0.2.4", 1): OTHER_WAN, ("192.0.2.5", 1): LIE}
    assert judge(answers, (HOME,), PORT).reachable_at == (WAN, OTHER_WAN)


def test_what_a_hard_nat_showed_is_kept_for_those_who_guess() -> None:
    hard = judge({A: WAN, B: OTHER_PORT}, (HOME,), PORT)
    assert hard.mapped == (WAN, OTHER_PORT)
    assert hard.hard_at == (WAN,), "its hosts, once each"
    assert judge({A: WAN, B: WAN}, (HOME,), PORT).hard_at == ()


def test_a_nat_that_keeps_the_port_is_told_from_one_that_does_not() -> None:
    kept = {A: (WAN[0], PORT), B: (WAN[0], PORT)}
    assert judge(kept, (HOME,), PORT).keeps_port is True
    assert judge({A: WAN, B: WAN}, (HOME,), PORT).keeps_port is False
    assert judge({A: None}, (HOME,), PORT).keeps_port is None


def test_how_many_answered_is_no_news_of_the_nat() -> None:
    assert NatFacts(asked=3, answered=2) == NatFacts(asked=2, answered=0)


@pytest.mark.parametrize(
    ("server", "bound", "own", "worth"),
    [
        (A[0], "::", [HOME], True),
        (A[0], "0.0.0.0", [HOME], True),
        (A[0], "::", ["127.0.0.1", "169.254.3.4", "2001:db8::2"], False),
        ("2001:db8::1", "::", [HOME, "fe80::1", "::1"], False),
        ("2001:db8::1", "::", [HOME, "2001:db8::2"], True),
        ("2001:db8::1", "0.0.0.0", [HOME, "2001:db8::2"], False),
        ("127.0.0.1", "::", [], True),
        ("127.0.0.1", "127.0.0.1", [], True),
        (A[0], "127.0.0.1", [HOME], False),
        ("127.0.0.1", HOME, [HOME], False),
        (A[0], HOME, [HOME], True),
        ("2001:db8::1", HOME, [HOME], False),
    ],
)
def test_only_servers_that_the_socket_can_reach_are_asked(
    server: str, bound: str, own: list[str], worth: bool
) -> None:
    assert is_worth_asking(server, bound, own) is worth
