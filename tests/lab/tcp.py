"""A tcp link's parts, within reach of a test."""

from __future__ import annotations

from functools import partial

import trio
import trio.testing

from tests.lab.nodes import Pair
from tunnels import Endpoint, LinkClosed, Session
from tunnels.allowance import Budget
from tunnels.tcp import TcpLink
from tunnels.tcp_connection import Connection
from tunnels.tcp_transport import FIRST_WORDS_TIMEOUT_S, TcpTransport, Way

LATE_S = 1.0


def transport_of(endpoint: Endpoint) -> TcpTransport:
    transport = endpoint._linking.transports["tcp"]
    assert isinstance(transport, TcpTransport)
    return transport


def link_of(session: Session) -> TcpLink:
    assert isinstance(session.best_link, TcpLink)
    return session.best_link


async def connection_to(pair: Pair) -> Connection:
    """A fresh connection to bob, pinned, on which nothing was said."""
    bob = pair.bob.endpoint
    [place] = bob.candidates()
    share = Budget(trio.current_time()).share("tests")
    way = Way(partial(pair.alice.host.connect, (place.host, place.port)))
    connection, _ = await transport_of(pair.alice.endpoint)._dial(way, bob.peer, share)
    return connection


async def is_turned_away(connection: Connection) -> bool:
    with trio.move_on_after(FIRST_WORDS_TIMEOUT_S + LATE_S):
        try:
            return not await connection.receive()
        except LinkClosed:
            return True
    return False
