"""The first words on a channel: hearing them, and turning them down."""

from __future__ import annotations

import trio

from tunnels.errors import BadFrame, LinkClosed
from tunnels.frames import Open, Record, RecordDecoder, Reset, Resume, encode
from tunnels.link import Channel

HEADER_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 10.0


async def first_records(channel: Channel) -> tuple[list[Record], RecordDecoder]:
    """The first records of a channel, at least one. Raises LinkClosed, BadFrame."""
    decoder = RecordDecoder()
    while True:
        data = await channel.receive()
        if not data:
            raise LinkClosed("the channel ended before its first record")
        if records := decoder.feed_untrusted(data):
            return records, decoder


async def hear_header(
    channel: Channel,
) -> tuple[Open | Resume, list[Record], RecordDecoder] | None:
    """What the peer opened this channel for, and the records that came with it.

    None when the channel is over: it ended, or was reset since it stayed silent. Raises BadFrame.
    """
    with trio.move_on_after(HEADER_TIMEOUT_S):
        try:
            records, decoder = await first_records(channel)
        except LinkClosed:
            return None
        header = records[0]
        if not isinstance(header, Open | Resume):
            raise BadFrame(f"a {type(header).__name__} record opens a channel")
        return header, records[1:], decoder
    channel.reset()
    return None


async def refuse(channel: Channel, answer: Reset) -> None:
    """Send the answer, then drop what the opener sent meanwhile until it ends the channel."""
    channel.send(encode(answer))
    channel.finish()
    await drain(channel)


async def drain(channel: Channel) -> None:
    """Drop what comes until the other side ends the channel, which it has DRAIN_TIMEOUT_S for."""
    with trio.move_on_after(DRAIN_TIMEOUT_S):
        try:
            while await channel.receive():
                pass
        except LinkClosed:
            pass
        return
    channel.reset()
