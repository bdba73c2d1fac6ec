"""A scene as text that fits a terminal of 100 columns. Sans-IO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meshnode.trace.axis import ticks
from meshnode.trace.records import Role
from meshnode.trace.rows import Bar, Kind, Row
from meshnode.trace.scene import Event, Scene
from meshnode.trace.wording import bytes_text, ms_number, ms_text

WIDTH = 100
LABEL_WIDTH = 26
BAR_WIDTH = WIDTH - LABEL_WIDTH - 2
MAX_LISTED = 60

GLYPHS = {
    Kind.SEND: "|",
    Kind.PUSH: "^",
    Kind.TAKE: "~",
    Kind.SERVE: "█",
    Kind.WORK: "█",
    Kind.WRITE: "w",
    Kind.OTHER: "?",
    Kind.WAIT: "·",
    Kind.THERE: ">",
    Kind.BACK: "<",
}
LEGEND = {
    Kind.WORK: "█ works",
    Kind.SERVE: "█ works",
    Kind.WAIT: "· waits",
    Kind.SEND: "| sends a request",
    Kind.WRITE: "w writes",
    Kind.THERE: "> request on its way",
    Kind.BACK: "< answer on its way",
    Kind.TAKE: "~ waits for a push",
    Kind.PUSH: "^ pushes",
    Kind.OTHER: "? another event",
}
_TICKS = (Kind.PUSH, Kind.SEND)
_AXIS_LABELS = 7


def draw_text(scene: Scene, rows: Sequence[Row]) -> list[str]:
    lines = [_axis(scene.length_ns)]
    for row in rows:
        lines.append(f"{fit(row.label, LABEL_WIDTH)}  {_bars(row.bars, scene.length_ns)}".rstrip())
    used = {bar.kind for row in rows for bar in row.bars}
    words = dict.fromkeys(words for kind, words in LEGEND.items() if kind in used)
    return [*lines, *_wrap("   ".join(words), "   ", LABEL_WIDTH + 2)]


def fit(label: str, width: int) -> str:
    """As wide as `width`; of what is longer, the end says more: paths begin alike."""
    if len(label) > width:
        head = label[: width // 3]
        label = head + "…" + label[len(label) - (width - len(head) - 1) :]
    return label.ljust(width)


def _axis(length_ns: int) -> str:
    cells = [" "] * (BAR_WIDTH + 12)
    free_from = 0
    for at_ns, label in ticks(length_ns, _AXIS_LABELS):
        column = at_ns * BAR_WIDTH // max(1, length_ns)
        if column >= free_from and column + len(label) <= BAR_WIDTH:
            cells[column : column + len(label)] = label
            free_from = column + len(label) + 1
    return (fit("ms", LABEL_WIDTH) + "  " + "".join(cells)).rstrip()


def _bars(bars: Iterable[Bar], length_ns: int) -> str:
    filled: dict[Kind, list[float]] = {}
    for bar in bars:
        _fill(filled.setdefault(bar.kind, [0.0] * BAR_WIDTH), bar, max(1, length_ns))
    cells = [_widest(filled, column) for column in range(BAR_WIDTH)]
    for kind in _TICKS:
        columns = [column for column, share in enumerate(filled.get(kind, ())) if share]
        if len(columns) <= BAR_WIDTH // 3:  # more would hide all else
            for column in columns:
                cells[column] = GLYPHS[kind]
    return "".join(cells)


def _fill(columns: list[float], bar: Bar, length_ns: int) -> None:
    """Adds to each column the share of it that the bar takes; a trace of what takes no time."""
    first = max(0, bar.begin_ns) * BAR_WIDTH / length_ns
    last = min(length_ns, bar.end_ns) * BAR_WIDTH / length_ns
    if last < 0 or first > BAR_WIDTH:
        return
    for column in range(min(BAR_WIDTH - 1, int(first)), min(BAR_WIDTH - 1, int(last)) + 1):
        share = min(last, column + 1) - max(first, column)
        if share > 0 or bar.begin_ns == bar.end_ns:
            columns[column] += max(share, 1e-6)


def _widest(filled: dict[Kind, list[float]], column: int) -> str:
    share, kind = max(
        ((columns[column], kind) for kind, columns in filled.items()),
        key=lambda pair: pair[0],
        default=(0.0, Kind.OTHER),
    )
    return GLYPHS[kind] if share else " "


def _wrap(text: str, separator: str, indent: int) -> list[str]:
    lines = [""]
    for word in text.split(separator):
        longer = f"{lines[-1]}{separator}{word}" if lines[-1] else word
        if indent + len(longer) > WIDTH and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return [" " * indent + line for line in lines if line]


def describe_split(scene: Scene) -> str:
    split, whole = scene.split(), max(1, scene.length_ns)

    def share(time_ns: int) -> str:
        return f"{ms_text(time_ns)} ({time_ns / whole:.0%})"

    if not scene.has_servers:
        return (
            f"the client works {share(split.client_ns)} and waits {share(split.wire_ns)} for the "
            "workers and the wire"
        )
    return (
        f"the client works {share(split.client_ns)}; it waits {share(split.workers_ns)} while "
        f"workers compute and {share(split.wire_ns)} for the wire"
    )


def list_events(events: Sequence[Event], scene: Scene, names: Sequence[str]) -> list[str]:
    """What happened, in order, up to `MAX_LISTED` lines. `names` of the files, by their index."""
    there = {(hop.conn, hop.seq): hop.there_ns for hop in scene.hops}
    lines = [
        f"{'ms':>9}  {'who':<24}  {'what':<6} {'command':<20} {'bytes':>9}  {'took ms':>8}"
        f"  {'on its way':>10}"
    ]
    for event in events[:MAX_LISTED]:
        lines.append(_listed(event, names).rstrip())
        if event.record.event == "serve" and event.conn is not None:
            there_ns = there.get((event.conn, event.record.seq))
            arrived = "" if there_ns is None else ms_number(there_ns)
            lines[-1] = f"{lines[-1]:<84}  {arrived:>10}".rstrip()
    if len(events) > MAX_LISTED:
        lines.append(f"{'…':>9}  and {len(events) - MAX_LISTED:,} more events")
    return lines


def _listed(event: Event, names: Sequence[str]) -> str:
    record = event.record
    who = "client" if event.role is Role.CLIENT else names[event.file]
    if event.conn is not None:
        who = f"{event.conn} {who}"
    size = bytes_text(record.size_bytes) if record.size_bytes and record.event != "mark" else ""
    took = ms_number(record.dur_ns) if record.dur_ns else ""
    return (
        f"{ms_number(event.begin_ns):>9}  {fit(who, 24)}  {fit(record.event, 6)} "
        f"{fit(record.command, 20)} {size:>9}  {took:>8}"
    )
