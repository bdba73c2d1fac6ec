"""The lines of a trace, as the patched engine writes them to `GGML_RPC_TRACE`. Sans-IO.

Tab-separated text. The first line is the header:

    mesh-rpc-trace  1  <client|server>  <pid>  <CLOCK_REALTIME in ns at t = 0>

then one line an event, with times in ns since t = 0. What has a duration begins at its time, and
its line is written at its end; so lines are not in the order of their times.

    t  connection  event  command  number of the request  bytes  duration

A hyphen in a number's place is a 0. Events and commands that we do not know are kept as they are.
A file that several runs were appended to has a header for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

MAGIC = b"mesh-rpc-trace"
VERSION = b"1"
MAX_LINE_BYTES = 4096
MAX_WORD_CHARS = 120

_NUMBER = rb"(\d{1,18}|-)"
_TIME = rb"(-?\d{1,18}|-)"  # the first event may be a little older than t = 0
_RECORD = re.compile(
    rb"\t".join([_TIME, _NUMBER, rb"([^\t]+)", rb"([^\t]*)", _NUMBER, _NUMBER, _NUMBER])
    + rb"(?:\t.*)?",
    re.DOTALL,
).fullmatch
_CLOCK = re.compile(rb"\d{1,19}").fullmatch


class NotATrace(ValueError):
    """What completes `FILE …` for the user."""


class Role(Enum):
    CLIENT = "client"
    SERVER = "server"


_ROLES = {role.value.encode(): role for role in Role}


@dataclass(frozen=True)
class Header:
    """`start_ns`: CLOCK_REALTIME at t = 0, by which the files of one machine are aligned."""

    role: Role
    pid: int
    start_ns: int


class Record(NamedTuple):
    """One event; a tuple since a file has millions."""

    t_ns: int
    conn: int
    event: str
    command: str
    seq: int
    size_bytes: int
    dur_ns: int

    @property
    def end_ns(self) -> int:
        return self.t_ns + self.dur_ns


def parse_header_untrusted(line: bytes) -> Header:
    """Raises `NotATrace`."""
    fields = line.split(b"\t")
    if fields[0] != MAGIC or len(fields) < 5:
        raise NotATrace("is no trace: it does not begin as the files that GGML_RPC_TRACE names do")
    if fields[1] != VERSION:
        raise NotATrace(
            f"is a trace of version {_word(fields[1])}, this mesh reads version 1: use the mesh "
            "that comes with the engine that wrote it"
        )
    role = _ROLES.get(fields[2])
    if role is None or not _CLOCK(fields[3]) or not _CLOCK(fields[4]):
        raise NotATrace("is no trace: its first line makes no sense")
    return Header(role, int(fields[3]), int(fields[4]))


def parse_record_untrusted(line: bytes) -> Record | None:
    """None for a line that is no event. The time of a large file goes here, hence the one pattern
    for all of a line."""
    found = _RECORD(line)
    if found is None or len(line) > MAX_LINE_BYTES:
        return None
    t_ns, conn, event, command, seq, size_bytes, dur_ns = found.groups()
    return Record(
        0 if t_ns == b"-" else int(t_ns),
        0 if conn == b"-" else int(conn),
        _word(event),
        _word(command),
        0 if seq == b"-" else int(seq),
        0 if size_bytes == b"-" else int(size_bytes),
        0 if dur_ns == b"-" else int(dur_ns),
    )


@lru_cache(maxsize=4096)
def _word(field: bytes) -> str:
    """Text that can be shown on any terminal: no control character comes through."""
    text = field[: 4 * MAX_WORD_CHARS].decode("utf-8", "replace")[:MAX_WORD_CHARS]
    return "".join(char if char.isprintable() else "�" for char in text)


class TraceReader:
    """I turn a file's bytes, as they come, into headers and events. My memory is bounded."""

    def __init__(self) -> None:
        self.runs = 0
        self.broken_lines = 0
        self._pending = b""
        self._is_overlong = False  # what is pending is the rest of a line that was given up

    @property
    def is_cut_off(self) -> bool:
        """Whether the last line has no end: it was being written, or the file was cut."""
        return self._is_overlong or bool(self._pending)

    def receive(self, data: bytes) -> Iterator[Header | Record]:
        """Raises `NotATrace` when the file does not begin with a header."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if self._is_overlong and lines:
            del lines[0]
            self.broken_lines += 1
            self._is_overlong = False
        if len(self._pending) > MAX_LINE_BYTES:
            if not self.runs and not lines:
                parse_header_untrusted(self._pending)
            self._pending, self._is_overlong = b"", True
        for line in lines:
            if line.startswith(MAGIC) or not self.runs:
                header = parse_header_untrusted(line)
                self.runs += 1
                yield header
            elif record := parse_record_untrusted(line):
                yield record
            else:
                self.broken_lines += 1

    def finish(self) -> None:
        """The file is at its end. Raises `NotATrace` if it held no header."""
        if self.runs:
            return
        if self._pending:
            parse_header_untrusted(self._pending)
        raise NotATrace(
            "is empty: the engine writes to it once a second, and only a patched one does "
            "(`mesh engine build`)"
        )
