"""The WebRTC link on its own, on loopback: peers that break the rules."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
from aiortc.rtcdatachannel import RTCDataChannel, RTCDataChannelParameters
from google_crc32c import value as crc32c

from tests.lab.webrtc import (
    Linked,
    on_island,
    pair_of_channels,
    two_sides,
)
from tunnels.errors import LinkClosed
from tunnels.handshake import Role
from tunnels.link import CloseCode
from tunnels.webrtc import UNPROVEN_BYTES
from tunnels.webrtc_description import (
    encode,
)


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
