"""What this node has measured, of its devices and its links, for its own plans and others'."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import trio

from meshnode.engine.devices import Device
from meshnode.pipeline.gauge import Gauge
from meshnode.pipeline.probing import Probing
from meshnode.pipeline.speeds import Speed
from meshnode.pipeline.ways import Way
from tunnels import Endpoint, PeerId

PATIENCE_S = 8.0
"""For what was never measured, before a plan: about five seconds a device, unless it is busy, and
one a link. Whoever asks waits for ten."""


class Figures:
    """I have this machine measured, and tell what is known. share_mesh: whether two peers do."""

    def __init__(
        self, gauge: Gauge, probing: Probing, share_mesh: Callable[[PeerId, PeerId], bool]
    ) -> None:
        self._gauge = gauge
        self._probing = probing
        self._share_mesh = share_mesh

    def offer(self, endpoint: Endpoint) -> None:
        self._probing.offer(endpoint)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._probing.run)
            nursery.start_soon(self._gauge.run)

    def speed(self, device: Device) -> Speed | None:
        return self._gauge.speed(device)

    def ways(self, asker: PeerId | None = None) -> tuple[Way, ...]:
        """For this node's own plans; for an asker, those to members of meshes that it is in too."""
        ways = self._probing.ways()
        if asker is None:
            return ways
        return tuple(way for way in ways if self._share_mesh(way.peer, asker))

    def computing(self) -> AbstractContextManager[None]:
        """While it lasts, somebody computes here or is about to: no device is measured."""
        return self._gauge.in_use()

    def want(self) -> None:
        """Somebody plans with what there is: let the next one find newer rates."""
        self._probing.want()

    async def settle(self) -> None:
        """Returns once everything was measured, or soon in any case."""
        with trio.move_on_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._gauge.settle)
                nursery.start_soon(self._probing.settle)
