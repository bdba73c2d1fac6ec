"""A scene as one SVG file: nothing is fetched, light and dark follow the reader's. Sans-IO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from meshnode.trace.axis import ticks
from meshnode.trace.rows import Bar, Kind, Row, thin
from meshnode.trace.scene import Hop, Scene
from meshnode.trace.text import fit

WIDTH = 1000
LEFT = 200
RIGHT = 20
TOP = 64
ROW_HEIGHT = 26
BAR_HEIGHT = 16
LEGEND_HEIGHT = 20
MAX_HOP_LINES = 400
_LABEL_CHARS = 27
_LEGEND_WORDS = {
    Kind.WORK: "client works",
    Kind.SERVE: "worker computes",
    Kind.WAIT: "client waits",
    Kind.SEND: "request sent",
    Kind.WRITE: "system call that writes",
    Kind.TAKE: "worker waits for a push",
    Kind.PUSH: "worker pushes",
    Kind.OTHER: "another event",
}
_STYLE = """
svg { color-scheme: light dark; background: #fff; font: 12px ui-sans-serif, system-ui, sans-serif; }
text { fill: #24292f } .dim { fill: #57606a } .title { font-size: 15px; font-weight: 600 }
.grid { stroke: #d0d7de } .lane { fill: #f6f8fa } .hop { stroke: #8250df; stroke-opacity: .55 }
.work { fill: #0969da } .serve { fill: #1a7f37 } .wait { fill: #d8dee4 } .send { fill: #cf222e }
.write { fill: #54aeff } .take { fill: #d4a72c } .push { fill: #bf3989 } .other { fill: #9a6700 }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117 } text { fill: #e6edf3 } .dim { fill: #9198a1 }
.grid { stroke: #30363d } .lane { fill: #161b22 } .hop { stroke: #bc8cff }
.work { fill: #4493f8 } .serve { fill: #3fb950 } .wait { fill: #3d444d } .send { fill: #f85149 }
.write { fill: #1f6feb } .take { fill: #d29922 } .push { fill: #db61a2 } .other { fill: #bb8009 }
}
"""
_ORDER = (
    *(Kind.WAIT, Kind.WORK, Kind.SERVE, Kind.TAKE, Kind.WRITE, Kind.PUSH, Kind.OTHER, Kind.SEND),
)


def draw_svg(scene: Scene, rows: Sequence[Row], title: str, subtitle: str) -> str:
    lanes = [row for row in rows if any(bar.kind in _ORDER for bar in row.bars)]
    bottom = TOP + ROW_HEIGHT * len(lanes)
    used = {bar.kind for row in lanes for bar in row.bars}
    height = bottom + 44 + 2 * LEGEND_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="12" y="24">{escape(title)}</text>',
        f'<text class="dim" x="12" y="44">{escape(subtitle)}</text>',
        *(_lane(index, row) for index, row in enumerate(lanes)),
        *_grid(scene.length_ns, bottom),
        *(shape for index, row in enumerate(lanes) for shape in _bars(index, row, scene)),
        *_hop_lines(scene, lanes),
        *_legend(used, bool(scene.hops), bottom + 48),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _x(at_ns: int, length_ns: int) -> float:
    inside = min(max(at_ns, 0), length_ns)
    return LEFT + inside * (WIDTH - LEFT - RIGHT) / max(1, length_ns)


def _lane(index: int, row: Row) -> str:
    y = TOP + ROW_HEIGHT * index
    return (
        f'<rect class="lane" x="{LEFT}" y="{y + 3}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{ROW_HEIGHT - 6}"/>'
        f'<text x="{24 if row.is_server else 12}" y="{y + 17}">'
        f"{escape(fit(row.label.strip(), _LABEL_CHARS).rstrip())}</text>"
    )


def _grid(length_ns: int, bottom: int) -> Iterator[str]:
    marks = ticks(length_ns, 10)
    for at_ns, label in marks:
        x = _x(at_ns, length_ns)
        yield f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        unit = " ms" if (at_ns, label) == marks[-1] else ""
        anchor = "end" if x > WIDTH - 60 else "middle"
        yield (
            f'<text class="dim" x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">'
            f"{label}{unit}</text>"
        )


def _bars(index: int, row: Row, scene: Scene) -> Iterator[str]:
    gap_ns = scene.length_ns // (2 * WIDTH)
    bars = thin((bar for bar in row.bars if bar.kind in _ORDER), scene.length_ns, gap_ns)
    for bar in sorted(bars, key=lambda bar: _ORDER.index(bar.kind)):
        yield _bar(index, bar, scene.length_ns)


def _bar(index: int, bar: Bar, length_ns: int) -> str:
    first, last = _x(bar.begin_ns, length_ns), _x(bar.end_ns, length_ns)
    inset = (ROW_HEIGHT - BAR_HEIGHT) / 2 if bar.kind is not Kind.WAIT else ROW_HEIGHT / 2 - 3
    y, tall = TOP + ROW_HEIGHT * index + inset, ROW_HEIGHT - 2 * inset
    wide = max(last - first, 1.5)
    return (
        f'<rect class="{bar.kind.value}" x="{first:.2f}" y="{y:g}" width="{wide:.2f}" '
        f'height="{tall:g}"><title>{escape(bar.text)}</title></rect>'
    )


def _hop_lines(scene: Scene, lanes: Sequence[Row]) -> Iterator[str]:
    clients = {row.conn: at for at, row in enumerate(lanes) if not row.is_server}
    servers = {row.conn: at for at, row in enumerate(lanes) if row.is_server}
    for hop in scene.hops[:MAX_HOP_LINES]:
        if hop.conn in clients and hop.conn in servers:
            upper, lower = _middle(clients[hop.conn]), _middle(servers[hop.conn])
            yield from _hop_line(hop, scene.length_ns, upper, lower)


def _middle(lane: int) -> float:
    return TOP + ROW_HEIGHT * (lane + 0.5)


def _hop_line(hop: Hop, length_ns: int, upper: float, lower: float) -> Iterator[str]:
    ways = [(hop.sent_ns, upper, hop.served_ns, lower)]
    if hop.answered_ns is not None and hop.replied_ns is not None:
        ways.append((hop.answered_ns, lower, hop.replied_ns, upper))
    for begin_ns, from_y, end_ns, to_y in ways:
        yield (
            f'<line class="hop" x1="{_x(begin_ns, length_ns):.2f}" y1="{from_y:g}" '
            f'x2="{_x(end_ns, length_ns):.2f}" y2="{to_y:g}"/>'
        )


def _legend(used: set[Kind], has_hops: bool, y: int) -> Iterator[str]:
    entries = [(kind.value, words) for kind, words in _LEGEND_WORDS.items() if kind in used]
    x = 12
    for name, words in [*entries, *([("hop", "on the way")] if has_hops else [])]:
        wide = 31 + 7 * len(words)
        if x + wide > WIDTH:
            x, y = 12, y + LEGEND_HEIGHT
        if name == "hop":
            yield f'<line class="hop" x1="{x}" y1="{y + 1}" x2="{x + 12}" y2="{y - 9}"/>'
        else:
            yield f'<rect class="{name}" x="{x}" y="{y - 10}" width="12" height="12"/>'
        yield f'<text x="{x + 17}" y="{y}">{words}</text>'
        x += wide
