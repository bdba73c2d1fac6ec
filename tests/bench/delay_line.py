"""Links with a set delay and rate between engine processes, in a process of its own; what crosses
them is counted there (`rpc_meter`).

One thread, no worker: a thread that waits for Python's lock would be late by milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any

from tests.bench.link_shaper import Pipe, Shaper, Way
from tests.bench.processes import process, said
from tests.bench.rpc_meter import Conversation, Counts, Meter

READ_BYTES = 256 << 10
PR_SET_TIMERSLACK = 29
CONNECT_LIMIT_S = 5.0
EARLY_S = 0.00015  # how late a sleep ends on a virtual machine; the rest is spent looking
FULL_S = 0.001


@dataclass(frozen=True)
class Link:
    """What connects to `start` (`unix:/path`, or `127.0.0.1:0` for any port) reaches `target`.

    `pushes`: what one worker hands to the next, counted as bytes. There both ends wait to be
    connected to.
    """

    start: str
    target: str
    way: Way = field(default_factory=Way)  # in each direction
    pushes: bool = False


class _Question(Enum):
    SO_FAR = "so far"
    IN_ALL = "in all"


class Line:
    """The links of one deployment, as its harness sees them."""

    def __init__(self, pipe: Connection, addresses: tuple[str, ...]) -> None:
        self._pipe = pipe
        self.addresses = addresses

    def counts(self) -> Counts:
        """What has crossed so far."""
        return self._ask(_Question.SO_FAR)

    def final_counts(self) -> Counts:
        """What has crossed once every connection has ended; waits for that."""
        return self._ask(_Question.IN_ALL)

    def _ask(self, question: _Question) -> Counts:
        self._pipe.send(question)
        counts: Counts = said(self._pipe)
        return counts


@contextmanager
def delay_line(*links: Link) -> Iterator[Line]:
    with process(carry, links) as pipe:
        yield Line(pipe, said(pipe))


def carry(pipe: Connection, links: tuple[Link, ...]) -> None:
    """The process: until it is killed or its harness is gone."""
    _be_punctual()
    meter = Meter()
    doors = [_Door(link, meter) for link in links if not link.pushes]
    pushes = [_connect_both(link, meter) for link in links if link.pushes]
    pipe.send(tuple(door.address for door in doors))
    _Loop(pipe, doors, meter, pushes).run()


def _be_punctual() -> None:
    if sys.platform == "linux":
        # Else a sleep ends 0.05 ms late.
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    if hasattr(os, "sched_setscheduler"):
        # A wire does not wait for a core. Without the right to say so, it does.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


class _Door:
    """Where one link begins."""

    def __init__(self, link: Link, meter: Meter) -> None:
        self._link = link
        self._meter = meter
        self._up, self._down = Shaper(link.way), Shaper(link.way)
        family, place = _place(link.start)
        self.socket = socket.socket(family)
        self.socket.setblocking(False)
        self.socket.bind(place)
        self.socket.listen(64)
        self.address = link.start
        if family == socket.AF_INET:
            self.address = "{}:{}".format(*self.socket.getsockname())

    def accept(self) -> list[_End]:
        near, _ = self.socket.accept()
        near.setblocking(False)
        try:
            far = _connect(self._link.target)
        except OSError:
            near.close()  # as the target itself would have refused it
            return []
        if near.family == socket.AF_INET:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        talk = Conversation(self._meter)
        up = _End(near, far, Pipe(self._up), self._meter, talk, is_up=True)
        down = _End(far, near, Pipe(self._down), self._meter, talk, is_up=False)
        return [up, down]


def _connect_both(link: Link, meter: Meter) -> _End:
    source, sink = _connect(link.start), _connect(link.target)
    return _End(source, sink, Pipe(Shaper(link.way)), meter, None, is_up=True)


def _connect(address: str) -> socket.socket:
    family, place = _place(address)
    made = socket.socket(family)
    made.settimeout(CONNECT_LIMIT_S)
    try:
        made.connect(place)
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    if family == socket.AF_INET:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _place(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if address.startswith("unix:"):
        return socket.AF_UNIX, address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    return socket.AF_INET, (host, int(port))


class _End:
    """One direction of one connection, with its sockets."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        pipe: Pipe,
        meter: Meter,
        talk: Conversation | None,
        *,
        is_up: bool,
    ) -> None:
        self.source, self.sink, self.pipe, self.is_up = source, sink, pipe, is_up
        self._meter = meter
        self._talk = talk
        self.has_ended = False  # its source
        self.is_closed = False
        self.is_blocked = False  # its sink takes nothing now

    def read(self) -> None:
        try:
            data = self.source.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.has_ended = True
            return
        self.pipe.put(data, time.perf_counter())
        if self._talk is None:
            self._meter.pushed_bytes += len(data)
        elif self.is_up:
            self._talk.sent(data)

    def write(self) -> None:
        """All that is due."""
        self.is_blocked = False
        while (piece := self.pipe.due(time.perf_counter())) is not None:
            try:
                size = self.sink.send(piece)
            except BlockingIOError:
                self.is_blocked = True
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                    raise
                self.has_ended = self.is_closed = True
                self.pipe.clear()
                return
            if self._talk is not None and not self.is_up:
                self._talk.given(bytes(piece[:size]))
            self.pipe.drop(size)
        if self.has_ended and self.pipe.is_empty:
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)
            self.is_closed = True


class _Loop:
    """I wait for sockets and for pieces that fall due."""

    def __init__(
        self, pipe: Connection, doors: list[_Door], meter: Meter, ends: list[_End]
    ) -> None:
        self._pipe = pipe
        self._doors = {door.socket: door for door in doors}
        self._meter = meter
        self._ends = ends
        self._asked: _Question | None = None

    def run(self) -> None:
        while True:
            now = time.perf_counter()
            sources = {
                end.source: end for end in self._ends if not end.has_ended and end.pipe.takes(now)
            }
            watched: list[Any] = [self._pipe, *self._doors, *sources]
            blocked = [end.sink for end in self._ends if end.is_blocked]
            readable = select.select(watched, blocked, [], self._wait_s(now, sources))[0]
            if not self._dispatch(readable, sources):
                return
            self._write(sources)
            if self._asked is _Question.SO_FAR or (self._asked and not self._ends):
                self._pipe.send(self._meter.counts())
                self._asked = None

    def _wait_s(self, now: float, sources: dict[socket.socket, _End]) -> float | None:
        moments = [end.pipe.next_s() for end in self._ends if not end.is_blocked]
        if len(sources) < sum(not end.has_ended for end in self._ends):
            moments.append(now + FULL_S)  # nothing else tells when a full pipe takes more
        due_s = min(moments, default=math.inf)
        return None if due_s == math.inf else max(0.0, due_s - now - EARLY_S)

    def _dispatch(self, readable: list[Any], sources: dict[socket.socket, _End]) -> bool:
        for one in readable:
            if one is self._pipe:
                try:
                    self._asked = self._pipe.recv()
                except EOFError:
                    return False
            elif one in self._doors:
                self._ends += self._doors[one].accept()
            else:
                sources[one].read()
        return True

    def _write(self, sources: dict[socket.socket, _End]) -> None:
        now = time.perf_counter()
        if any(not end.is_up and end.pipe.due(now) is not None for end in self._ends):
            # What its client sent before it had this reply does not lie deeper for it.
            ups = [source for source, end in sources.items() if end.is_up and not end.has_ended]
            for source in select.select(ups, [], [], 0)[0]:
                sources[source].read()
        for end in self._ends:
            if not end.is_closed:
                end.write()
        if any(end.is_closed for end in self._ends):
            self._ends = _without_closed(self._ends)


def _without_closed(ends: list[_End]) -> list[_End]:
    """A connection is kept until both of its directions are done."""
    open_sinks = {end.sink for end in ends if not end.is_closed}
    kept = []
    for end in ends:
        if end.is_closed and end.source not in open_sinks:
            end.source.close()
            end.sink.close()
        elif not end.is_closed or end.source in open_sinks:
            kept.append(end)
    return kept
