"""How fast this machine's devices are: measured once, while nobody needs them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import psutil
import trio

from meshnode.engine.devices import Device
from meshnode.engine.speed import BUSY_PERCENT, LOOK_S, Speeds
from meshnode.errors import MeshError
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.speeds import Speed

WAIT_S = 20.0
"""At most, for such work to end."""

log = logging.getLogger(__name__)


async def until_quiet() -> bool:
    """Returns when this machine has little else to do, or has had much to do for long: False."""
    with trio.move_on_after(WAIT_S):
        psutil.cpu_percent()
        while True:
            await trio.sleep(LOOK_S)
            if psutil.cpu_percent() < BUSY_PERCENT:
                return True
    return False


class Gauge:
    """I measure what was never measured, and stop at once when the devices are needed."""

    def __init__(
        self,
        speeds: Speeds,
        inventory: Inventory,
        threads: int | None = None,
        quiet: Callable[[], Awaitable[bool]] = until_quiet,
    ) -> None:
        """threads: of the engine, on the CPU."""
        self._speeds = speeds
        self._inventory = inventory
        self._threads = threads
        self._quiet = quiet
        self._users = 0
        self._free = trio.Event()
        self._free.set()
        self._scope: trio.CancelScope | None = None
        self._known: dict[str, Speed | None] = {}
        self._settled = trio.Event()

    def speed(self, device: Device) -> Speed | None:
        """What is known now."""
        if device.name not in self._known:
            self._known[device.name] = self._speeds.known(device, self._threads)
        return self._known[device.name]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While it lasts, somebody computes here or is about to: nothing is measured."""
        self._users += 1
        self._free = trio.Event() if self._users == 1 else self._free
        if self._scope is not None:
            self._scope.cancel()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._free.set()

    async def settle(self) -> None:
        """Returns when all that can be measured has been, or when that is to wait for others."""
        if not self._users:
            await self._settled.wait()

    async def run(self) -> None:
        """Until every device has been measured once, or could not be."""
        for device in self._inventory.devices:
            while self.speed(device) is None:
                await self._free.wait()
                with trio.CancelScope() as self._scope:
                    if not await self._measure(device):
                        break
                self._scope = None
        self._scope = None
        self._settled.set()

    async def _measure(self, device: Device) -> bool:
        """False where it cannot be measured."""
        try:
            keeps = await self._quiet()
            self._known[device.name] = await self._speeds.measure_aside(
                device, self._threads, keeps=keeps
            )
        except (MeshError, OSError) as error:
            log.warning("%s was not measured: %s", device.name, error)
            return False
        return True
