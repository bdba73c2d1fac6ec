"""`python -m tests.netlab.peer`: a long-lived process with one endpoint after another.

It takes a JSON object a line, `{"id": 1, "do": COMMAND, …}`, and answers each with one that has its
id: what the method of `Peer` of that name returns, or `{"error": sentence}`. Times are the system's
monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from discovery.portmap import PortMap
from discovery.reply import (
    MAX_ADDRESSES,
    NONCE_BYTES,
    Reply,
    encode,
    parse_untrusted,
    probe_key,
)
from discovery.token import ID_BYTES
from tunnels import (
    Candidate,
    Change,
    Endpoint,
    Identity,
    Session,
    SessionUp,
    Stream,
    TunnelError,
)
from tunnels.binding import Address
from tunnels.handshake import Role
from tunnels.link import LINK_KINDS
from tunnels.meeting import Meeting, Nats, nats_told_by
from tunnels.peer import parse_peer_id_untrusted
from tunnels.relay import KIND, Carries
from tunnels.stun import Server

ECHO = "echo"
WORD = b"there and back"
SECRET_HASH = b"what token and book have alike  "
PATIENCE_S = 60.0  # of a joiner that has shown a code


class Peer:
    """I am one of the two, or the relay."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.under_way: set[trio.CancelScope] = set()
        self._inside = nursery  # what ends with the endpoint
        self._ended = trio.Event()
        self._ended.set()
        self._told, self._heard_at = trio.open_memory_channel[Address | TunnelError](8)
        self._endpoint: Endpoint | None = None
        self._stream: Stream | None = None

    async def start(
        self,
        stun: list[tuple[str, int]],
        transports: Sequence[str] = tuple(LINK_KINDS),
        portmap: bool = False,
        relay: dict[str, Any] | None = None,
        relays_at: int = 0,
    ) -> dict[str, Any]:
        """A new node with a key of its own, and no memory. stun: asked how we look from outside.
        portmap: so is the router, for ports. relay: the token of one to be reachable through.
        relays_at: a port, to be one."""
        self._endpoint = endpoint = Endpoint(
            Identity.generate(),
            authorize=lambda _peer, _service: True,
            transports=transports,
            stun=[Server(*one) for one in stun],
            carries=Carries.TRAFFIC if relays_at else Carries.INTRODUCTIONS,
        )
        endpoint.serve(ECHO, _echo)
        self._nursery.start_soon(_welcome_all, endpoint.subscribe())
        self._ended = trio.Event()
        self._told, self._heard_at = trio.open_memory_channel[Address | TunnelError](1)
        await self._nursery.start(self._run, endpoint, relays_at)
        await endpoint.outside.checked.wait()
        if portmap:
            ports = PortMap(endpoint.bound_ports)
            endpoint.add_candidates(ports.candidates)
            self._inside.start_soon(ports.run)
            await ports.settled.wait()
        if relay:
            await self._reserve(endpoint, relay)
        return await self.token()

    async def _reserve(self, endpoint: Endpoint, relay: dict[str, Any]) -> None:
        places = _candidates(relay)
        session = await endpoint.connect(parse_peer_id_untrusted(relay["peer"]), places)
        agreed = trio.Event()
        self._inside.start_soon(
            endpoint.relaying.reserve, session, places, lambda _reservation: agreed.set()
        )
        await agreed.wait()

    async def stop(self) -> dict[str, Any]:
        """It has ended already, as before every start."""
        return {}

    async def end(self) -> None:
        """The node goes, and with it whatever it was told to do."""
        for scope in self.under_way:
            scope.cancel()
        if self._endpoint is not None:
            self._inside.cancel_scope.cancel()
        await self._ended.wait()
        self._endpoint = self._stream = None

    async def token(self) -> dict[str, Any]:
        """What a token says of this node."""
        endpoint = self._running()
        return {
            "peer": str(endpoint.peer),
            "candidates": [
                [one.transport, one.host, one.port, one.kind, one.via and str(one.via)]
                for one in endpoint.meeting_places()
            ],
        }

    async def join(self, token: dict[str, Any]) -> dict[str, Any]:
        """With the other's token: from the first dial to the first byte that came back."""
        peer = parse_peer_id_untrusted(token["peer"])
        began_s = time.monotonic()
        session = await self._running().connect(peer, _candidates(token))
        return await self._first_byte(session, began_s)

    async def reach(self, peer: str) -> dict[str, Any]:
        """By a stream of our own to somebody who has joined us."""
        return await self._first_byte(await self._session_with(peer), time.monotonic())

    async def call(self, token: dict[str, Any]) -> dict[str, Any]:
        """With a token that led nowhere: a reply code. What comes of it, `called_back` tells."""
        endpoint, nonce = self._running(), secrets.token_bytes(NONCE_BYTES)
        nats = endpoint.nats()
        ours = tuple(
            (one.host, one.port) for one in endpoint.meeting_places() if one.transport == "quic"
        )
        reply = Reply(bytes(ID_BYTES), nonce, ours[:MAX_ADDRESSES], nats.v4, nats.v6)
        key, theirs = probe_key(SECRET_HASH, nonce), _places(token)
        told = nats_told_by(_candidates(token))
        meeting = Meeting(key, Role.DIALLER, theirs, nats, told, patience_s=PATIENCE_S)
        self._inside.start_soon(self._punch, meeting)
        return {"code": encode(reply, SECRET_HASH)}

    async def called_back(self, peer: str) -> dict[str, Any]:
        """Waits for what came of `call`, and joins over that."""
        heard_at = await self._heard_at.receive()
        if isinstance(heard_at, TunnelError):
            raise heard_at
        return await self.join(
            {"peer": peer, "candidates": [["quic", *heard_at, "reflexive", None]]}
        )

    async def _punch(self, meeting: Meeting) -> None:
        try:
            heard_at: Address | TunnelError = await self._running().punch(meeting)
        except TunnelError as error:
            heard_at = error
        await self._told.send(heard_at)

    async def accept(self, code: str) -> dict[str, Any]:
        """The printer's side of a reply code; returns when the joiner is heard."""
        endpoint, reply = self._running(), parse_untrusted(code)
        began_s = time.monotonic()
        key = probe_key(SECRET_HASH, reply.nonce)
        theirs = Nats(reply.nat_v4, reply.nat_v6)
        meeting = Meeting(key, Role.LISTENER, reply.addresses, endpoint.nats(), theirs)
        host, port = await endpoint.punch(meeting)
        return {"began_s": began_s, "heard_at": [host, port]}

    async def direct(self, peer: str, within_s: float) -> dict[str, Any]:
        """Waits, as long as told, until bytes go straight; then sends some on the old stream."""
        session = await self._session_with(peer)
        assert self._stream is not None
        with trio.move_on_after(within_s):
            while _is_relayed(session):
                if session.closed.is_set():
                    raise TunnelError(f"the session has ended: {session.close_reason}")
                await session.wait_links_changed()
        at_s = time.monotonic()
        await _there_and_back(self._stream)
        return {"at_s": at_s, **_link_of(session)}

    async def carry(self, size_bytes: int) -> dict[str, Any]:
        """So much there and back on the stream; how long that took."""
        assert self._stream is not None
        began_s = time.monotonic()
        await _there_and_back(self._stream, secrets.token_bytes(size_bytes))
        return {"took_s": time.monotonic() - began_s}

    async def _first_byte(self, session: Session, began_s: float) -> dict[str, Any]:
        self._stream = await session.open(ECHO)
        await _there_and_back(self._stream)
        return {"began_s": began_s, "at_s": time.monotonic(), **_link_of(session)}

    async def _session_with(self, peer: str) -> Session:
        key = parse_peer_id_untrusted(peer)
        endpoint = self._running()
        ups = endpoint.subscribe()
        while (session := endpoint.session(key)) is None:
            await ups.receive()
        return session

    def _running(self) -> Endpoint:
        if self._endpoint is None:
            raise TunnelError("nothing was started")
        return self._endpoint

    async def _run(self, endpoint: Endpoint, port: int, task_status: trio.TaskStatus[int]) -> None:
        try:
            async with trio.open_nursery() as self._inside:
                await self._inside.start(endpoint.run, None, port)
                task_status.started(0)
        finally:
            self._ended.set()


def _is_relayed(session: Session) -> bool:
    best = session.best_link
    return best is None or best.kind == KIND


async def _welcome_all(changes: trio.MemoryReceiveChannel[Change]) -> None:
    """All nodes of the lab are members: strangers have a small share of a relay for all of them."""
    async for change in changes:
        if isinstance(change, SessionUp):
            change.session.welcome()


def _candidates(token: dict[str, Any]) -> list[Candidate]:
    return [
        Candidate(transport, host, port, kind, parse_peer_id_untrusted(via) if via else None)
        for transport, host, port, kind, via in token["candidates"]
    ]


def _places(token: dict[str, Any]) -> tuple[Address, ...]:
    return tuple((one.host, one.port) for one in _candidates(token) if one.transport == "quic")


def _link_of(session: Session) -> dict[str, Any]:
    stats = session.stats
    return {"link": stats.link_kind, "remote": stats.remote, "relayed": _is_relayed(session)}


async def _there_and_back(stream: Stream, data: bytes = WORD) -> None:
    heard = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        while len(heard) < len(data):
            piece = await stream.receive_some()
            if not piece:
                raise TunnelError("the stream ended")
            heard += piece
    if heard != data:
        raise TunnelError("other bytes came back")


async def _echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def main() -> None:
    logging.basicConfig(
        level=logging.DEBUG, stream=sys.stderr, format="%(relativeCreated)d %(name)s %(message)s"
    )
    logging.getLogger("quic").setLevel(logging.WARNING)
    async with trio.open_nursery() as nursery:
        peer = Peer(nursery)
        async for line in _lines():
            command = json.loads(line)
            if command["do"] in ("start", "stop"):
                await peer.end()
            nursery.start_soon(_obey, peer, command.pop("id"), command.pop("do"), command)
        await peer.end()


async def _obey(peer: Peer, number: int, name: str, arguments: dict[str, Any]) -> None:
    method: Callable[..., Awaitable[dict[str, Any]]] = getattr(peer, name)
    answer: dict[str, Any] = {"error": "stopped"}
    with trio.CancelScope() as scope:
        peer.under_way.add(scope)
        try:
            answer = await method(**arguments)
        except* TunnelError as errors:
            answer = {"error": _first_of(errors)}
    peer.under_way.discard(scope)
    print(json.dumps({"id": number, **answer}), flush=True)


def _first_of(errors: BaseException) -> str:
    """Its sentence."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return str(errors)


async def _lines() -> Any:
    buffered = b""
    commands = trio.lowlevel.FdStream(0)
    while piece := await commands.receive_some():
        *lines, buffered = (buffered + piece).split(b"\n")
        for line in lines:
            yield line


if __name__ == "__main__":
    trio.run(main)
