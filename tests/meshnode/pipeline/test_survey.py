"""What all machines' words together say of the ways between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from meshnode.pipeline.figures import Figures
from meshnode.pipeline.gauge import Gauge
from meshnode.pipeline.plan import PlanNode
from meshnode.pipeline.probing import Probing
from meshnode.pipeline.protocol import DeviceFacts, WorkerFacts
from meshnode.pipeline.speeds import ASSUMED_LINK, Link, Speed
from meshnode.pipeline.survey import LINK_BYTES_PER_S, Lender, links_between
from meshnode.pipeline.ways import Way
from tunnels import PeerId, Session

ME, BEN, CARL = (PeerId(bytes([n]) * 32) for n in range(3))


@dataclass
class Linked:
    """What a session says of the link that it uses."""

    peer: PeerId
    kind: str = "tcp"
    rtt_s: float = 0.004

    @property
    def best_link(self) -> Linked:
        return self


@dataclass
class Known:
    own: tuple[Way, ...]

    def ways(self) -> tuple[Way, ...]:
        return self.own


def lender(name: str, peer: PeerId, *ways: Way, kind: str = "tcp") -> Lender:
    device = DeviceFacts("CPU", "a processor", False, 2**34, 2**33, Speed(1e10, 2e11))
    facts = WorkerFacts(name, "key", "cpu", 2**33, (device,), (), ways)
    return Lender(name, cast(Session, Linked(peer, kind)), facts)


def known(*ways: Way) -> Figures:
    return cast(Figures, Known(ways))


def test_of_two_ends_words_both_directions_are_known_and_so_are_workers_ways() -> None:
    lenders = [
        lender("ben", BEN, Way(ME, 0.005, 2e6, 7.0), Way(CARL, 0.001, 9e7)),
        lender("carl", CARL, Way(BEN, 0.001, 8e7)),
    ]
    nodes = [one.plan_node() for one in lenders]
    assert [device.measured for device in nodes[0].devices] == [Speed(1e10, 2e11)]
    local = PlanNode("local", True, ())
    links = links_between([local, *nodes], lenders, ME, known(Way(BEN, 0.004, 5e6)))
    assert links.pairs["ben", "local"] == Link(0.004, 5e6)
    assert links.pairs["local", "ben"] == Link(0.004, 2e6, age_s=7.0)
    assert links.pairs["ben", "carl"].bytes_per_s == 8e7
    assert links.is_measured("local", "ben")
    assert links.is_measured("ben", "carl")
    assert not links.is_measured("local", "carl"), "neither says what comes over it"
    assert links.pairs["local", "carl"] == Link(0.004, ASSUMED_LINK.bytes_per_s, False)


@pytest.mark.parametrize("figures", [None, known()])
def test_without_figures_a_link_is_as_its_kind_is(figures: Figures | None) -> None:
    ben = lender("ben", BEN, kind="quic")
    local = PlanNode("local", True, ())
    links = links_between([local, ben.plan_node()], [ben], ME, figures)
    assert links.pairs["ben", "local"] == Link(0.004, LINK_BYTES_PER_S["quic"], False)


def test_an_asker_hears_of_members_of_its_own_meshes_alone() -> None:
    probing = cast(Probing, Known((Way(BEN, 0.004, 5e6), Way(CARL, 0.001, 9e7))))
    pairs = {frozenset((BEN, ME))}
    figures = Figures(cast(Gauge, None), probing, lambda one, asker: {one, asker} in pairs)
    assert figures.ways(ME) == (Way(BEN, 0.004, 5e6),)
    assert len(figures.ways()) == 2, "for this node's own plans, all"


def test_two_that_are_known_to_be_apart_are_no_neighbours_in_a_ring() -> None:
    lenders = [lender("ben", BEN), lender("carl", CARL)]
    nodes = [one.plan_node() for one in lenders]
    local = PlanNode("local", True, ())

    def parted(one: PeerId, other: PeerId) -> bool:
        return (one, other) == (BEN, CARL)

    links = links_between([local, *nodes], lenders, ME, None, parted)
    assert links.parted == {("ben", "carl")}
    assert not links.goes_straight("ben", "carl")
