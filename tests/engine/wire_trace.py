"""What GGML_RPC_TRACE wrote, for tests that count: requests, bytes, and round trips in a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """One line; `begin_ns` is when it began."""

    begin_ns: int
    connection: int
    kind: str
    command: str
    number: int
    amount: int
    took_ns: int

    @property
    def end_ns(self) -> int:
        return self.begin_ns + self.took_ns


def read_trace(path: Path) -> list[Event]:
    """The events of the one process that wrote the file; call it when that has ended."""
    head, *lines = path.read_text().splitlines()
    assert head.startswith("mesh-rpc-trace\t1\t")
    events = []
    for line in lines:
        begin, connection, kind, command, *numbers = line.split("\t")
        events.append(Event(int(begin), int(connection), kind, command, *map(int, numbers)))
    return sorted(events, key=lambda event: event.begin_ns)


def count(events: list[Event], kind: str, command: str) -> int:
    return sum(event.kind == kind and event.command == command for event in events)


def decodes(events: list[Event]) -> list[Event]:
    """The batches, each from its begin to its results being there."""
    return [event for event in events if (event.kind, event.command) == ("mark", "decode")]


def within(events: list[Event], begin_ns: int, end_ns: int) -> list[Event]:
    return [event for event in events if begin_ns <= event.begin_ns < end_ns]


def depth(events: list[Event]) -> int:
    """How many round trips follow one another: one whose request had left before the reply to
    another was there costs no time of its own.
    """
    chains: list[tuple[int, int]] = []  # when its reply was there, how many up to it
    for wait in (event for event in events if event.kind == "wait"):
        left_ns = _left_ns(events, wait)
        before = max((length for end_ns, length in chains if end_ns <= left_ns), default=0)
        chains.append((wait.end_ns, before + 1))
    return max((length for _, length in chains), default=0)


def _left_ns(events: list[Event], wait: Event) -> int:
    """When the request that is waited for left."""
    (asked,) = [
        event.begin_ns
        for event in events
        if (event.kind, event.connection, event.number) == ("send", wait.connection, wait.number)
    ]
    return min(
        event.begin_ns
        for event in events
        if event.kind == "write" and event.connection == wait.connection and event.begin_ns >= asked
    )
