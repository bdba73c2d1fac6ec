"""The WebRTC link on its own, on loopback: each byte, and what goes over the wire for it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from aiortc.rtcsctptransport import Chunk, DataChunk, SackChunk, parse_packet

from tests.lab.webrtc import (
    NOISE,
    on_island,
    pair_of_channels,
    read_all,
    two_sides,
)
from tunnels import webrtc_stack
from tunnels.errors import LinkClosed
from tunnels.webrtc import UNSENT_BYTES, WebRtcChannel


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


async def test_an_acknowledgement_stands_for_several_packets() -> None:
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
        assert 1 <= sum(SackChunk in one for one in packets) <= 6
        assert sum(DataChunk in one for one in packets) == 9


async def test_data_takes_an_acknowledgement_along() -> None:
    async with two_sides() as links:
        await links.link()
        sctp = links.far.stack._sctp
        assert sctp is not None
        sent: list[bytes] = []

        async def record(data: bytes) -> None:
            sent.append(data)

        async def answer() -> None:
            sctp.transport._send_data = record  # type: ignore[method-assign]
            sctp._unsacked = 1
            await sctp._send_chunk(DataChunk())
            await sctp._send_chunk(DataChunk())

        await on_island(links.far, answer)
        kinds = [[type(one) for one in parse_packet(data)[3]] for data in sent]
        assert kinds == [[SackChunk, DataChunk], [DataChunk]]


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
