"""A scene as rows of bars: what both drawings show. Sans-IO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from meshnode.trace.intervals import Interval, merge, subtract
from meshnode.trace.records import Role
from meshnode.trace.scene import Event, Scene
from meshnode.trace.wording import bytes_text, ms_text


class Kind(Enum):
    """What a bar stands for. A row shows the first of them that fits where several do."""

    SEND = "send"  # a request handed over
    PUSH = "push"  # a worker hands activations to the next
    TAKE = "take"  # a worker waits for them
    SERVE = "serve"  # a worker works on a request
    WORK = "work"  # the client works: it does not wait
    WRITE = "write"  # a system call that writes
    OTHER = "other"  # an event this mesh does not know
    WAIT = "wait"  # the client waits for an answer
    THERE = "there"  # a request is on its way
    BACK = "back"  # an answer is


@dataclass(frozen=True)
class Bar:
    """In ns since the scene's begin. `text`: what it is, in words."""

    kind: Kind
    begin_ns: int
    end_ns: int
    text: str


@dataclass(frozen=True)
class Row:
    """`conn`: the client's connection it belongs to; None for the client's own row."""

    label: str
    bars: tuple[Bar, ...]
    conn: int | None = None
    is_server: bool = False


_CLIENT_KINDS = {"send": Kind.SEND, "write": Kind.WRITE, "wait": Kind.WAIT}
_SERVER_KINDS = {"serve": Kind.SERVE, "take": Kind.TAKE, "push": Kind.PUSH}
_UNDRAWN = {"open", "reply", "mark"}


def make_rows(scene: Scene, endpoints: Mapping[int, str], names: Sequence[str]) -> list[Row]:
    """The client, then each of its connections with what is on the way there and the server behind
    it, then connections of servers that are none of the client's.

    `endpoints` of the client's connections; `names` of the files, by their index.
    """
    client = [event for event in scene.events if event.role is Role.CLIENT]
    rows = [Row("client", tuple(_work(scene)))] if client else []
    servers: dict[tuple[int, int | None, int], list[Event]] = {}
    takes: dict[int, list[Interval]] = {}
    conns: dict[int, list[Event]] = {}
    for event in scene.events:
        if event.role is Role.SERVER:
            key = (event.file, event.conn, event.record.conn if event.conn is None else 0)
            servers.setdefault(key, []).append(event)
            if event.record.event == "take":
                takes.setdefault(event.file, []).append((event.begin_ns, event.end_ns))
        elif event.conn is not None:
            conns.setdefault(event.conn, []).append(event)
    here = {conn for _, conn, _ in servers if conn is not None}
    for conn in sorted(conns.keys() | here):
        label = f"{conn} {endpoints.get(conn, '')}".strip()
        rows += _filled(Row(label, _bars(conns.get(conn, []), _CLIENT_KINDS), conn))
        rows += _filled(Row("  on the way", tuple(_hop_bars(scene, conn)), conn))
        for (file, its_conn, _), events in servers.items():
            if its_conn == conn:
                bars = _bars(events, _SERVER_KINDS, takes.get(file, ()))
                rows += _filled(Row(f"  {names[file]}", bars, conn, True))
    for (file, its_conn, number), events in servers.items():
        if its_conn is None:
            bars = _bars(events, _SERVER_KINDS, takes.get(file, ()))
            rows += _filled(Row(f"{names[file]} {number}", bars, None, True))
    return rows


def _filled(row: Row) -> list[Row]:
    return [row] if row.bars else []


def _work(scene: Scene) -> Iterable[Bar]:
    waits = scene.waits()
    for begin, end in subtract([(0, scene.length_ns)], waits):
        yield Bar(Kind.WORK, begin, end, f"works {ms_text(end - begin)}")
    for begin, end in waits:
        yield Bar(Kind.WAIT, begin, end, f"waits {ms_text(end - begin)}")


def _bars(
    events: Sequence[Event], kinds: Mapping[str, Kind], takes: Sequence[Interval] = ()
) -> tuple[Bar, ...]:
    bars = [
        Bar(kinds.get(event.record.event, Kind.OTHER), event.begin_ns, event.end_ns, _text(event))
        for event in events
        if event.record.event not in _UNDRAWN
    ]
    return tuple(_without_takes(bars, takes)) if takes else tuple(bars)


def _without_takes(bars: Iterable[Bar], takes: Sequence[Interval]) -> Iterable[Bar]:
    """A server that waits for a push does not compute, though it is at a request."""
    for bar in bars:
        if bar.kind is not Kind.SERVE or bar.begin_ns == bar.end_ns:
            yield bar
            continue
        for begin, end in subtract([(bar.begin_ns, bar.end_ns)], takes):
            yield Bar(Kind.SERVE, begin, end, bar.text)


def _text(event: Event) -> str:
    record = event.record
    parts = [record.event, record.command if record.command != "-" else ""]
    parts += [bytes_text(record.size_bytes)] if record.size_bytes else []
    parts += [ms_text(record.dur_ns)] if record.dur_ns else []
    return " ".join(filter(None, parts))


def _hop_bars(scene: Scene, conn: int) -> Iterable[Bar]:
    for hop in scene.hops:
        if hop.conn != conn:
            continue
        if hop.there_ns > 0:
            text = f"{hop.command} on its way {ms_text(hop.there_ns)}"
            yield Bar(Kind.THERE, hop.sent_ns, hop.served_ns, text)
        back_ns = hop.back_ns
        if hop.answered_ns is not None and hop.replied_ns is not None and back_ns and back_ns > 0:
            text = f"answer to {hop.command} on its way {ms_text(back_ns)}"
            yield Bar(Kind.BACK, hop.answered_ns, hop.replied_ns, text)


def thin(bars: Iterable[Bar], length_ns: int, gap_ns: int) -> list[Bar]:
    """The bars within the scene, with those of a kind that no eye could tell apart as one."""
    by_kind: dict[Kind, list[Bar]] = {}
    for bar in bars:
        if bar.begin_ns <= length_ns and bar.end_ns >= 0:
            by_kind.setdefault(bar.kind, []).append(bar)
    thinned = []
    for kind, some in by_kind.items():
        some.sort(key=lambda bar: bar.begin_ns)
        at = 0
        for begin, end in merge(((bar.begin_ns, bar.end_ns) for bar in some), gap_ns):
            first = at
            while at < len(some) and some[at].begin_ns <= end:
                at += 1
            text = some[first].text if at - first == 1 else f"{at - first} × {kind.value}"
            thinned.append(Bar(kind, max(begin, 0), min(end, length_ns), text))
    return thinned
