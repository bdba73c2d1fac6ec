"""Strangers become members by token, and stay members by grant: over real tunnels on loopback."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from discovery.grants import Role
from discovery.token import Secret, Token
from meshnode.connections import Connections
from meshnode.errors import AccessError, DiskFull, HomeError, MeshError, NetworkError
from meshnode.events import Event
from meshnode.membership import Membership
from meshnode.state import Home
from tunnels import Endpoint, Identity, Stream, StreamRefused

LOOPBACK = "127.0.0.1"


@dataclass
class Party:
    """A node reduced to membership: who it is, whom it knows, what it answers."""

    home: Home
    endpoint: Endpoint
    membership: Membership
    connections: Connections
    events: list[Event]

    def invite(self, *, uses: int = 8, lifetime_s: int = 3600, role: Role = Role.PEER) -> Token:
        return self.connections.joining.invite(
            self.endpoint.candidates(), role=role, lifetime_s=lifetime_s, uses=uses
        )


@asynccontextmanager
async def party(folder: Path, name: str, port: int = 0) -> AsyncIterator[Party]:
    with Home(folder / name) as home:
        identity = Identity.load_or_create(home.folder / "node.key")
        membership = Membership(home, identity, name)
        endpoint = Endpoint(identity, authorize=membership.authorize)
        events: list[Event] = []

        async def echo(stream: Stream) -> None:
            async for chunk in stream:
                await stream.send_all(chunk)
            await stream.send_eof()

        endpoint.serve("control", echo)
        connections = Connections(endpoint, membership, events.append)
        connections.offer_services()
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, LOOPBACK, port)
            yield Party(home, endpoint, membership, connections, events)
            nursery.cancel_scope.cancel()


async def ask_echo(asker: Party, answerer: Party) -> bytes:
    session = asker.endpoint.session(answerer.endpoint.peer)
    assert session is not None
    async with await session.open("control") as stream:
        await stream.send_all(b"anyone there?")
        await stream.send_eof()
        return b"".join([chunk async for chunk in stream])


async def test_a_stranger_is_refused_until_it_has_joined(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "joiner") as joiner:
        token = inviter.invite()
        await joiner.endpoint.connect(token.inviter, token.candidates)
        with pytest.raises(StreamRefused):
            await ask_echo(joiner, inviter)
        await joiner.connections.join(token)
        assert await ask_echo(joiner, inviter) == b"anyone there?"
        assert await ask_echo(inviter, joiner) == b"anyone there?", "peers may ask both ways"
        assert joiner.membership.member_name(inviter.endpoint.peer) == "inviter"
        assert inviter.membership.member_name(joiner.endpoint.peer) == "joiner"


async def test_after_a_restart_of_both_no_token_is_needed(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "joiner") as joiner:
        await joiner.connections.join(inviter.invite())
        port = inviter.endpoint.candidates()[0].port
    async with (
        party(tmp_path, "inviter", port) as inviter,
        party(tmp_path, "joiner") as joiner,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(joiner.connections.run, ())
        with trio.fail_after(10):
            await joiner.connections.settled.wait()
        assert await ask_echo(joiner, inviter) == b"anyone there?"
        nursery.cancel_scope.cancel()


async def test_a_used_up_invite_refuses_the_next_and_says_so(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter:
        token = inviter.invite(uses=1)
        async with party(tmp_path, "first") as first:
            await first.connections.join(token)
        async with party(tmp_path, "first") as first:
            await first.connections.join(token)  # a member already: nothing is burned
        async with party(tmp_path, "second") as second:
            with pytest.raises(AccessError, match="used up"):
                await second.connections.join(token)


async def test_uses_stay_burned_when_the_inviter_restarts(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "first") as first:
        token = inviter.invite(uses=1)
        await first.connections.join(token)
        port = token.candidates[0].port
    async with party(tmp_path, "inviter", port), party(tmp_path, "second") as second:
        with pytest.raises(AccessError, match="used up"):
            await second.connections.join(token)


async def test_an_expired_invite_is_refused_by_both_sides(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "joiner") as joiner:
        token = inviter.invite(lifetime_s=-1)
        with pytest.raises(AccessError, match="expired"):
            await joiner.connections.join(token)
        forged = replace(token, expires_at=int(time.time()) + 3600)
        with pytest.raises(AccessError, match="expired"):
            await joiner.connections.join(forged)


async def test_a_guessed_secret_is_refused(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "joiner") as joiner:
        forged = replace(inviter.invite(), secret=Secret(bytes(16)))
        with pytest.raises(AccessError, match="secret is wrong"):
            await joiner.connections.join(forged)


async def test_an_invite_that_no_token_can_carry_is_not_in_the_book(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter:
        with pytest.raises(ValueError, match="out of range"):
            inviter.invite(lifetime_s=2**40)
        assert not (inviter.home.folder / "invites.json").exists()


async def test_our_own_invite_is_refused_with_the_remedy(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter:
        with pytest.raises(AccessError, match="another machine"):
            await inviter.connections.join(inviter.invite())


async def test_another_key_at_the_address_is_named(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "impostor") as impostor:
        token = replace(inviter.invite(), candidates=tuple(impostor.endpoint.candidates()))
        async with party(tmp_path, "joiner") as joiner:
            with pytest.raises(NetworkError, match="wrong key"):
                await joiner.connections.join(token)


async def test_nobody_at_the_address_gives_up_in_time_and_says_what_was_tried(
    tmp_path: Path,
) -> None:
    async with party(tmp_path, "inviter") as inviter:
        token = inviter.invite()
    async with party(tmp_path, "joiner") as joiner:
        with trio.fail_after(10):
            with pytest.raises(NetworkError, match=str(token.candidates[0].port)):
                await joiner.connections.join(token)


async def test_a_worker_role_cannot_open_control(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "joiner") as joiner:
        await joiner.connections.join(inviter.invite(role=Role.WORKER))
        with pytest.raises(StreamRefused):
            await ask_echo(joiner, inviter)
        assert await ask_echo(inviter, joiner) == b"anyone there?"


async def test_two_meshes_are_kept_apart(tmp_path: Path) -> None:
    async with (
        party(tmp_path, "one") as one,
        party(tmp_path, "two") as two,
        party(tmp_path, "both") as both,
    ):
        await both.connections.join(one.invite())
        await both.connections.join(two.invite())
        session = await one.endpoint.connect(two.endpoint.peer, two.endpoint.candidates())
        with pytest.raises(AccessError, match="no mesh"):
            await one.connections.introductions.introduce(session, one.endpoint.candidates())
        with pytest.raises(StreamRefused):
            await ask_echo(one, two)


async def test_the_secret_is_on_no_disk(tmp_path: Path) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "joiner") as joiner:
        token = inviter.invite()
        await joiner.connections.join(token)
        secret = token.secret.reveal()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert secret not in data
            assert secret.hex().encode() not in data


async def test_a_damaged_membership_file_is_named_and_kept(tmp_path: Path) -> None:
    async with party(tmp_path, "node"):
        pass
    path = tmp_path / "node" / "membership.json"
    path.write_text('{"format": 2, "grants": ["00"], "roster": {}}')
    with Home(tmp_path / "node") as home, pytest.raises(HomeError, match=r"membership\.json"):
        Membership(home, Identity.load_or_create(home.folder / "node.key"), "node")
    assert path.read_text().startswith('{"format": 2, "grants": ["00"]')


async def test_a_use_is_burned_on_disk_even_when_the_first_try_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with party(tmp_path, "inviter") as inviter, party(tmp_path, "first") as first:
        token = inviter.invite(uses=1)
        with monkeypatch.context() as full_disk:
            full_disk.setattr(inviter.home, "save_json", refuse_to_write)
            with pytest.raises(MeshError):
                await first.connections.join(token)
        await first.connections.join(token)
        port = token.candidates[0].port
    async with party(tmp_path, "inviter", port), party(tmp_path, "second") as second:
        with pytest.raises(AccessError, match="used up"):
            await second.connections.join(token)


def refuse_to_write(_name: str, _document: object) -> None:
    raise DiskFull("no space left")
