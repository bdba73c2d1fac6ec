"""What GGML_RPC_TRACE wrote, for tests that count: requests, bytes, and round trips in a row."""

from __future__ import annotations

from pathlib import Path

from meshnode.trace.records import Record, parse_header_untrusted, parse_record_untrusted


def read_trace(path: Path) -> list[Record]:
    """The events of the one process that wrote the file; call it when that has ended."""
    head, *lines = path.read_bytes().splitlines()
    parse_header_untrusted(head)
    records = [record for line in lines if (record := parse_record_untrusted(line))]
    assert len(records) == len(lines), "a line that is no event"
    return sorted(records, key=lambda record: record.t_ns)


def count(events: list[Record], kind: str, command: str) -> int:
    return sum(event.event == kind and event.command == command for event in events)


def decodes(events: list[Record]) -> list[Record]:
    """The batches, each from its begin to its results being there."""
    return [event for event in events if (event.event, event.command) == ("mark", "decode")]


def within(events: list[Record], begin_ns: int, end_ns: int) -> list[Record]:
    return [event for event in events if begin_ns <= event.t_ns < end_ns]


def depth(events: list[Record]) -> int:
    """How many round trips follow one another: one whose request had left before the reply to
    another was there costs no time of its own.
    """
    chains: list[tuple[int, int]] = []  # when its reply was there, how many up to it
    for wait in (event for event in events if event.event == "wait"):
        left_ns = _left_ns(events, wait)
        before = max((length for end_ns, length in chains if end_ns <= left_ns), default=0)
        chains.append((wait.end_ns, before + 1))
    return max((length for _, length in chains), default=0)


def _left_ns(events: list[Record], wait: Record) -> int:
    """When the request that is waited for left."""
    (asked,) = [
        event.t_ns
        for event in events
        if (event.event, event.conn, event.seq) == ("send", wait.conn, wait.seq)
    ]
    return min(
        event.t_ns
        for event in events
        if event.event == "write" and event.conn == wait.conn and event.t_ns >= asked
    )
