"""`python -m tests.netlab.peer`: a long-lived process with one endpoint after another.

It takes a JSON object a line, `{"do": COMMAND, …}`, and answers each with one: what the method of
`Peer` of that name returns, or `{"error": sentence}`. Times are the system's monotonic clock, which
all processes of a machine share.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from tunnels import Candidate, Endpoint, Identity, Session, Stream, TunnelError
from tunnels.improve import DIRECT_RANK
from tunnels.peer import parse_peer_id_untrusted

ECHO = "echo"
WORD = b"there and back"
LOGGED = "tunnels"


class Peer:
    """I am one of the two, or the relay."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._ended.set()
        self._endpoint: Endpoint | None = None
        self._stream: Stream | None = None

    async def start(self) -> dict[str, Any]:
        """A new node with a key of its own, and no memory."""
        await self.stop()
        self._endpoint = endpoint = Endpoint(
            Identity.generate(), authorize=lambda _peer, _service: True
        )
        endpoint.serve(ECHO, _echo)
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        await self._nursery.start(self._run, endpoint)
        return await self.token()

    async def stop(self) -> dict[str, Any]:
        self._scope.cancel()
        await self._ended.wait()
        self._endpoint = self._stream = None
        return {}

    async def token(self) -> dict[str, Any]:
        """What a token says of this node."""
        endpoint = self._running()
        return {
            "peer": str(endpoint.peer),
            "candidates": [
                [one.transport, one.host, one.port, one.kind] for one in endpoint.candidates()
            ],
        }

    async def join(self, token: dict[str, Any]) -> dict[str, Any]:
        """With the other's token: from the first dial to the first byte that came back."""
        peer = parse_peer_id_untrusted(token["peer"])
        candidates = [Candidate(*fields) for fields in token["candidates"]]
        began_s = time.monotonic()
        session = await self._running().connect(peer, candidates)
        return await self._first_byte(session, began_s)

    async def met(self, peer: str) -> dict[str, Any]:
        """Waits for a session that the other side began."""
        began_s = time.monotonic()
        return await self._first_byte(await self._session_with(peer), began_s)

    async def direct(self, peer: str, within_s: float) -> dict[str, Any]:
        """Waits, as long as told, until bytes go straight; then sends some on the old stream."""
        session = await self._session_with(peer)
        assert self._stream is not None
        with trio.move_on_after(within_s):
            while _is_relayed(session):
                await session.wait_links_changed()
        at_s = time.monotonic()
        await _there_and_back(self._stream)
        return {"at_s": at_s, **_link_of(session)}

    async def idle(self, seconds: float) -> dict[str, Any]:
        """Says nothing that long; then whether the stream still carries."""
        assert self._stream is not None
        await trio.sleep(seconds)
        await _there_and_back(self._stream)
        return {}

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

    async def _run(self, endpoint: Endpoint, task_status: trio.TaskStatus[int]) -> None:
        try:
            with self._scope:
                await endpoint.run(None, 0, task_status=task_status)
        finally:
            self._ended.set()


def _is_relayed(session: Session) -> bool:
    best = session.best_link
    return best is None or best.rank > DIRECT_RANK


def _link_of(session: Session) -> dict[str, Any]:
    stats = session.stats
    return {"link": stats.link_kind, "remote": stats.remote, "relayed": _is_relayed(session)}


async def _there_and_back(stream: Stream) -> None:
    await stream.send_all(WORD)
    heard = b""
    while len(heard) < len(WORD):
        piece = await stream.receive_some()
        if not piece:
            raise TunnelError("the stream ended")
        heard += piece
    if heard != WORD:
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
            method: Callable[..., Awaitable[dict[str, Any]]] = getattr(peer, command.pop("do"))
            try:
                answer = await method(**command)
            except TunnelError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
        await peer.stop()


async def _lines() -> Any:
    buffered = b""
    commands = trio.lowlevel.FdStream(0)
    while piece := await commands.receive_some():
        *lines, buffered = (buffered + piece).split(b"\n")
        for line in lines:
            yield line


if __name__ == "__main__":
    trio.run(main)
