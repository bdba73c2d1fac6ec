"""Channels that the peer opens: for a new stream, or for one of its streams to go on over."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from tunnels.allowance import OPENING_S, Bucket, Rate
from tunnels.errors import BadFrame, LinkClosed, TunnelError
from tunnels.frames import Ack, Open, Reset, ResetCode, Resume
from tunnels.handover import Handover
from tunnels.link import Channel, Link
from tunnels.links import Links
from tunnels.opening import hear_header, refuse
from tunnels.session_tasks import SessionTasks
from tunnels.stream import Handler, Stream
from tunnels.streams import Streams

CHANNELS = Rate(per_s=50, burst=256)  # that the peer opens; beyond, they wait

log = logging.getLogger(__name__)


class Acceptor:
    """I take them on every link of one session, and hand new streams to their handlers.

    answer: the handler of a service for this peer, or the sentence why there is none.
    """

    def __init__(
        self,
        links: Links,
        streams: Streams,
        handover: Handover,
        tasks: SessionTasks,
        answer: Callable[[str], Handler | str],
    ) -> None:
        self._links = links
        self._streams = streams
        self._handover = handover
        self._tasks = tasks
        self._answer = answer
        self._channels = Bucket(CHANNELS, trio.current_time())

    async def accept_from(self, link: Link) -> None:
        """Until the link is closed."""
        while True:
            try:
                channel = await link.accept_channel()
            except LinkClosed:
                return
            self._tasks.spawn(self._greet, channel)
            link.share.charge(OPENING_S, trio.current_time())
            self._channels.spend(trio.current_time(), 1)
            await trio.sleep(self._channels.wait_s(trio.current_time()))

    async def _greet(self, channel: Channel) -> None:
        try:
            heard = await hear_header(channel)
            if heard is None:
                return
            header, records, decoder = heard
            if isinstance(header, Open):
                stream = await self._accept_stream(header, channel)
            else:
                stream = await self._resume_stream(header, channel)
            if stream is None:
                return
            stream.take_records(records)
        except BadFrame as error:
            self._links.break_off(error)
            return
        await self._handover.carry(stream, channel, decoder)

    async def _accept_stream(self, header: Open, channel: Channel) -> Stream | None:
        if self._streams.opened_late(header.stream):
            channel.reset()  # the stream goes on over another link, which was faster
            return None
        if not self._streams.is_new(header.stream):
            raise BadFrame(f"stream {header.stream} was opened twice")
        answer: Handler | str = "too many streams are open; close some first"
        if not self._streams.are_full:
            answer = self._answer(header.service)
        if isinstance(answer, str):
            await refuse(channel, Reset(ResetCode.REFUSED, answer))
            return None
        stream = self._streams.accept(header.service, header.stream, header.limit)
        stream.attach(channel)
        self._tasks.spawn(_handle, answer, stream)
        return stream

    async def _resume_stream(self, header: Resume, channel: Channel) -> Stream | None:
        stream = self._streams.of_peer(header.stream)
        if header.service and self._streams.is_new(header.stream):
            opened = Open(header.stream, header.limit, header.service)
            stream = await self._accept_stream(opened, channel)
            if stream is None:
                return None
            self._streams.resumed_unopened(header.stream)
        if stream is None:
            await refuse(channel, Reset(ResetCode.LOST, "this stream is over"))
            return None
        if (old := stream.channel) is not None and old is not channel:
            old.reset()
            stream.detach()
        stream.attach(channel, Ack(header.received, header.limit))
        return stream


async def _handle(handler: Handler, stream: Stream) -> None:
    """Run a service's handler. Its failure is the stream's, never the node's."""
    try:
        await handler(stream)
    except TunnelError as error:
        log.info("the handler of %r ended early: %s", stream.service, error)
        stream.reset("the service broke off")
    except Exception:
        log.exception("the handler of %r failed", stream.service)
        stream.reset("the service failed; its node's log says why")
    else:
        await stream.aclose()
