"""What llama-server reports of a load: GGML_RPC_MESH_REPORT's JSON lines. Sans-IO.

The file is written by the patched engine while we read it, so the last line may be half there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadProgress:
    done_bytes: int
    total_bytes: int


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
        self.loads: tuple[ServerLoad, ...] = ()

    def receive(self, data: bytes) -> LoadProgress | None:
        """The latest progress in `data`, if any. Lines that make no sense are passed over."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        latest = None
        for line in lines:
            event = _parse(line)
            if isinstance(event, LoadProgress):
                latest = event
            elif event is not None:
                self.loads = (*self.loads, event)
        return latest


def _parse(line: bytes) -> LoadProgress | ServerLoad | None:
    try:
        event = json.loads(line)
        if event["event"] == "progress":
            return LoadProgress(int(event["done_bytes"]), int(event["total_bytes"]))
        if event["event"] == "load":
            return _load(event)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass  # Infinity is a number to Python's JSON
    return None


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
