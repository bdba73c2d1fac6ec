"""A peer that stops at any step of what nodes say to each other is dropped within that step's
limit, and what it held is free again. (The tunnel's own steps: tests/tunnels/test_stalls.py.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.gossip import NEWS_PAUSE_S
from discovery.grants import GRANT_LIFETIME_S
from meshnode import control, hearsay, removal, renewal
from meshnode.control import serve_control_socket
from meshnode.dialling import JOIN_TIMEOUT_S
from meshnode.errors import NetworkError
from meshnode.introduction import record_pages
from meshnode.membership import HELLO_TIMEOUT_S
from meshnode.messages import Message
from meshnode.paths import runtime_folder, socket_path
from meshnode.strangers import STRANGER_TIMEOUT_S
from tests.lab.parties import Party, parties, recorded_messages
from tests.lab.stalls import (
    EASY_WINDOW_BYTES,
    framed,
    halves,
    let_pass,
    never,
    open_at,
    open_mute,
    pushed_clock,
    stalling,
    unfinished,
)
from tunnels.streams import SEE_OFF_S

Clock = trio.testing.MockClock
LATE_S = 1.0


# --- who asks stops -------------------------------------------------------------------------


async def words_of(service: str, alice: Party, bob: Party) -> tuple[list[bytes], list[bytes]]:
    """All that alice says to bob at this service, and what of bob's answers has a size to know."""
    if service == "hello":
        with recorded_messages() as sent:
            await alice.introduce_to(bob)
        said = [one for one in sent if one.service == "hello"]
        hers = [framed(one.message) for one in said if one.to == bob.peer]
        return hers, [framed(one.message) for one in said if one.to == alice.peer]
    messages: dict[str, Callable[[], list[Message]]] = {
        "join": lambda: [{"id": bytes(8), "secret": bytes(16)}],
        "renew": lambda: [{"mesh": bob.mesh}],
        "revocations": lambda: [{"revocations": [], "more": True}, {"revocations": [], "more": 0}],
        "roster": lambda: [*record_pages([]), {"records": []}, {"records": []}],
    }
    return [framed(one) for one in messages[service]()], []


@dataclass(frozen=True)
class Stop:
    """alice says `said` messages, with `half` also half of the next, and takes `taken` of bob's
    (None: as many as come)."""

    service: str
    said: int = 0
    half: bool = False
    taken: int | None = None


STOPS = {
    "join: nothing said": Stop("join"),
    "join: half the request": Stop("join", half=True),
    "join: the answer not taken": Stop("join", said=1, taken=0),
    "hello 1: nothing said": Stop("hello"),
    "hello 1: half of it": Stop("hello", half=True),
    "hello 2: not taken": Stop("hello", said=1, taken=0),
    "hello 3: not said": Stop("hello", said=1),
    "hello 3: half of it": Stop("hello", said=1, half=True),
    "hello 4: not taken": Stop("hello", said=2, taken=2),
    "renew: nothing said": Stop("renew"),
    "renew: half the request": Stop("renew", half=True),
    "renew: the answer not taken": Stop("renew", said=1, taken=0),
    "revocations: nothing said": Stop("revocations"),
    "revocations: half a page": Stop("revocations", half=True),
    "revocations: no further page": Stop("revocations", said=1),
    "roster: nothing said": Stop("roster"),
    "roster: half a page": Stop("roster", half=True),
    "roster: no end": Stop("roster", said=2),
}


@pytest.mark.parametrize("step", STOPS)
async def test_whoever_asks_and_stops_is_dropped(
    step: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    stop = STOPS[step]
    async with parties(tmp_path, "bob", "alice") as (bob, alice):
        await alice.connections.join(bob.invite())
        hers, his = await words_of(stop.service, alice, bob)
        await trio.sleep(1)
        takes = EASY_WINDOW_BYTES if stop.taken is None else len(b"".join(his[: stop.taken]))
        mute = await open_mute(alice.session(bob), stop.service, takes)
        mute.say(halves(hers, stop.said, stop.half))
        await trio.sleep(HELLO_TIMEOUT_S - LATE_S)
        gate = bob.endpoint._services._gates[stop.service]
        assert (gate.streams, unfinished(bob.session(alice))) == (1, [stop.service])
        await trio.sleep(2 * LATE_S)
        assert (gate.streams, unfinished(bob.session(alice))) == (0, [])
        await alice.introduce_to(bob)
        assert bob.knows(alice), "all else goes on"


@pytest.mark.parametrize("service", ["join", "hello", "renew", "revocations", "roster"])
async def test_a_word_now_and_then_buys_no_time(
    service: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob", "alice") as (bob, alice):
        await alice.connections.join(bob.invite())
        mute = await open_mute(alice.session(bob), service)
        for byte in framed({"word": bytes(100)})[: int(HELLO_TIMEOUT_S)]:
            mute.say(bytes([byte]))
            await trio.sleep(LATE_S * 0.95)
        assert bob.endpoint._services._gates[service].streams == 1
        mute.say(b"\0")
        await trio.sleep(LATE_S)
        assert bob.endpoint._services._gates[service].streams == 0


async def test_an_answer_whose_end_is_never_acknowledged_is_given_up(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """Its room in the session would be gone for as long as that lasts."""
    async with parties(tmp_path, "bob", "alice") as (bob, alice):
        await alice.connections.join(bob.invite())
        mute = await open_mute(alice.session(bob), "join")
        mute.say(framed({"id": bytes(8), "secret": bytes(16)}))
        await trio.sleep(SEE_OFF_S - LATE_S)
        assert bob.endpoint._services._gates["join"].streams == 0
        assert unfinished(bob.session(alice)) == ["join"]
        await trio.sleep(2 * LATE_S)
        assert unfinished(bob.session(alice)) == []
        assert bob.knows(alice)


@pytest.mark.parametrize("step", [None, *(one for one in STOPS if "join" in one or "hello" in one)])
async def test_a_stranger_that_stops_loses_its_session(
    step: str | None, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob", "alice") as (bob, alice):
        bob.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        session = await alice.dial(bob)
        if step is not None:
            stop = STOPS[step]
            words = [framed({"id": bytes(8), "secret": bytes(16)})] * 3
            if stop.service == "hello":
                hello = alice.connections.introductions._hello((), (alice.mesh,))
                words = [framed(hello), b"\0\0", b"\0"]
            mute = await open_mute(session, stop.service, 0 if stop.taken == 0 else 1 << 20)
            mute.say(halves(words, min(stop.said, 1), stop.half))
        await trio.sleep(STRANGER_TIMEOUT_S - LATE_S)
        assert not session.closed.is_set()
        await trio.sleep(2 * LATE_S)
        assert session.close_reason == f"no introduction within {STRANGER_TIMEOUT_S:.0f} s"
        assert bob.endpoint.sessions() == []


# --- who is asked stops ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "after", "half"),
    [
        ("join", 0, False),
        ("join", 0, True),
        ("hello", 0, False),
        ("hello", 0, True),
        ("hello", 1, False),
        ("hello", 1, True),
        ("hello", 2, False),
        ("hello", 2, True),
    ],
)
async def test_an_inviter_that_stops_is_given_up_with_a_sentence(
    service: str, after: int, half: bool, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob", "alice") as (bob, alice):
        alice.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        token, began_s = bob.invite(), trio.current_time()
        with stalling(alice.peer, service, after, half) as stalled:
            with pytest.raises(NetworkError, match=r"did not answer in 10 s; try again"):
                await alice.connections.join(token)
            assert stalled.is_set()
            assert trio.current_time() - began_s <= JOIN_TIMEOUT_S + LATE_S
            session = alice.session(bob)
            await trio.sleep(LATE_S)
            assert unfinished(session) == []
            await trio.sleep(STRANGER_TIMEOUT_S)
            assert session.close_reason == f"no introduction within {STRANGER_TIMEOUT_S:.0f} s"
        await alice.connections.join(token)
        assert alice.knows(bob), "by the same token, once the inviter answers"


async def three(founder: Party, ann: Party, ben: Party) -> None:
    for node in (founder, ann, ben):
        node.run_connections()
    await trio.testing.wait_all_tasks_blocked()
    for node in (ann, ben):
        await node.connections.join(founder.invite())
    await trio.sleep(60)
    assert ann.knows(ben)


async def test_a_member_that_does_not_hear_what_was_revoked_is_told_again_and_holds_up_nobody(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        await three(founder, ann, ben)
        token = founder.invite()
        with stalling(founder.peer, "revocations", 0, False) as stalled:
            ann.endpoint.serve("revocations", never)
            founder.desk.answer({"op": "revoke", "id": token.id.hex()})
            await trio.sleep(LATE_S)
            assert ben.ledger.revocations.of_mesh(founder.mesh)
            assert stalled.is_set(), "ben has heard, and does not say so"
            with recorded_messages() as sent:
                await trio.sleep(10 * (removal.TELL_TIMEOUT_S + removal.CHECK_INTERVAL_S))
            tries = [one for one in sent if (one.service, one.to) == ("revocations", ann.peer)]
            assert 2 * 5 <= len(tries) <= 2 * 11, "founder's and ben's"
            assert unfinished(founder.session(ann)).count("revocations") <= 1


async def test_a_removed_member_that_takes_no_goodbye_is_not_waited_for(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        founder.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        await ann.connections.join(founder.invite())
        session = founder.session(ann)
        ann.endpoint.serve("revocations", never)
        founder.desk.answer({"op": "remove", "peer": "ann"})
        with trio.fail_after(removal.GOODBYE_S + LATE_S):
            await session.closed.wait()
        assert founder.endpoint.sessions() == []


async def test_a_member_that_takes_no_roster_holds_up_nobody(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben", "late") as (founder, ann, ben, late):
        await three(founder, ann, ben)
        ann.endpoint.serve("roster", never)
        await late.connections.join(founder.invite())
        await trio.sleep(NEWS_PAUSE_S + LATE_S)
        assert late.knows(ben)
        stuck = open_at(founder.session(ann), "roster")
        assert stuck
        ann.endpoint.serve("roster", ann.connections.hearsay.serve)
        await trio.sleep(hearsay.TALK_TIMEOUT_S + LATE_S)
        assert not stuck & open_at(founder.session(ann), "roster")


async def test_an_issuer_that_stops_renewing_is_left_for_the_founder(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        for node in (founder, ann, ben):
            node.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        await ann.connections.join(founder.invite())
        await ben.connections.join(ann.invite(mesh=founder.mesh))
        await trio.sleep(60)
        assert ben.knows(founder)
        before = ben.ledger.grant(founder.mesh)
        assert before is not None
        ann.endpoint.serve("renew", never)
        for node in (founder, ann, ben):
            node.wall.ahead_s = GRANT_LIFETIME_S * 0.6
        with recorded_messages() as sent:
            await trio.sleep(renewal.CHECK_INTERVAL_S + HELLO_TIMEOUT_S + LATE_S)
        asked = [one.to for one in sent if one.service == "renew" and "mesh" in one.message]
        assert ann.peer in asked
        renewed = ben.ledger.grant(founder.mesh)
        assert renewed is not None
        assert renewed.expires_at > before.expires_at
        await trio.sleep(2 * renewal.CHECK_INTERVAL_S)
        assert open_at(ben.session(ann), "renew") == set()


async def test_members_that_do_not_look_at_a_new_grant_hold_up_nobody(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben", "cat") as (founder, ann, ben, cat):
        for node in (ann, cat, ben):
            await node.connections.join(founder.invite())
        for deaf in (ann, ben):
            deaf.endpoint.serve("hello", never)
        for node in (founder, cat):
            node.wall.ahead_s = GRANT_LIFETIME_S * 0.6
        assert founder.ledger.renew_own_mesh()
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(founder.connections._reintroduce, founder.mesh)
            await trio.sleep(LATE_S)
            shown = cat.membership.shown_by(founder.peer)[founder.mesh]
            assert shown == founder.ledger.grant(founder.mesh)
        assert trio.current_time() - began_s <= JOIN_TIMEOUT_S + LATE_S


# --- node.sock ------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return pushed_clock()


@pytest.mark.parametrize("words", [b"", b'{"op": ', b'{"op": "much"}\n'])
async def test_an_asker_at_node_sock_that_stops_makes_room(
    words: bytes, tmp_path: Path, clock: Clock
) -> None:
    """Nothing said, half a request, the answer never read."""

    async def much(_request: Message) -> Message:
        return {"much": "x" * (1 << 19)}

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control_socket, tmp_path, {"much": much})
        path = str(socket_path(runtime_folder(tmp_path), control.SOCKET_NAME))
        askers = [await trio.open_unix_socket(path) for _ in range(control.MAX_ASKERS)]
        for asker in askers:
            await asker.send_all(words)
        await let_pass(clock, control.REQUEST_TIMEOUT_S - LATE_S)
        async with await trio.open_unix_socket(path) as one_more:
            assert await one_more.receive_some() == b"", "no room"
        await let_pass(clock, 2 * LATE_S)
        async with await trio.open_unix_socket(path) as one_more:
            await one_more.send_all(b'{"op": "nothing"}\n')
            with trio.fail_after(5):
                assert b"does not know" in await one_more.receive_some()
        for asker in askers:
            await asker.aclose()
        nursery.cancel_scope.cancel()
