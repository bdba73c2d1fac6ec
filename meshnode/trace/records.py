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

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

MAGIC = b"mesh-rpc-trace"
VERSION = b"1"
MAX_LINE_BYTES = 4096
MAX_WORD_CHARS = 120

_FIELDS = 7
_MAX_DIGITS = 18
_MAX_CLOCK_DIGITS = 19


class NotATrace(ValueError):
    """What completes `FILE …` for the user."""


class Role(Enum):
    CLIENT = "client"
    SERVER = "server"


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


class _BadNumber(ValueError):
    """A field that must be a number is none."""


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
    try:
        role = Role(_word(fields[2]))
        return Header(role, _number(fields[3]), _number(fields[4], _MAX_CLOCK_DIGITS))
    except ValueError:
        raise NotATrace("is no trace: its first line makes no sense") from None


def parse_record_untrusted(line: bytes) -> Record | None:
    """None for a line that is no event."""
    fields = line.split(b"\t", _FIELDS)
    if len(fields) < _FIELDS or len(line) > MAX_LINE_BYTES or not fields[2]:
        return None
    try:
        return Record(
            _number(fields[0]),
            _number(fields[1]),
            _word(fields[2]),
            _word(fields[3]),
            _number(fields[4]),
            _number(fields[5]),
            _number(fields[6]),
        )
    except _BadNumber:
        return None


def _number(field: bytes, max_digits: int = _MAX_DIGITS) -> int:
    if field.isdigit() and len(field) <= max_digits:
        return int(field)
    if field == b"-":
        return 0
    raise _BadNumber


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
