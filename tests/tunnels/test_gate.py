"""How often, and how many at once: one peer, and all together."""

from __future__ import annotations

from tests.lab.nodes import identity
from tunnels.allowance import Rate
from tunnels.gate import ServiceGate, ServiceLimits

ALICE, BOB, CAROL = (identity(name).peer for name in ("alice", "bob", "carol"))
WIDE = Rate(per_s=1000, burst=1000)


def test_one_peer_has_so_many_streams_and_gets_one_back_for_each_it_ends() -> None:
    gate = ServiceGate(ServiceLimits(2, 99, WIDE, WIDE), 0.0)
    assert gate.enter(ALICE, 0.0) is None
    assert gate.enter(ALICE, 0.0) is None
    assert "too many streams" in (gate.enter(ALICE, 0.0) or "")
    assert gate.enter(BOB, 0.0) is None
    gate.leave(ALICE)
    assert gate.enter(ALICE, 0.0) is None
    for peer in (ALICE, ALICE, BOB):
        gate.leave(peer)
    assert gate.streams == 0


def test_all_together_have_so_many() -> None:
    gate = ServiceGate(ServiceLimits(2, 2, WIDE, WIDE), 0.0)
    assert gate.enter(ALICE, 0.0) is None
    assert gate.enter(BOB, 0.0) is None
    assert "busy with others" in (gate.enter(CAROL, 0.0) or "")


def test_who_asks_too_often_takes_nothing_from_the_others() -> None:
    gate = ServiceGate(ServiceLimits(99, 99, Rate(1, 2), Rate(1, 3)), 0.0)
    answers = [gate.enter(ALICE, 0.0) for _ in range(10)]
    assert answers[:2] == [None, None]
    assert all("asked too often; wait" in (answer or "") for answer in answers[2:])
    assert gate.enter(BOB, 0.0) is None
    assert "too often by many" in (gate.enter(CAROL, 0.0) or "")
    assert gate.enter(ALICE, 5.0) is None
