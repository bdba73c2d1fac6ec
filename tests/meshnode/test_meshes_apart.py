"""What a grant of one mesh is worth at a node of another: nothing. What a member of two may do at a
node of either: what that one's mesh allows, and at a node of both, what either allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.grants import (
    OPEN_TO_ALL,
    OPEN_TO_MEMBERS,
    SERVICES,
    Role,
    encode_grant,
    issue_root,
)
from discovery.revocations import revoke_peer
from meshnode.errors import AccessError
from meshnode.introduction import revocation_pages
from meshnode.messages import Message, MessageStream
from tests.lab.parties import Party, parties
from tunnels import PeerId, StreamRefused

Clock = trio.testing.MockClock
EVERYTHING = sorted({one + "1" * one.endswith("/") for of in SERVICES.values() for one in of})


async def refused(asker: Party, asked: Party, service: str) -> bool:
    async with await asker.session(asked).open(service) as stream:
        try:
            with trio.move_on_after(1):
                await stream.receive_some()
        except StreamRefused:
            return True
    return False


async def start(*nodes: Party) -> None:
    for node in nodes:
        node.run_connections()
    await trio.testing.wait_all_tasks_blocked()


async def test_a_grant_of_one_mesh_opens_nothing_at_a_node_of_another(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann", "ben", "carl") as (ann, ben, carl):
        await carl.connections.join(ann.invite(Role.PEER))
        await carl.dial(ben)
        with pytest.raises(AccessError, match="knows no mesh that this node belongs to"):
            await carl.connections.introductions.introduce(carl.session(ben), (), (ann.mesh,))
        hello = carl.connections.introductions._hello((), (ann.mesh,))
        async with await carl.session(ben).open("hello") as stream:  # says on what it should not
            messages = MessageStream(stream)
            for message in (hello, *revocation_pages([])):
                await messages.send(message)
            assert (await messages.receive_untrusted())["grants"] == []
            await trio.sleep(1)
        assert not ben.membership.shown_by(carl.peer)
        for service in EVERYTHING:
            assert not ben.lets_in(carl, service), service
            assert await refused(carl, ben, service), service
        assert set(EVERYTHING) > OPEN_TO_MEMBERS
        assert OPEN_TO_ALL.isdisjoint(EVERYTHING)


def forgeries(ann: Party, ben: Party, carl: Party) -> dict[str, bytes]:
    """Places in ben's mesh that ben never gave."""
    grant = carl.ledger.grant(ann.mesh)
    bens = ben.ledger.grant(ben.mesh)
    assert grant is not None
    assert bens is not None
    relabelled = replace(grant, mesh=ben.mesh, issuer=PeerId(ben.mesh), depth=1, parent=None)
    signed = issue_root(
        ann.ledger.sign_as_root,
        mesh=ben.mesh,
        peer=carl.peer,
        role=Role.PEER,
        issued_at=grant.issued_at,
        may_invite=True,
    )
    grafted = replace(grant, mesh=ben.mesh, issuer=ben.peer, depth=2, parent=bens)
    return {
        "another mesh's grant with this one's name": encode_grant(relabelled),
        "signed by another mesh's root": encode_grant(signed),
        "another mesh's grant under ben's own": encode_grant(grafted),
        "ben's own": encode_grant(bens),
    }


async def test_no_grant_of_one_mesh_is_made_into_one_of_another(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann", "ben", "carl") as (ann, ben, carl):
        await carl.connections.join(ann.invite(Role.PEER))
        await carl.dial(ben)
        for kind, data in forgeries(ann, ben, carl).items():
            hello = carl.connections.introductions._hello((), ()) | {"grants": [data]}
            async with await carl.session(ben).open("hello") as stream:
                messages = MessageStream(stream)
                await messages.send(hello)
                answer = await messages.receive_untrusted()
            assert answer["grants"] == [], kind
            assert not ben.membership.shown_by(carl.peer), kind
            assert not ben.lets_in(carl), kind
            await trio.sleep(2)  # asked no more often than a node is heard


async def test_a_member_of_two_meshes_may_do_what_each_allows_where_it_is_shared(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    names = ("ann", "ben", "both", "dora")
    async with parties(tmp_path, *names) as (ann, ben, both, dora):
        await start(ann, ben, both, dora)
        for founder in (ann, ben):
            await both.connections.join(founder.invite(Role.PEER))
        await dora.connections.join(ann.invite(Role.CLIENT))
        await dora.connections.join(ben.invite(Role.ORCHESTRATOR))
        await trio.sleep(60)
        both.session(dora).end("so that they meet knowing of both meshes")
        await trio.sleep(60)
        assert ann.membership.roles(dora.peer) == {Role.CLIENT}
        assert ben.membership.roles(dora.peer) == {Role.ORCHESTRATOR}
        assert both.membership.roles(dora.peer) == {Role.CLIENT, Role.ORCHESTRATOR}
        assert (ann.lets_in(dora), ben.lets_in(dora), both.lets_in(dora)) == (False, True, True)
        ben.desk.answer({"op": "remove", "peer": "dora"})
        await trio.sleep(60)
        assert both.membership.roles(dora.peer) == {Role.CLIENT}
        assert (ann.lets_in(dora), ben.lets_in(dora), both.lets_in(dora)) == (False, False, False)
        assert ann.lets_in(dora, "http"), "the other mesh goes on"


async def test_members_of_one_mesh_are_not_told_of_those_of_another(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann", "ben", "both") as (ann, ben, both):
        await start(ann, ben, both)
        for founder in (ann, ben):
            await both.connections.join(founder.invite())
        await trio.sleep(60)
        assert both.membership.member(ann.peer)
        assert both.membership.member(ben.peer)
        assert ann.membership.member(ben.peer) is None
        assert ben.membership.member(ann.peer) is None


async def test_what_is_said_of_a_mesh_that_is_not_shared_is_not_taken(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """ann may put anyone out of her mesh, and nobody out of ben's, at both's either."""
    async with parties(tmp_path, "ann", "ben", "both") as (ann, ben, both):
        await start(ann, ben, both)
        for founder in (ann, ben):
            await both.connections.join(founder.invite())
        await trio.sleep(60)
        until_s = int(ann.ledger.now())
        forged = revoke_peer(
            ann.ledger.sign_as_root,
            mesh=ben.mesh,
            peer=both.peer,
            issuer=PeerId(ben.mesh),
            at=until_s,
            grant=None,
            spared=(),
        )
        pages: list[Message] = list(revocation_pages([forged]))
        async with await ann.session(both).open("revocations") as stream:
            messages = MessageStream(stream)
            for page in pages:
                await messages.send(page)
            assert (await messages.receive_untrusted())["ok"]
        assert both.ledger.grant(ben.mesh) is not None
        assert ben.lets_in(both)
        assert not both.ledger.revocations.of_mesh(ben.mesh)
