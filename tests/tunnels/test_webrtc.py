"""The WebRTC link on its own, on loopback: who is there, what is kept, what is refused."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio
from aiortc.rtcdatachannel import RTCDataChannel, RTCDataChannelParameters
from aiortc.rtcsctptransport import Chunk, DataChunk, SackChunk, parse_packet
from google_crc32c import value as crc32c

from tests.lab.nodes import identity
from tests.lab.webrtc import LOOPBACK, Linked, on_island, side, two_sides
from tunnels import webrtc_stack
from tunnels.dial import AddressPolicy
from tunnels.errors import HandshakeFailed, LinkClosed, TunnelError
from tunnels.handshake import Role
from tunnels.link import Channel, CloseCode
from tunnels.turn import IceServers
from tunnels.webrtc import UNPROVEN_BYTES, UNSENT_BYTES, WebRtcChannel
from tunnels.webrtc_description import (
    Description,
    Place,
    PlaceKind,
    encode,
    parse_description_untrusted,
)

NOISE = bytes(range(256)) * 64  # 16 KiB


async def pair_of_channels(links: Linked) -> tuple[WebRtcChannel, WebRtcChannel]:
    near = await links.near.open_channel()
    near.send(b"!")
    far = await links.far.accept_channel()
    assert await far.receive() == b"!"
    return near, far


async def read_all(channel: Channel) -> bytes:
    data = bytearray()
    while piece := await channel.receive():
        data += piece
    return bytes(data)


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


# --- bytes --------------------------------------------------------------------------------------


async def test_bulk_is_byte_exact_both_ways_at_once() -> None:
    data = NOISE * 200  # 3.2 MB
    async with two_sides() as links:
        await links.link()
        near, far = await pair_of_channels(links)

        async def write(channel: WebRtcChannel) -> None:
            for start in range(0, len(data), 100_000):
                channel.send(data[start : start + 100_000])
                await channel.wait_writable()
                channel.share.earn(1 << 30)
            channel.finish()

        found: list[bytes] = []

        async def read(channel: WebRtcChannel) -> None:
            found.append(await read_all(channel))

        async with trio.open_nursery() as nursery:
            for channel in (near, far):
                nursery.start_soon(write, channel)
                nursery.start_soon(read, channel)
        assert found == [data, data]


async def test_a_writer_is_held_back_and_a_reader_that_stalls_makes_nobody_keep_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webrtc_stack, "HELD_BYTES", 256 << 10)
    async with two_sides() as links:
        await links.link()
        near, far = await pair_of_channels(links)
        held_back = False
        written = 0
        while not held_back:
            near.send(NOISE)
            written += len(NOISE)
            with trio.move_on_after(1.5) as patience:
                await near.wait_writable()
            held_back = patience.cancelled_caught
        held = links.far.stack._heard_bytes - links.far.taken_bytes
        assert 256 << 10 <= held <= (256 << 10) + webrtc_stack.MESSAGE_BYTES
        assert near._written - near._pipe.sent <= UNSENT_BYTES + len(NOISE)
        near.finish()
        assert await read_all(far) == NOISE * (written // len(NOISE))


async def test_what_the_network_loses_arrives_all_the_same() -> None:
    data = NOISE * 12
    async with two_sides(within_s=60) as links:
        await links.link()
        near, far = await pair_of_channels(links)
        lost = 0

        def loses(dice: random.Random) -> Callable[[], bool]:
            def is_lost() -> bool:
                nonlocal lost
                lost += (drops := dice.random() < 0.05)
                return drops

            return is_lost

        links.near.stack.ice.is_deaf = loses(random.Random(1))
        links.far.stack.ice.is_deaf = loses(random.Random(2))
        near.send(data)
        near.finish()
        assert await read_all(far) == data
        assert lost


async def test_an_acknowledgement_fits_into_a_datagram_whatever_came_early() -> None:
    async with two_sides() as links:
        await links.link()
        sctp = links.far.stack._sctp
        assert sctp is not None
        assert sctp._last_received_tsn is not None
        base, sent = sctp._last_received_tsn, []

        async def record(data: bytes) -> None:
            sent.append(data)

        async def acknowledge() -> None:
            sctp.transport._send_data = record  # type: ignore[method-assign]
            sctp._sack_misordered = {(base + 2 * n) % 2**32 for n in range(1, 2000)}
            await sctp._send_sack()
            assert len(sctp._sack_misordered) == 1999

        await on_island(links.far, acknowledge)
        assert len(sent) == 1
        assert len(sent[0]) < 1100
        [sack] = parse_packet(sent[0])[3]
        assert isinstance(sack, SackChunk)
        assert sack.gaps[:2] == [(2, 2), (4, 4)]


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


async def test_an_answer_takes_the_acknowledgement_along() -> None:
    """Of ten kilobytes and their echo, where bare aiortc sends nine that say nothing else."""
    async with two_sides() as links:
        await links.link()
        near, far = await pair_of_channels(links)
        packets: list[list[type[Chunk]]] = []
        sctp = links.far.stack._sctp
        assert sctp is not None
        send = sctp.transport._send_data

        async def record(data: bytes) -> None:
            packets.append([type(one) for one in parse_packet(data)[3]])
            await send(data)

        sctp.transport._send_data = record  # type: ignore[method-assign]
        message = NOISE[:10_000]
        near.send(message)
        got = b""
        while len(got) < len(message):
            got += await far.receive()
        far.send(got)
        back = b""
        while len(back) < len(message):
            back += await near.receive()
        assert back == message
        alone = packets.count([SackChunk])
        along = packets.count([SackChunk, DataChunk])
        assert 1 <= alone + along <= 6
        assert sum(DataChunk in one for one in packets) == 9


async def test_the_last_packet_is_acknowledged_though_nothing_follows() -> None:
    async with two_sides() as links:
        await links.link()
        near, far = await pair_of_channels(links)
        near.send(b"the last")
        assert await far.receive() == b"the last"
        sctp = links.near.stack._sctp
        assert sctp is not None
        with trio.fail_after(20):
            await on_island(links.near, links.near.stack._idle.wait)
        assert sctp.has_sent_all


async def test_one_side_ends_and_the_other_still_answers() -> None:
    async with two_sides() as links:
        await links.link()
        near, far = await pair_of_channels(links)
        near.send(b"question")
        near.finish()
        near.send(b"too late")
        assert await read_all(far) == b"question"
        far.send(b"answer")
        far.finish()
        assert await read_all(near) == b"answer"


async def test_a_reset_drops_both_directions() -> None:
    async with two_sides() as links:
        await links.link()
        near, far = await pair_of_channels(links)
        near.reset()
        with pytest.raises(LinkClosed, match="reset"):
            await far.receive()
        with pytest.raises(LinkClosed, match="reset"):
            await near.receive()
        again, other = await pair_of_channels(links)
        other.send(b"the link stands")
        assert await again.receive() == b"the link stands"


async def test_what_is_over_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webrtc_stack, "NUMBERS", 20)
    async with two_sides() as links:
        await links.link()
        for _ in range(40):
            near, far = await pair_of_channels(links)
            near.finish()
            far.finish()
            assert await far.receive() == await near.receive() == b""
        for link in (links.near, links.far):
            assert len(link._channels) <= 10
            assert len(link.stack._theirs) <= 10


# --- peers that break the rules -----------------------------------------------------------------


async def test_a_stranger_may_not_say_much() -> None:
    async with two_sides() as links:
        near = await links.alice.dial(links.bob)
        far = await links.bob.accepted.receive()
        channel = await near.open_channel()
        channel.send(bytes(2 * UNPROVEN_BYTES))
        await far.closed.wait()
        assert far.closure is not None
        assert far.closure.code is CloseCode.PROTOCOL_ERROR
        await near.closed.wait()
        assert near.closure is not None
        assert near.closure.reason == "too much data before the handshake"


async def wire(links: Linked, *chunks: bytes) -> None:
    """Chunks as a hostile stack would send them, under the association that stands."""
    sctp = links.near.stack._sctp
    assert sctp is not None

    async def send() -> None:
        for chunk in chunks:
            head = struct.pack("!HHL", 5000, 5000, sctp._remote_verification_tag)
            body = head + bytes(4) + chunk
            crc = crc32c(body)
            await sctp.transport._send_data(head + struct.pack("<L", crc) + chunk)

    await on_island(links.near, send)


def chunk(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("!BBH", kind, flags, 4 + len(body)) + body


HOSTILE = {
    "a parameter without end": chunk(4, bytes(8)),
    "a sack that counts to twenty million": chunk(
        3, struct.pack("!LLHH", 0, 0, 250, 0) + struct.pack("!HH", 1, 65535) * 250
    ),
    "an answer to nothing that was asked": chunk(
        0, struct.pack("!LHHL", 0, 8, 0, 50) + b"\2", flags=3
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_stack_loses_its_link_at_once(name: str) -> None:
    async with two_sides(within_s=10) as links:
        await links.link()
        sctp = links.near.stack._sctp
        assert sctp is not None
        said = HOSTILE[name]
        if said[0] == 0:  # DATA, as the next in order
            said = said[:4] + struct.pack("!L", sctp._local_tsn) + said[8:]
        await wire(links, said)
        await links.far.closed.wait()
        assert links.far.closure is not None
        assert links.far.closure.code is CloseCode.PROTOCOL_ERROR
        assert not links.far.closure.by_peer


async def test_chunks_far_ahead_are_not_kept() -> None:
    async with two_sides() as links:
        await links.link()
        _, far = await pair_of_channels(links)
        sctp = links.near.stack._sctp
        there = links.far.stack._sctp
        assert sctp is not None
        assert there is not None
        ahead = [
            chunk(0, struct.pack("!LHHL", (sctp._local_tsn + 9000 + n) % 2**32, 0, 9, 53) + b"x", 3)
            for n in range(100)
        ]
        await wire(links, *ahead)
        near, far = await pair_of_channels(links)
        near.send(b"what is in order still arrives")
        assert await far.receive()
        assert not there._sack_misordered


async def many_channels(links: Linked) -> None:
    for _ in range(300):
        await links.near.open_channel()


async def words_that_are_none(links: Linked) -> None:
    stack = links.near.stack

    async def say() -> None:
        assert stack._words is not None
        stack.send(stack._words, b"\xffwhat")

    await on_island(links.near, say)


async def text_on_a_channel(links: Linked) -> None:
    near, _ = await pair_of_channels(links)
    sctp, channel = links.near.stack._sctp, near._pipe._channel
    assert sctp is not None
    assert channel is not None

    async def say() -> None:
        sctp._data_channel_send(channel, "text")

    await on_island(links.near, say)


async def an_unreliable_channel(links: Linked) -> None:
    async def open_one() -> None:
        sctp = links.near.stack._sctp
        assert sctp is not None
        RTCDataChannel(sctp, RTCDataChannelParameters(maxRetransmits=1))

    await on_island(links.near, open_one)


@pytest.mark.parametrize(
    "behave",
    [many_channels, words_that_are_none, text_on_a_channel, an_unreliable_channel],
)
async def test_rules_above_sctp_are_kept_too(behave: Callable[[Linked], Awaitable[None]]) -> None:
    async with two_sides(within_s=10) as links:
        await links.link()
        await behave(links)
        await links.far.closed.wait()
        assert links.far.closure is not None
        assert links.far.closure.code is CloseCode.PROTOCOL_ERROR


async def test_a_link_in_debt_is_not_heard() -> None:
    async with two_sides() as links:
        await links.link()
        links.far.share.charge(5.0, trio.current_time())
        links.far.on_spent(0.0, heard=False)
        assert links.far.stack._is_deaf()
        before = links.far.bytes_in
        near = await links.near.open_channel()
        near.send(b"hello?")
        links.far.stack.deaf_until_s = float("inf")
        with trio.move_on_after(0.3):
            await links.far.accept_channel()
        assert links.far.bytes_in == before


async def test_a_peer_asks_for_a_few_links_at_a_time() -> None:
    async with two_sides() as links:
        swap = links.bob.answers(links.alice.identity)
        meeting = await links.alice.transport.prepare(links.bob.identity.peer, Role.DIALLER)
        await swap(encode(meeting.ours))
        with pytest.raises(LinkClosed, match="busy"):
            await swap(encode(meeting.ours))
        meeting.cancel()


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
