"""When a node can be reached elsewhere, every member hears of it."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from meshnode.whereabouts import PAUSE_S, Whereabouts, network_row
from tests.lab.datagrams import World
from tests.lab.parties import Party, parties, recorded_messages
from tunnels import Candidate, PeerId
from tunnels.nat import NatFacts
from tunnels.outside import OutsideView
from tunnels.peer import NatKind

Clock = trio.testing.MockClock
SOON_S = 40
SEEN = Candidate("quic", "203.0.113.5", 4433, "reflexive")


def watch(node: Party) -> list[Candidate]:
    """Runs the node's Whereabouts; what is added to the list are its further candidates."""
    further: list[Candidate] = []
    node.endpoint.add_candidates(lambda: further)
    connections = node.connections
    whereabouts = Whereabouts(node.endpoint, connections.introduced, connections.show_again)
    node.nursery.start_soon(whereabouts.run)
    return further


def known_places(node: Party, peer: PeerId) -> set[str]:
    member = node.membership.member(peer)
    return {one.host for one in member.candidates} if member else set()


async def test_a_new_address_is_known_to_all_members_at_once(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "mover", "other") as (founder, mover, other):
        for node in (founder, mover, other):
            node.run_connections()
        further = watch(mover)
        for node in (mover, other):
            await node.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        assert SEEN.host not in known_places(founder, mover.peer)

        further.append(SEEN)
        mover.endpoint.tell_candidates_changed()
        await trio.sleep(1)
        for node in (founder, other):
            assert SEEN.host in known_places(node, mover.peer)

        further.clear()
        mover.endpoint.tell_candidates_changed()
        await trio.sleep(PAUSE_S + 1)
        assert SEEN.host not in known_places(founder, mover.peer)


async def test_a_change_that_is_none_is_not_told(tmp_path: Path, autojump_clock: Clock) -> None:
    async with parties(tmp_path, "founder", "mover") as (founder, mover):
        founder.run_connections()
        mover.run_connections()
        further = watch(mover)
        await mover.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        with recorded_messages() as sent:
            mover.endpoint.tell_candidates_changed()
            await trio.sleep(SOON_S)
            assert [one for one in sent if one.service != "roster"] == []
            for number in range(40):  # as often as they may: each is a message to every member
                further[:] = [Candidate("quic", "203.0.113.5", 1000 + number, "reflexive")]
                mover.endpoint.tell_candidates_changed()
                await trio.sleep(PAUSE_S / 10)
        hellos = [message for message in sent if message.service == "hello"]
        rounds = 40 / 10 + 1
        assert 0 < len(hellos) <= 4 * rounds, "four messages a hello"


async def test_the_status_says_how_the_node_looks_from_outside() -> None:
    view = OutsideView(World().host("192.168.1.2"), None)
    view._facts[4] = NatFacts(NatKind.EASY, (("203.0.113.5", 4433),), True)
    assert network_row(view) == {
        "ipv4": {"nat": "easy", "seen_at": ["203.0.113.5:4433"], "keeps_port": True},
        "ipv6": {"nat": "unknown", "seen_at": [], "keeps_port": None},
    }
