"""The WebRTC link on its own, on loopback: who is there, where, and what is left at the end."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace

import pytest
import trio

from tests.lab.nodes import identity
from tests.lab.webrtc import (
    LOOPBACK,
    pair_of_channels,
    side,
    two_sides,
)
from tunnels.dial import AddressPolicy
from tunnels.errors import HandshakeFailed, LinkClosed, TunnelError
from tunnels.handshake import Role
from tunnels.link import CloseCode
from tunnels.turn import IceServers
from tunnels.webrtc import WebRtcChannel
from tunnels.webrtc_description import (
    Description,
    Place,
    PlaceKind,
    encode,
    parse_description_untrusted,
)

# --- who is there -------------------------------------------------------------------------------


async def test_both_ends_prove_their_keys_over_the_fingerprints_that_each_saw() -> None:
    async with two_sides() as links:
        await links.link()
        assert links.near.binding == links.far.binding
        assert len(links.near.binding) == 64
        assert links.near.remote.startswith(LOOPBACK)
        assert not links.near.is_relayed


async def test_an_announced_fingerprint_that_is_not_the_one_found_ends_it() -> None:
    async with two_sides() as links:
        honest = links.bob.answers(links.alice.identity)

        async def lying(offer: bytes) -> bytes:
            theirs = parse_description_untrusted(await honest(offer))
            return encode(replace(theirs, fingerprint=bytes(32)))

        links.alice.swap = lying
        with pytest.raises(HandshakeFailed, match="in the middle"):
            await links.alice.dial(links.bob)


async def test_a_man_in_the_middle_with_certificates_of_his_own_is_found_out() -> None:
    """He swaps with each side in the other's name, and carries every byte across unchanged."""
    async with trio.open_nursery() as nursery:
        alice, bob = side(nursery, "alice"), side(nursery, "bob")
        left, right = side(nursery, "mallory"), side(nursery, "mallory")
        alice.swap = left.answers(alice.identity)
        right.swap = bob.answers(alice.identity)
        to_alice = await alice.dial(left)
        middle = await left.accepted.receive()
        to_bob = await right.dial(bob)
        at_bob = await bob.accepted.receive()

        async def carry(source: WebRtcChannel, sink: WebRtcChannel) -> None:
            with contextlib.suppress(LinkClosed):
                while data := await source.receive():
                    sink.send(data)

        async def relay() -> None:
            one, other = await middle.accept_channel(), await to_bob.open_channel()
            nursery.start_soon(carry, one, other)
            nursery.start_soon(carry, other, one)

        async def bob_listens() -> None:
            with pytest.raises(LinkClosed):
                await bob.prove(at_bob)

        with trio.fail_after(10):
            async with trio.open_nursery() as proving:
                proving.start_soon(relay)
                proving.start_soon(bob_listens)
                with pytest.raises(HandshakeFailed, match="could not prove its key"):
                    await alice.prove(to_alice, bob)
                to_bob.close(CloseCode.REFUSED, "found out")
        assert not at_bob.trusted
        nursery.cancel_scope.cancel()


async def test_a_link_begins_without_a_session_where_both_hold_a_key() -> None:
    """As with a reply code: addresses cross, and nothing else."""
    async with trio.open_nursery() as nursery:
        alice, bob = side(nursery, "alice"), side(nursery, "bob")
        key = b"k" * 32
        ours = await alice.transport.prepare(bob.identity.peer, Role.DIALLER, key)
        theirs = await bob.transport.prepare(alice.identity.peer, Role.LISTENER, key)
        assert ours.ours.fingerprint is None
        async with trio.open_nursery() as meeting:
            meeting.start_soon(ours.connect, ours.meant_by(theirs.ours.places))
            meeting.start_soon(theirs.connect, theirs.meant_by(ours.ours.places))
        assert ours.link.binding == theirs.link.binding
        async with trio.open_nursery() as proving:
            proving.start_soon(bob.prove, theirs.link)
            await alice.prove(ours.link, bob)
        nursery.cancel_scope.cancel()


async def test_sides_with_different_keys_do_not_meet() -> None:
    async with trio.open_nursery() as nursery:
        alice, bob = side(nursery, "alice"), side(nursery, "bob")
        ours = await alice.transport.prepare(bob.identity.peer, Role.DIALLER, b"k" * 32)
        theirs = await bob.transport.prepare(alice.identity.peer, Role.LISTENER, b"o" * 32)
        with trio.move_on_after(1) as patience:
            async with trio.open_nursery() as meeting:
                meeting.start_soon(ours.connect, ours.meant_by(theirs.ours.places))
                meeting.start_soon(theirs.connect, theirs.meant_by(ours.ours.places))
        assert patience.cancelled_caught
        nursery.cancel_scope.cancel()


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_place_that_the_policy_refuses_gets_not_one_datagram(allowed: bool) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
        victim.bind((LOOPBACK, 0))
        victim.settimeout(1.0)
        place = Place(PlaceKind.RELAYED, LOOPBACK, victim.getsockname()[1], 1)
        async with trio.open_nursery() as nursery:
            alice = side(nursery, "alice", policy=AddressPolicy(allow_loopback=allowed))
            meeting = await alice.transport.prepare(
                side(nursery, "bob").identity.peer, Role.DIALLER
            )
            credentials = meeting.ours.credentials
            theirs = Description(credentials, bytes(32), (place,))

            async def connect() -> None:
                with pytest.raises(LinkClosed):
                    await meeting.connect(theirs)

            nursery.start_soon(connect)
            try:
                heard = await trio.to_thread.run_sync(victim.recv, 1500)
            except TimeoutError:
                heard = b""
            assert bool(heard) is allowed
            meeting.cancel()
            nursery.cancel_scope.cancel()


# --- the end ------------------------------------------------------------------------------------


async def test_a_goodbye_says_why_though_much_is_queued() -> None:
    async with two_sides() as links:
        await links.link()
        near, _far = await pair_of_channels(links)
        near.send(bytes(4 << 20))
        links.near.close(CloseCode.LINK_OVER, "a better one took over")
        await links.far.closed.wait()
        assert links.far.closure is not None
        assert links.far.closure.by_peer
        assert links.far.closure.code is CloseCode.LINK_OVER
        assert links.far.closure.reason == "a better one took over"
        with pytest.raises(LinkClosed, match="a better one"):
            await links.near.open_channel()


async def test_a_swap_that_fails_leaves_no_sockets() -> None:
    async with two_sides() as links:

        async def refuse(_offer: bytes) -> bytes:
            raise TunnelError("not now")

        links.alice.swap = refuse
        with pytest.raises(TunnelError, match="not now"):
            await links.alice.dial(links.bob)
        links.alice.swap = None
        await links.link()


async def test_nothing_is_left_of_a_link_that_is_given_up_while_it_gathers() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((LOOPBACK, 0))
        async with trio.open_nursery() as nursery:
            alice = side(nursery, "alice", IceServers(stun=(silent.getsockname(),)))
            island, bob = alice.transport._island, identity("bob").peer
            for _ in range(3):
                async with trio.open_nursery() as inner:
                    inner.start_soon(alice.transport.prepare, bob, Role.DIALLER)
                    with trio.fail_after(20):
                        await trio.to_thread.run_sync(silent.recv, 2000)
                    inner.cancel_scope.cancel()
            assert not island.at_end
            assert not island.is_over
            nursery.cancel_scope.cancel()
