"""What an engine can compute on here."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from enum import StrEnum

import psutil

from meshnode.engine.cache import Engine
from meshnode.engine.children import child_environment
from meshnode.engine.errors import EngineFailed

LIST_TIMEOUT_S = 60  # CUDA takes seconds to wake its cards
CPU_DEVICE = "CPU"
# common_print_available_devices in common/arg.cpp
_DEVICE_LINE = re.compile(
    r"\s+(?P<name>\S+): (?P<text>.*) \((?P<total>\d{1,12}) MiB, (?P<free>\d{1,12}) MiB"
)


class DeviceKind(StrEnum):
    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True)
class Device:
    """`name` is what `--device` takes; memory is what the operating system or driver reports."""

    name: str
    description: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int

    @property
    def is_gpu(self) -> bool:
        return self.kind is DeviceKind.GPU


def list_devices(engine: Engine) -> tuple[Device, ...]:
    """Accelerators in the engine's order, then the CPU. Blocks. Raises `EngineFailed`."""
    try:
        run = subprocess.run(
            [str(engine.binary("llama-server")), "--list-devices"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIST_TIMEOUT_S,
            env=child_environment(),  # not our own MESH_PARENT_FD: this child has no such pipe
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or b""
        lines = tuple(stderr.decode(errors="replace").splitlines()[-5:])
        raise EngineFailed(
            "the engine cannot list its devices: run `mesh engine build` again", lines
        ) from error
    return (*parse_device_list(run.stdout.decode(errors="replace")), cpu_device())


def parse_device_list(text: str) -> tuple[Device, ...]:
    """The devices in what `llama-server --list-devices` prints; it leaves the CPU out."""
    return tuple(
        Device(
            name=found["name"],
            description=found["text"],
            kind=DeviceKind.GPU,
            total_bytes=int(found["total"]) << 20,
            free_bytes=int(found["free"]) << 20,
        )
        for line in text.splitlines()
        if (found := _DEVICE_LINE.match(line))
    )


def cpu_device() -> Device:
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return Device(
        name=CPU_DEVICE,
        description=f"{platform.machine()}, {cores} cores",
        kind=DeviceKind.CPU,
        total_bytes=memory.total,
        free_bytes=memory.available,
    )
