"""The gateway on a real port, before a node that the test drives."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trio

from meshnode.gateway.server import serve_gateway
from tests.meshnode.gateway.model_node import ModelNode, open_model_node
from tests.meshnode.gateway.node_view import SettableNode


@dataclass(frozen=True)
class Gateway:
    """`http` is a client of it, with JSON requests as any program would send them."""

    port: int
    node: SettableNode
    http: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a path short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="gw-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
async def gateway(nursery: trio.Nursery) -> AsyncIterator[Gateway]:
    node = SettableNode()
    port = await nursery.start(serve_gateway, node, "127.0.0.1", 0)
    # A test that hangs fails here, not in CI's own limit.
    nursery.cancel_scope.deadline = trio.current_time() + 60
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
        yield Gateway(port, node, http)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[ModelNode]:
    with trio.fail_after(60):  # a test that hangs fails here, not in CI's own limit
        async with open_model_node(tmp_path) as node:
            yield node
