"""The flooded node, put together as `meshnode/node.py` does it, and the members of its mesh."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import trio

from discovery.grants import Role
from discovery.token import encode, parse_untrusted
from meshnode.config import LendConfig
from meshnode.connections import Connections
from meshnode.engine.cache import Engine
from meshnode.engine.devices import cpu_device
from meshnode.ledger import Ledger
from meshnode.membership import Membership
from meshnode.models.shelf import Shelf
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.lease import LeaseDesk
from meshnode.state import Home
from tests.bench.attackers import Target
from tunnels import Endpoint, PeerId, Session, Stream
from tunnels.gate import ASK, TALK
from tunnels.network import HostNetwork

ENGINE_KEY = "flooded"
LENT_BYTES = 1 << 30
CHUNK = bytes(256 << 10)


async def _echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def _swallow(stream: Stream) -> None:
    while await stream.receive_some():
        pass


async def _deaf(_stream: Stream) -> None:
    await trio.sleep_forever()


async def _source(stream: Stream) -> None:
    while True:
        await stream.send_all(CHUNK)


BARE = {"echo": _echo, "swallow": _swallow, "deaf": _deaf, "source": _source, "talk": _swallow}
"""Services that anyone may open: the flood is of what is below them."""


def run_node(pipe: Connection) -> None:
    """Says its key, its port and a token; runs until something is said to it."""

    async def main(folder: Path) -> None:
        with Home(folder / "home") as home:
            identity = home.identity("node.key")
            membership = Membership(home, identity, "flooded")

            def authorize(peer: PeerId, service: str) -> bool:
                return service in BARE or membership.authorize(peer, service)

            endpoint = Endpoint(identity, authorize=authorize)
            connections = Connections(endpoint, membership, lambda _event: None)
            connections.offer_services()
            endpoint.serve("control", _desk(home, folder).serve_control, ASK)
            for name, handler in BARE.items():
                endpoint.serve(name, handler)
            endpoint.serve("talk", _swallow, TALK)
            async with trio.open_nursery() as nursery:
                port = await nursery.start(endpoint.run, "127.0.0.1", 0)
                nursery.start_soon(connections.run, ())
                places = endpoint.candidates()
                token = connections.joining.invite(
                    places, role=Role.PEER, lifetime_s=3600, uses=1000
                )
                pipe.send((endpoint.peer.key, port, encode(token)))
                await trio.to_thread.run_sync(pipe.recv)
                nursery.cancel_scope.cancel()

    with tempfile.TemporaryDirectory() as folder:
        trio.run(main, Path(folder))


def _desk(home: Home, folder: Path) -> LeaseDesk:
    """It refuses every lease: nobody else has its engine."""
    engine = Engine(folder, ENGINE_KEY, "cpu", stock=False, source="", compiler="", cpu="")
    return LeaseDesk(
        name="flooded",
        engine=engine,
        inventory=Inventory(engine, (cpu_device(),)),
        lend=LendConfig(memory_bytes=LENT_BYTES),
        shelf=Shelf((), home.subfolder("manifests")),
        runtime_folder=folder,
        log_folder=folder,
        emit=lambda _event: None,
    )


@dataclass
class Member:
    """A member of the node's mesh, and its session to the node."""

    ledger: Ledger
    connections: Connections
    endpoint: Endpoint
    session: Session


@asynccontextmanager
async def member(
    folder: Path, target: Target, network: HostNetwork | None = None
) -> AsyncIterator[Member]:
    """Joins by the target's token, or by the grant that `folder` holds from an earlier time."""
    with Home(folder) as home:
        identity = home.identity("node.key")
        membership = Membership(home, identity, "member")
        endpoint = Endpoint(identity, authorize=membership.authorize, network=network)
        connections = Connections(endpoint, membership, lambda _event: None)
        connections.offer_services()
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, "127.0.0.1", 0)
            await connections.join(parse_untrusted(target.token))
            session = endpoint.session(target.peer)
            assert session is not None
            yield Member(membership.ledger, connections, endpoint, session)
            nursery.cancel_scope.cancel()
