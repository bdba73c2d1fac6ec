"""One stretch of time, from all files: who did what, what was on the way. Sans-IO."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from meshnode.trace.intervals import Interval, cut, intersect, length, merge, subtract
from meshnode.trace.records import Record, Role
from meshnode.trace.spans import Tally, is_decode

MAX_RECORDS = 50_000
"""Of one file in one scene; the rest is counted, not drawn."""
MAX_BEFORE = 1000
"""Records from before the scene, by which those at its begin are understood."""


@dataclass(frozen=True)
class Stretch:
    """What is looked at; times in ns of CLOCK_REALTIME."""

    begin_ns: int
    end_ns: int


class Clipping:
    """I keep the records of one file that fall into a stretch, and some from before: what goes on
    at its begin was asked for then."""

    def __init__(self, file: int, role: Role, start_ns: int, stretch: Stretch) -> None:
        """`start_ns`: t = 0 of the file, by the client's clock."""
        self.file = file
        self.role = role
        self.left_out = 0
        self.start_ns = start_ns
        self._end_ns = stretch.end_ns - start_ns
        self._begin_ns = stretch.begin_ns - start_ns
        self._before: deque[Record] = deque(maxlen=MAX_BEFORE)
        self._within: list[Record] = []

    @property
    def records(self) -> list[Record]:
        return [*self._before, *self._within]

    def take(self, record: Record) -> None:
        if record.t_ns > self._end_ns:
            return
        if record.end_ns < self._begin_ns:
            self._before.append(record)
        elif len(self._within) < MAX_RECORDS:
            self._within.append(record)
        else:
            self.left_out += 1


@dataclass(frozen=True)
class Event:
    """A record in its place. `conn` is the client's number; None for a server's connection that is
    none of the client's, and for marks. Times in ns since the stretch's begin."""

    file: int
    role: Role
    conn: int | None
    record: Record
    begin_ns: int

    @property
    def end_ns(self) -> int:
        return self.begin_ns + self.record.dur_ns


@dataclass(frozen=True)
class Hop:
    """A request's way there and, where it had an answer, back. Times in ns since the begin."""

    conn: int
    seq: int
    file: int
    command: str
    sent_ns: int
    served_ns: int
    answered_ns: int | None
    replied_ns: int | None

    @property
    def there_ns(self) -> int:
        return self.served_ns - self.sent_ns

    @property
    def back_ns(self) -> int | None:
        if self.answered_ns is None or self.replied_ns is None:
            return None
        return self.replied_ns - self.answered_ns


@dataclass(frozen=True)
class Split:
    """Where the time went, in ns. The client waits while a worker computes, or while nobody does:
    then something is on its way. Without the workers' traces the two cannot be told apart."""

    client_ns: int
    workers_ns: int
    wire_ns: int


@dataclass(frozen=True)
class Scene:
    stretch: Stretch
    events: tuple[Event, ...]  # in the order of time
    hops: tuple[Hop, ...]
    left_out: int

    @property
    def length_ns(self) -> int:
        return self.stretch.end_ns - self.stretch.begin_ns

    @property
    def has_servers(self) -> bool:
        return any(event.role is Role.SERVER for event in self.events)

    def tally(self) -> Tally:
        """What the client began within the stretch."""
        tally = Tally()
        for event in self.events:
            if event.role is Role.CLIENT and event.begin_ns >= 0:
                tally.add(event.record)
        return tally

    def round_trips(self) -> tuple[Event, ...]:
        """Each time that the client waited for an answer."""
        return tuple(
            event
            for event in self.events
            if event.role is Role.CLIENT and event.record.event == "wait"
        )

    def waits(self) -> list[Interval]:
        return merge(cut(_times(self.events, Role.CLIENT, "wait"), 0, self.length_ns))

    def split(self) -> Split:
        waits = self.waits()
        workers_ns = length(intersect(waits, self._computed()))
        waited_ns = length(waits)
        return Split(self.length_ns - waited_ns, workers_ns, waited_ns - workers_ns)

    def _computed(self) -> list[Interval]:
        """When any server worked; one that waits for a push does not, though it is at a request."""
        by_file: dict[int, list[Event]] = {}
        for event in self.events:
            by_file.setdefault(event.file, []).append(event)
        computed: list[Interval] = []
        for events in by_file.values():
            served = cut(_times(events, Role.SERVER, "serve"), 0, self.length_ns)
            computed += subtract(served, _times(events, Role.SERVER, "take"))
        return merge(computed)


def _times(events: Iterable[Event], role: Role, name: str) -> list[Interval]:
    return [
        (event.begin_ns, event.end_ns)
        for event in events
        if event.role is role and event.record.event == name
    ]


def make_scene(
    stretch: Stretch, clippings: Sequence[Clipping], pairs: Mapping[tuple[int, int], int]
) -> Scene:
    """`pairs`: which of the client's connections a server's (file, number) is."""
    raw = [event for clipping in clippings for event in _events(stretch, clipping, pairs)]
    hops = _hops(raw)
    ends = {(hop.conn, hop.seq): hop.replied_ns for hop in hops if hop.replied_ns is not None}
    length_ns = stretch.end_ns - stretch.begin_ns
    ended = (_ended_with_its_answer(event, ends) for event in raw)
    events = [event for event in ended if _is_within(event, length_ns)]
    events.sort(key=lambda event: (event.begin_ns, not is_decode(event.record), event.role.value))
    shown = [hop for hop in hops if hop.served_ns >= 0 or (hop.replied_ns or -1) >= 0]
    left_out = sum(clipping.left_out for clipping in clippings)
    return Scene(stretch, tuple(events), tuple(shown), left_out)


def _is_within(event: Event, length_ns: int) -> bool:
    if event.record.dur_ns:
        return event.begin_ns < length_ns and event.end_ns > 0
    return 0 <= event.begin_ns <= length_ns


def _ended_with_its_answer(event: Event, ends: Mapping[tuple[int, int], int]) -> Event:
    """A server that was put aside as it answered notes the end of its work only later."""
    if event.role is not Role.SERVER or event.conn is None:
        return event
    replied_ns = ends.get((event.conn, event.record.seq), event.end_ns)
    if event.record.event == "serve" and event.begin_ns <= replied_ns < event.end_ns:
        record = event.record._replace(dur_ns=replied_ns - event.begin_ns)
        return replace(event, record=record)
    if event.record.event == "reply":
        return replace(event, begin_ns=min(event.begin_ns, replied_ns))
    return event


def _events(
    stretch: Stretch, clipping: Clipping, pairs: Mapping[tuple[int, int], int]
) -> Iterable[Event]:
    role = clipping.role
    offset_ns = clipping.start_ns - stretch.begin_ns
    for record in clipping.records:
        conn: int | None = record.conn
        if role is Role.SERVER:
            conn = pairs.get((clipping.file, record.conn))
        elif record.event == "mark":
            conn = None
        yield Event(clipping.file, role, conn, record, record.t_ns + offset_ns)


def _hops(events: Iterable[Event]) -> list[Hop]:
    """Requests that were sent and served, and their answers."""
    steps: dict[tuple[str, int, int], Event] = {}
    for event in events:
        if event.conn is not None:
            name = f"{event.role.value} {event.record.event}"
            steps.setdefault((name, event.conn, event.record.seq), event)
    hops = []
    for (name, conn, seq), served in steps.items():
        sent = steps.get(("client send", conn, seq))
        if name != "server serve" or sent is None:
            continue
        replied = steps.get(("client reply", conn, seq))
        answered = steps.get(("server reply", conn, seq))
        left_ns = answered.begin_ns if answered else served.end_ns
        hops.append(
            Hop(
                conn,
                seq,
                served.file,
                served.record.command,
                sent.begin_ns,
                served.begin_ns,
                min(left_ns, replied.begin_ns) if replied else None,
                replied.begin_ns if replied else None,
            )
        )
    return sorted(hops, key=lambda hop: (hop.sent_ns, hop.conn))
