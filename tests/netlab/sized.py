"""Runs in a namespace: a node that serves an echo, or one that asks it and says after each question
how large its datagrams have become. A line on standard input is a question of so many bytes.

    python -m tests.netlab.sized ADDRESS               prints its key and port
    python -m tests.netlab.sized ADDRESS KEY HOST PORT
"""

from __future__ import annotations

import sys
import time

import trio

from tests.lab.nodes import echo
from tunnels import Candidate, Endpoint, Identity, PeerId, Session
from tunnels.quic import QuicLink


def node() -> Endpoint:
    return Endpoint(Identity.generate(), authorize=lambda *_: True, transports=("quic",))


async def serve(address: str) -> None:
    async with trio.open_nursery() as nursery:
        endpoint = node()
        endpoint.serve("echo", echo)
        port = await nursery.start(endpoint.run, address, 0)
        print(endpoint.peer.key.hex(), port, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def ask(address: str, key: str, host: str, port: str) -> None:
    async with trio.open_nursery() as nursery:
        endpoint = node()
        await nursery.start(endpoint.run, address, 0)
        peer = PeerId(bytes.fromhex(key))
        session = await endpoint.connect(peer, [Candidate("quic", host, int(port))])
        stream = await session.open("echo")
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            began_s, left = time.monotonic(), int(line)
            nursery.start_soon(stream.send_all, bytes(left))
            while left:
                left -= len(await stream.receive_some())
            print(size_of(session), time.monotonic() - began_s, flush=True)
        nursery.cancel_scope.cancel()


def size_of(session: Session) -> int:
    link = session.best_link
    assert isinstance(link, QuicLink)
    return link.quic._max_datagram_size


if __name__ == "__main__":
    if len(sys.argv) == 2:
        trio.run(serve, sys.argv[1])
    else:
        trio.run(ask, sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4])
