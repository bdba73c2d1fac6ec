"""A worker's server seen through a tunnel: two endpoints on loopback, a unix socket on each end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from tests.engine.processes import Running, rpc_server
from tunnels import Endpoint, Identity, connect_and_splice, listen_and_forward

SERVICE = "rpc"


@asynccontextmanager
async def tunnelled_server(
    bin_dir: Path, folder: Path, kind: str, environment: Mapping[str, str]
) -> AsyncIterator[tuple[Running, str]]:
    """The server, and the endpoint under which the other node's programs reach it."""
    with rpc_server(bin_dir, folder, name="far", env=dict(environment)) as server:
        worker = Endpoint(Identity.generate(), authorize=lambda *_: True, transports=(kind,))
        target = server.address.removeprefix("unix:")
        worker.serve(SERVICE, partial(connect_and_splice, target=target))
        ours = Endpoint(Identity.generate(), authorize=lambda *_: False, transports=(kind,))
        async with trio.open_nursery() as nursery:
            await nursery.start(worker.run, "127.0.0.1", 0)
            await nursery.start(ours.run, "127.0.0.1", 0)
            session = await ours.connect(worker.peer, worker.candidates())
            near = folder / "near.sock"
            await nursery.start(listen_and_forward, near, partial(session.open, SERVICE))
            yield server, f"unix:{near}"
            nursery.cancel_scope.cancel()
