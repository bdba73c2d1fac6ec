"""What llama-server reports of a load: GGML_RPC_MESH_REPORT's JSON lines. Sans-IO.

The file is written by the patched engine while we read it, so the last line may be half there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

_TOO_MANY_BYTES = 2**64


@dataclass(frozen=True)
class ServerProgress:
    """How far one rpc-server is. `total_bytes` is 0 where llama-server does not know it."""

    server: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LoadProgress:
    """Bytes of all weights, wherever they go; `servers`: those that have been told of so far."""

    done_bytes: int
    total_bytes: int
    servers: tuple[ServerProgress, ...] = ()


@dataclass(frozen=True)
class ServerLoad:
    """One rpc-server's share, as counted at the commit that ends a load."""

    server: str
    local_tensors: int
    local_bytes: int
    sent_tensors: int
    sent_bytes: int
    failures: int
    first_failure: str | None  # "TENSOR of FILE: REASON"


class LoadReport:
    """I take the report file's bytes as they come and give back what they say."""

    def __init__(self) -> None:
        self._pending = b""
        self._all: LoadProgress | None = None
        self._servers: dict[str, ServerProgress] = {}
        self.loads: tuple[ServerLoad, ...] = ()

    def receive(self, data: bytes) -> LoadProgress | None:
        """How far the load is, if `data` tells of it. Lines that make no sense are passed over."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        news = False
        for line in lines:
            event = _parse(line)
            if isinstance(event, ServerLoad):
                self.loads = (*self.loads, event)
            elif event is not None:
                news = True
                self._take(event)
        return self._progress() if news else None

    def _take(self, event: LoadProgress | ServerProgress) -> None:
        if isinstance(event, LoadProgress):
            self._all = event
        else:
            self._servers[event.server] = event

    def _progress(self) -> LoadProgress:
        servers = tuple(self._servers.values())
        if self._all is not None:
            return replace(self._all, servers=servers)
        done_bytes = sum(server.done_bytes for server in servers)
        return LoadProgress(done_bytes, sum(server.total_bytes for server in servers), servers)


def _parse(line: bytes) -> LoadProgress | ServerProgress | ServerLoad | None:
    if not line.startswith(b"{"):
        return None  # at once: an exception for each of many empty lines takes long
    try:
        event = json.loads(line)
        match event["event"]:
            case "progress":
                return LoadProgress(_bytes(event["done_bytes"]), _bytes(event["total_bytes"]))
            case "server_progress":
                done_bytes, total_bytes = _bytes(event["done_bytes"]), _bytes(event["total_bytes"])
                return ServerProgress(str(event["server"]), done_bytes, total_bytes)
            case "load":
                return _load(event)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass  # Infinity is a number to Python's JSON
    return None


def _bytes(number: object) -> int:
    size_bytes = int(number)  # type: ignore[call-overload]
    if not 0 <= size_bytes < _TOO_MANY_BYTES:
        raise ValueError(size_bytes)
    return int(size_bytes)


def _load(event: dict[str, Any]) -> ServerLoad:
    failure = event["first_failure"]
    return ServerLoad(
        server=str(event["server"]),
        local_tensors=int(event["local_tensors"]),
        local_bytes=int(event["local_bytes"]),
        sent_tensors=int(event["sent_tensors"]),
        sent_bytes=int(event["sent_bytes"]),
        failures=int(event["failures"]),
        first_failure=failure and f"{failure['tensor']} of {failure['file']}: {failure['reason']}",
    )
