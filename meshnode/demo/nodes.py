"""Whole `mesh` nodes as child processes: for the demo, the benchmark and the end-to-end tests."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import trio

from discovery.token import PREFIX
from meshnode.cli.settings import MEASURE_VARIABLE, OFFLINE_VARIABLE
from meshnode.engine.children import Child, child_environment, open_child
from meshnode.errors import EngineError

EVENT_TIMEOUT_S = 120.0
STOP_GRACE_S = 20.0
_TOKEN = re.compile(rf"{PREFIX}[0-9a-z]+", re.IGNORECASE)
_UNTOLD = {OFFLINE_VARIABLE: "1", MEASURE_VARIABLE: "0"}
_PASSED_ON = ("MESH_CACHE", "MESH_ENGINE_SOURCE", "PYTHONPATH", "XDG_CACHE_HOME")


class NodeFailed(EngineError):
    """A node ended, or said nothing in time; the message ends in its last lines."""


class NodeProcess:
    """One running node: its events as they come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self.heard_at_s: list[float] = []  # of each event, by trio's clock
        self._child: Child | None = None
        self._news = trio.Event()

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def last_lines(self) -> tuple[str, ...]:
        return self._running.last_lines

    @property
    def _running(self) -> Child:
        assert self._child is not None, "the node was not started"
        return self._child

    def take_line(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # a sentence on standard error: it is among the last lines
        if isinstance(event, dict) and "event" in event:
            self.events.append(event)
            self.heard_at_s.append(trio.current_time())
            self._news.set()
            self._news = trio.Event()

    async def wait_event(
        self, kind: str, *, containing: str = "", after: int = 0, timeout_s: float = EVENT_TIMEOUT_S
    ) -> dict[str, Any]:
        """The first event of this kind (from index `after` on) with this text. `NodeFailed` when
        the node ends first or `timeout_s` pass."""
        seen = after
        with trio.move_on_after(timeout_s):
            while True:
                news = self._news
                for event in self.events[seen:]:
                    if event["event"] == kind and containing in event["text"]:
                        return event
                seen = len(self.events)
                if self._running.ended.is_set():
                    await self._running.wait()
                    raise self._failure(f"{self._running.describe_end()} before it told")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_after, nursery.cancel_scope, self._running.ended)
                    await news.wait()
                    nursery.cancel_scope.cancel()
        raise self._failure(f"did not tell in {timeout_s:.0f} s")

    async def fail_at_end(self) -> NoReturn:
        """Waits for its end, which nobody asked for, and raises `NodeFailed` then."""
        await self._running.wait()
        raise self._failure(self._running.describe_end())

    async def wait_exit(self, timeout_s: float = EVENT_TIMEOUT_S) -> int:
        with trio.fail_after(timeout_s):
            return await self._running.wait()

    async def stop(self) -> None:
        await self._running.stop(STOP_GRACE_S)

    def _failure(self, what: str) -> NodeFailed:
        lines = "".join(f"\n  {line}" for line in self.last_lines[-8:])
        return NodeFailed(f"the node {self.name!r} {what}{lines}")


async def _cancel_after(scope: trio.CancelScope, event: trio.Event) -> None:
    await event.wait()
    scope.cancel()


@asynccontextmanager
async def open_node(
    *arguments: str,
    name: str,
    home: Path,
    log_folder: Path,
    engine_options: Sequence[str] = (),
    prefix: Sequence[str] = (),
    stdin: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[NodeProcess]:
    """Runs `mesh ARGUMENTS` while the block lasts. `prefix`: a command that runs commands, such as
    `ip netns exec NAME`. `stdin`: all it finds on its standard input. `environment`: more variables
    than a node gets otherwise; it is offline unless they say MESH_OFFLINE=0, and measures nothing,
    since its home is new and what is shown is not to depend on it, unless they say MESH_MEASURE=1.

    Its invites are in its events; its log and its last lines, which errors show, are without them.
    """
    node = NodeProcess(name)
    argv = [*prefix, sys.executable, "-m", "meshnode.cli.main", *arguments]
    argv += ["--home", str(home), "--name", name, "--log-format", "json"]
    argv += ["--", *engine_options] if engine_options else []
    passed_on = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    async with open_child(
        argv,
        env=child_environment(**(_UNTOLD | passed_on | dict(environment))),
        log=log_folder / f"{name}.log",
        name=name,
        on_line=node.take_line,
        redact=without_tokens,
        stdin=stdin.encode(),
        stop_grace_s=STOP_GRACE_S,
    ) as child:
        node._child = child
        yield node


def without_tokens(text: str) -> str:
    """The text with every invite token cut to its beginning."""
    return _TOKEN.sub(f"{PREFIX}…", text)


def invite_token(event: dict[str, Any]) -> str:
    """The token in an `invite` event's line."""
    return str(event["line"]).partition("join=")[2]


def write_token(path: Path, token: str) -> Path:
    """A file for --join-file that only its owner can read: a token has no place in an argv."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return path
