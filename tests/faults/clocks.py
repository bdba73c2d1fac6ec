"""A machine's clocks as its processes see them: set to another time, and after a sleep."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import require

_SOURCE = Path(__file__).with_name("stepped_clock.c")


@dataclass(frozen=True)
class Clock:
    """One machine's. Processes that were started with `environment` see it."""

    library: Path
    file: Path

    def __post_init__(self) -> None:
        self.file.write_bytes(bytes(16))

    def set(self, step_s: int) -> None:
        """The wall clock is off by so much."""
        self._write(0, step_s)

    def sleep(self, asleep_s: int) -> None:
        """In all so much time has passed in which the steady clock stood still."""
        self._write(8, asleep_s)

    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "MESH_TEST_CLOCK": str(self.file)}

    def _write(self, offset: int, seconds: int) -> None:
        with self.file.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack("<q", seconds))


def build_library(folder: Path) -> Path:
    """What Clock needs; Linux with a compiler."""
    require("compiler", sys.platform == "linux" and shutil.which("cc") is not None, "no cc here")
    path = folder / "stepped_clock.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(path), str(_SOURCE)]
    subprocess.run([*command, "-ldl"], check=True)
    return path
