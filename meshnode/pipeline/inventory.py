"""This machine's devices as they are now."""

from __future__ import annotations

import math
from dataclasses import replace

import psutil
import trio

from meshnode.engine.cache import Engine
from meshnode.engine.devices import Device, DeviceKind, list_devices

MEMORY_RESERVE_FRACTION = 0.1
"""Of what is free, left to the machine's other work where the operator sets no limit."""
FRESH_S = 1.0  # asking starts a process; a hundred peers may ask at once


class Inventory:
    """I know the devices. The CPU's free memory is read from the system, accelerators are asked
    through the engine, which takes a moment and so happens in `refresh`."""

    def __init__(self, engine: Engine, devices: tuple[Device, ...] | None = None) -> None:
        """Lists the devices unless they are given. Blocks. Raises `EngineFailed`."""
        self._engine = engine
        self._asking = trio.Lock()
        self._fresh_until_s = -math.inf
        self._devices = list_devices(engine) if devices is None else devices

    @property
    def devices(self) -> tuple[Device, ...]:
        """Accelerators, then the CPU."""
        available_bytes = psutil.virtual_memory().available
        return tuple(
            replace(device, free_bytes=available_bytes) if not is_gpu(device) else device
            for device in self._devices
        )

    async def refresh(self) -> None:
        """Asks the accelerators anew for their free memory: one who asks at a time, and what was
        found a moment ago is good enough for the next."""
        if not any(is_gpu(device) for device in self._devices):
            return
        async with self._asking:
            if trio.current_time() >= self._fresh_until_s:
                self._devices = await trio.to_thread.run_sync(list_devices, self._engine)
                self._fresh_until_s = trio.current_time() + FRESH_S


def is_gpu(device: Device) -> bool:
    return device.kind is DeviceKind.GPU


def keep_reserve(free_bytes: int) -> int:
    """What of free memory may be used."""
    return int(free_bytes * (1 - MEMORY_RESERVE_FRACTION))
