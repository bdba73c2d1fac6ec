"""The worker's side of the ring: what its rpc-server has computed goes straight to the next one's.

Who pushes into a lease, and into which lease of whom is pushed, the lease's owner says, each once,
on the stream that the lease is. It names peers, never an address: they are reached by what this
node knows of them. On a `push/` stream the side that takes says YES, and nothing more, once its
rpc-server is there; what that server's neighbour pushes goes the other way.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import trio

from meshnode.engine.rpc_server import PushSockets
from meshnode.errors import BadMessage, MeshError
from meshnode.messages import MessageStream
from meshnode.nurseries import accompanied_by
from meshnode.pipeline.protocol import (
    PUSH_SERVICE,
    End,
    PushFrom,
    PushNews,
    PushTo,
    parse_push_order_untrusted,
)
from meshnode.pipeline.silence import long_silence
from tunnels import PeerId, Session, Stream, TunnelError
from tunnels.allowance import Rate
from tunnels.forward import splice
from tunnels.gate import ServiceLimits

SETUP_S = 5.0
"""To reach the next worker, and to hear its YES. Meanwhile the model is being loaded."""
ANSWER_S = 30.0  # for the owner to take what it is told
YES = b"\x01"
OUT_OF_REACH = "it cannot be reached from there"
OVER = "the stream between them has ended"

# A lease takes one stream, and a worker has few leases of whoever pushes.
PUSHING = ServiceLimits(
    peer_streams=16, streams=64, peer_rate=Rate(1, burst=32), rate=Rate(50, burst=256)
)

Reach = Callable[[PeerId, PeerId], Awaitable[Session]]
"""The session with the first peer, for a lease of the second. Raises `MeshError`."""

log = logging.getLogger(__name__)


async def reach_nobody(_peer: PeerId, _owner: PeerId) -> Session:
    raise MeshError("this node knows nobody")


@dataclass
class LeaseEnds:
    """Where one lease is pushed into, and where from: what its owner has said so far.

    sockets: of its rpc-server, once that listens there; None also where it knows no ring.
    """

    owner: PeerId
    sockets: PushSockets | None = None
    predecessor: PeerId | None = None
    successor: PushTo | None = None
    taking: trio.CancelScope | None = None  # while a stream pushes into it

    def obey(self, order: PushFrom | PushTo) -> None:
        """Raises `BadMessage` for what was said before, or to a lease that is no part of a ring."""
        if self.sockets is None:
            raise BadMessage("the peer talks on where the rest of the stream is the lease")
        said_before = self.predecessor if isinstance(order, PushFrom) else self.successor
        if said_before is not None:
            raise BadMessage("the peer names the neighbours of a lease twice")
        if isinstance(order, PushFrom):
            self.predecessor = order.peer
        else:
            self.successor = order

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While one stream pushes into the lease; cancelled when the lease ends."""
        with trio.CancelScope() as self.taking:
            try:
                yield
            finally:
                self.taking = None


class Pushing:
    """I have the rpc-servers of this node's leases push, and be pushed to."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._ends: dict[str, LeaseEnds] = {}

    def begin(self, lease_id: str, ends: LeaseEnds, sockets: PushSockets | None) -> None:
        """The lease's rpc-server runs."""
        ends.sockets = sockets
        self._ends[lease_id] = ends

    def end(self, lease_id: str) -> None:
        """The lease is over, or did not come to be."""
        ends = self._ends.pop(lease_id, None)
        if ends is not None:
            ends.sockets = None
            if ends.taking is not None:
                ends.taking.cancel()

    def may_push(self, peer: PeerId, lease_id: str) -> bool:
        """Whether the lease's owner has named this peer as the one that pushes into it."""
        ends = self._ends.get(lease_id)
        return ends is not None and ends.predecessor == peer

    async def serve(self, stream: Stream) -> None:
        """One stream of `push/<lease>`."""
        ends = self._ends.get(stream.service.removeprefix(PUSH_SERVICE))
        if ends is None or ends.sockets is None or ends.predecessor != stream.peer:
            stream.reset("no such lease: it has ended, or another node pushes into it")
        elif ends.taking is not None:
            stream.reset("another stream pushes into this lease already")
        else:
            with ends.taken():
                await _take(stream, ends.sockets)

    async def hear_owner(
        self, messages: MessageStream, ends: LeaseEnds, nursery: trio.Nursery
    ) -> None:
        """Cancels the lease's nursery when the owner closes the stream. A lost stream raises
        instead, and so does an owner that says what is no order: either ends the lease."""
        while (message := await messages.receive_or_end_untrusted()) is not None:
            order = parse_push_order_untrusted(message)
            ends.obey(order)
            if isinstance(order, PushFrom):
                await _tell(messages, PushNews(End.FROM, True))
            else:
                nursery.start_soon(self._push, messages, ends, order)
        nursery.cancel_scope.cancel()

    async def _push(self, messages: MessageStream, ends: LeaseEnds, order: PushTo) -> None:
        """From the rpc-server's socket to the lease's successor, until either ends."""
        assert ends.sockets is not None
        try:
            with trio.fail_after(SETUP_S):
                session = await self._reach(order.peer, ends.owner)
                stream, local = await _connect(session, order.lease, ends.sockets)
        except (MeshError, TunnelError, OSError, trio.TooSlowError) as error:
            log.info("no pushing to %s: %s", order.peer.short, error or "it took too long")
            # In the same words for all: an owner learns nothing of whom we know.
            await _tell(messages, PushNews(End.TO, False, OUT_OF_REACH))
            return
        await _tell(messages, PushNews(End.TO, True))
        async with accompanied_by(partial(_tell_silence, messages, session)):
            await splice(stream, local)
        await _tell(messages, PushNews(End.TO, False, OVER))


async def _tell(messages: MessageStream, news: PushNews) -> None:
    with trio.fail_after(ANSWER_S):
        await messages.send(news.to_message())


async def _tell_silence(messages: MessageStream, session: Session) -> None:
    """The owner may hear both sides, and think that all is well."""
    while await long_silence(session):
        await _tell(messages, PushNews(End.TO, True, silent=True))
        await session.wait_heard()
        if not session.closed.is_set():
            await _tell(messages, PushNews(End.TO, True))


async def _take(stream: Stream, sockets: PushSockets) -> None:
    try:
        with trio.fail_after(SETUP_S):
            local = await trio.open_unix_socket(str(sockets.inward))
            await stream.send_all(YES)
    except (OSError, TunnelError, trio.TooSlowError) as error:
        log.warning("%s of %s is not taken: %s", stream.service, stream.peer.short, error)
        stream.reset("the rpc-server takes nothing")
        return
    await splice(stream, local)


async def _connect(
    session: Session, lease_id: str, sockets: PushSockets
) -> tuple[Stream, trio.SocketStream]:
    """The stream into the lease, which the peer has taken, and the socket that gives what goes
    there. Raises `TunnelError`, `BadMessage`, `OSError`."""
    stream = await session.open(PUSH_SERVICE + lease_id)
    try:
        if await stream.receive_some(len(YES)) != YES:
            raise BadMessage("the next worker says something else than yes")
        return stream, await trio.open_unix_socket(str(sockets.outward))
    except BaseException:
        stream.reset("the worker before it has given up")
        with trio.CancelScope(shield=True):
            await stream.aclose()
        raise
