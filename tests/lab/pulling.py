"""`mesh pull` as a process of its own, which a test may hold, kill, or make less patient."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import trio

from meshnode.crash_points import CRASH_AT_VARIABLE, CRASH_GATE_VARIABLE
from tests.kills import Gate

ENDS_WITHIN_S = 100
NONE: Mapping[str, str] = MappingProxyType({})

IMPATIENT = """
import sys
from meshnode.models.pull import client, ranges
client.TRIES = ranges.MAX_TRIES = 2
from meshnode.cli.main import main
main()
"""
"""Gives up after seconds, where a user's gives up after a minute or more."""


@dataclass(frozen=True)
class Ended:
    """How it ended."""

    exit_code: int
    said: str

    def check(self, exit_code: int, *words: str) -> None:
        """The documented code, one clear sentence, no traceback."""
        assert self.exit_code == exit_code, self.said
        assert "Traceback" not in self.said
        assert "internal error" not in self.said
        for word in words:
            assert word in self.said, self.said


class Command:
    """One that runs."""

    def __init__(self, process: trio.Process, output: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._output = output

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def end(self) -> Ended:
        with trio.fail_after(ENDS_WITHIN_S):
            code = await self._process.wait()
        return Ended(code, self._output.read_text())


@dataclass(frozen=True)
class Puller:
    """I run commands on one home. prefix: a command that runs commands."""

    home: Path
    prefix: tuple[str, ...] = ()

    @asynccontextmanager
    async def running(
        self, *arguments: str, patient: bool = True, environment: Mapping[str, str] = NONE
    ) -> AsyncIterator[Command]:
        program = ("-m", "meshnode.cli.main") if patient else ("-c", IMPATIENT)
        argv = [*self.prefix, sys.executable, *program, *arguments, "--home", str(self.home)]
        with tempfile.NamedTemporaryFile(prefix="mesh-said-") as output:
            process = await trio.lowlevel.open_process(
                argv,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output.fileno(),
                stderr=subprocess.STDOUT,
            )
            try:
                yield Command(process, Path(output.name))
            finally:
                with trio.CancelScope(shield=True):
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()

    async def run(
        self, *arguments: str, patient: bool = True, environment: Mapping[str, str] = NONE
    ) -> Ended:
        async with self.running(*arguments, patient=patient, environment=environment) as command:
            return await command.end()

    @asynccontextmanager
    async def held(
        self, point: str, *arguments: str, patient: bool = True
    ) -> AsyncIterator[tuple[Command, Gate]]:
        """The command as it stands at a crash point, until the gate is released."""
        with tempfile.TemporaryDirectory(prefix="mesh-gate-") as folder:  # a short path
            async with Gate(Path(folder) / "gate").opened() as gate:
                named = {CRASH_AT_VARIABLE: point, CRASH_GATE_VARIABLE: str(gate.path)}
                async with self.running(*arguments, patient=patient, environment=named) as command:
                    await gate.wait(point.partition(":")[0])
                    try:
                        yield command, gate
                    finally:
                        await gate.release()

    def folders(self) -> list[Path]:
        """Of slices."""
        return [path.parent for path in sorted((self.home / "models").glob("*/slice.cbor"))]
