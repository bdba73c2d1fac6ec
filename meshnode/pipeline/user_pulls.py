"""Pulls that this node's user asks for, by command or over HTTP: on this node, or on another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import trio

from meshnode.errors import ResourceError, UsageError
from meshnode.models.fetching import OnProgress
from meshnode.models.store.slice import Slice
from meshnode.pipeline.orders import Orders
from meshnode.pipeline.pulling import Puller, Wish

MAX_PULLS = 8
"""At once, on all nodes together; each is a few connections, and files that are written. Others
wait for their turn."""
MAX_ASKED = 256
"""Those that wait among them."""


class TooManyPulls(ResourceError):
    """So many others wait already that no more may."""


class UserPulls:
    """I pull for this node's user."""

    def __init__(self, name: str, peer: str, puller: Puller, orders: Orders) -> None:
        """name, peer: this node's name and id."""
        self._name = name
        self._peer = peer
        self._puller = puller
        self._orders = orders
        self._asked = 0
        self._places = trio.Semaphore(MAX_PULLS)

    async def pull(
        self,
        source: str,
        layers: str | None,
        on_progress: OnProgress,
        *,
        node: str | None = None,
        what: str = "--layers",
    ) -> dict[str, Any]:
        """What is held then: `Pulled.row` where it is this node that pulls, the fields of `Held`
        where it is another, and `node`, its name. source: as a user writes it, `mesh:` and a
        model's identity for what members have. node: a name or an id; None: this one. `what`: how
        to call the layers. Goes on until it is cancelled; what came by then stays. Raises
        `MeshError`."""
        async with self._one_of_few():
            if node is None or self._is_us(node):
                pulled = await self._puller.pull(Wish(source, layers, what), on_progress)
                return {"node": self._name, **pulled.row()}
            name = self._orders.find(node).node
            held = await self._orders.pull(node, source, layers, on_progress)
            return {"node": name, **asdict(held)}

    async def pull_rest(
        self, part: Slice, layers: str | None, on_progress: OnProgress, *, what: str
    ) -> dict[str, Any]:
        """What this node holds then of a model that it has begun to pull, from where that came."""
        async with self._one_of_few():
            pulled = await self._puller.pull_rest(part, layers, on_progress, what=what)
            return {"node": self._name, **pulled.row()}

    @asynccontextmanager
    async def _one_of_few(self) -> AsyncIterator[None]:
        """Those that came first are first. Raises `TooManyPulls`."""
        if self._asked >= MAX_ASKED:
            raise TooManyPulls(f"{MAX_ASKED} pulls are under way or wait here: wait for one")
        self._asked += 1
        try:
            async with self._places:
                yield
        finally:
            self._asked -= 1

    async def answer(self, request: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """The same for a command that asks on node.sock."""
        source, layers, node = (request.get(key) for key in ("source", "layers", "node"))
        if not isinstance(source, str) or not isinstance(layers, str | None):
            raise UsageError("the request for a pull is incomplete")
        if not isinstance(node, str | None):
            raise UsageError("the request for a pull names no node")
        return await self.pull(source, layers, on_progress, node=node)

    def _is_us(self, node: str) -> bool:
        """By its whole id, or by a name that no member has too."""
        if node.casefold() == self._peer:
            return True
        if node != self._name:
            return False
        try:
            self._orders.find(node)
        except UsageError:
            return True
        raise UsageError(f"this node and another are called {node!r}: name one by its id")


async def keeps_none(_request: Mapping[str, Any], _on_progress: OnProgress) -> dict[str, Any]:
    """The answer of a node without models."""
    raise UsageError("this node carries others' traffic and keeps no models: ask another")
