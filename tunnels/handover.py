"""Streams that are handed over from one channel to the next.

When a channel dies, the side that opened the stream moves it to another link that stands, or comes
to stand (RESUME), and both ends replay (resume.py). A better link gets the streams of a worse one
likewise, but there the old channel is given up only once there is a new one.
"""

from __future__ import annotations

import trio

from tunnels.errors import BadFrame, LinkClosed, SessionClosed
from tunnels.frames import Ack, RecordDecoder, Reset, ResetCode, Resume, encode
from tunnels.link import Channel
from tunnels.links import Links
from tunnels.opening import first_records
from tunnels.stream import Stream
from tunnels.streams import Streams

RESUME_WITHIN_S = 5.0  # for our stream to go on over another link; then over yet another
# In all, while the peer is heard all the time: it may have to find out first that the link is gone.
RESUMED_WITHIN_S = 30.0


class Handover:
    """I carry each stream of a session over channel after channel."""

    def __init__(self, links: Links, streams: Streams) -> None:
        self._links = links
        self._streams = streams
        self._moving: set[Stream] = set()

    async def carry(self, stream: Stream, channel: Channel, decoder: RecordDecoder) -> None:
        """Run a stream over `channel` and, when that dies, over the next one."""
        while True:
            try:
                await stream.read_channel(channel, decoder)
            except LinkClosed:
                pass
            except BadFrame as error:
                self._links.break_off(error)
            if stream.finished or stream.channel is not channel:
                if (unused := stream.take_next_channel()) is not None:
                    unused.reset()
                return  # done, or another task carries it
            stream.detach()
            if not stream.opened_here:
                await self._await_resume(stream)
                return
            moved = await self._move(stream)
            channel.reset()  # of use to nobody now, even where it still stands
            if moved is None:
                return
            channel, decoder = moved

    async def follow_best(self, stream: Stream) -> None:
        """Take a stream that we opened to a better link than its own. What it has now is given up
        only once there is a channel."""
        before, best = stream.channel, self._links.best
        if before is None or best is None or before.link is best or stream in self._moving:
            return
        if stream.lingering and not self._links.is_silent(before.link):
            return
        self._moving.add(stream)
        try:
            channel = await best.open_channel()
        except LinkClosed:
            return
        finally:
            self._moving.discard(stream)
        if stream.channel is before and not stream.finished and best is self._links.best:
            stream.reroute(channel)
        else:
            channel.reset()

    async def _await_resume(self, stream: Stream) -> None:
        """For the other side to take its stream to another channel."""
        while not self._links.closed.is_set():
            await self._links.wait_heard()
            with trio.move_on_after(RESUMED_WITHIN_S):
                await stream.reattached.wait()
                return
            if self._links.heard_for_s >= RESUMED_WITHIN_S:
                break
        self._streams.give_up(stream)

    async def _move(self, stream: Stream) -> tuple[Channel, RecordDecoder] | None:
        """Take a stream that we opened to another channel. None when it is lost."""
        began_s = trio.current_time()
        while not self._links.closed.is_set():
            await self._links.wait_heard()
            channel = stream.take_next_channel()
            with trio.move_on_after(RESUME_WITHIN_S) as patience:
                try:
                    channel = channel or await self._links.open_channel()
                    decoder = await self._resume(stream, channel)
                except BadFrame as error:
                    self._links.break_off(error)
                except (LinkClosed, SessionClosed):
                    await trio.lowlevel.checkpoint()
                else:
                    if decoder is not None:
                        return channel, decoder
                    break
            if channel is not None:
                channel.reset()
            tried_s = min(trio.current_time() - began_s, self._links.heard_for_s)
            if patience.cancelled_caught and tried_s >= RESUMED_WITHIN_S:
                break
        self._streams.give_up(stream)
        return None

    async def _resume(self, stream: Stream, channel: Channel) -> RecordDecoder | None:
        """Go on over `channel`; None when the other side does not know the stream.

        Raises LinkClosed, BadFrame.
        """
        position = stream.position
        # Its OPEN may have died on the way: where nothing was heard, this is another.
        service = "" if stream.was_heard else stream.service
        channel.send(encode(Resume(stream.number, position.received, position.limit, service)))
        records, decoder = await first_records(channel)
        match records[0]:
            case Ack() as answer:
                stream.attach(channel, answer)
                stream.take_records(records[1:])
            case Reset(ResetCode.LOST):
                channel.finish()
                return None
            case Reset() as refusal if service:
                stream.attach(channel)
                stream.take_records([refusal])
            case other:
                raise BadFrame(f"a {type(other).__name__} record answers RESUME")
        return decoder
