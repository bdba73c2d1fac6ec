"""A plain line chart as SVG: logarithmic axes, a legend, the same bytes for the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 46
COLOURS = ("#1f5fa8", "#c2571a", "#3b7d3b")
INK, FAINT = "#333333", "#dddddd"
TICK = 'font-size="11" fill="#333333"'

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """lines: by what the legend says. limit: a dashed line, with what is said of it."""

    title: str
    x_title: str
    y_title: str
    lines: Mapping[str, Points]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    limit: tuple[float, str] | None = None


def svg(charts: Sequence[Chart]) -> str:
    """The charts side by side."""
    width = WIDTH * len(charts)
    parts = [_chart(chart, WIDTH * number) for number, chart in enumerate(charts)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
        f'viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>\n'
    )
    return head + "".join(parts) + "</svg>\n"


def _chart(chart: Chart, left: int) -> str:
    def x(value: float) -> float:
        return left + LEFT + _place(value, chart.x_ticks) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - _place(value, chart.y_ticks) * (HEIGHT - TOP - BOTTOM)

    x_0, x_1 = x(chart.x_ticks[0]), x(chart.x_ticks[-1])
    y_0, y_1 = y(chart.y_ticks[0]), y(chart.y_ticks[-1])
    parts = [_text(left + WIDTH / 2, 18, chart.title, 'font-size="13" text-anchor="middle"')]
    for tick in chart.x_ticks:
        parts.append(_line(x(tick), y_0, x(tick), y_1, FAINT))
        parts.append(_text(x(tick), y_0 + 15, f"{tick:g}", f'{TICK} text-anchor="middle"'))
    for tick in chart.y_ticks:
        parts.append(_line(x_0, y(tick), x_1, y(tick), FAINT))
        parts.append(_text(x_0 - 5, y(tick) + 4, f"{tick:g}", f'{TICK} text-anchor="end"'))
    middle, at = (y_0 + y_1) / 2, left + 14
    parts.append(_text((x_0 + x_1) / 2, y_0 + 34, chart.x_title, f'{TICK} text-anchor="middle"'))
    turned = f'{TICK} text-anchor="middle" transform="rotate(-90 {at} {middle:.1f})"'
    parts.append(_text(at, middle, chart.y_title, turned))
    if chart.limit is not None:
        value, said = chart.limit
        parts.append(_line(x_0, y(value), x_1, y(value), INK, 'stroke-dasharray="5 4"'))
        parts.append(_text(x_1 - 3, y(value) - 5, said, f'{TICK} text-anchor="end"'))
    for number, (name, points) in enumerate(chart.lines.items()):
        colour = COLOURS[number]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>\n'
        )
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>\n' for a, b in points
        ]
        at_y = y_1 + 16 + 15 * number
        parts.append(_line(x_0 + 8, at_y - 4, x_0 + 26, at_y - 4, colour, 'stroke-width="2"'))
        parts.append(_text(x_0 + 31, at_y, name, TICK))
    return "".join(parts)


def _place(value: float, ticks: Sequence[float]) -> float:
    """From 0 at the first tick to 1 at the last."""
    first, last = math.log10(ticks[0]), math.log10(ticks[-1])
    return (math.log10(max(value, ticks[0])) - first) / (last - first)


def _line(x_0: float, y_0: float, x_1: float, y_1: float, colour: str, more: str = "") -> str:
    ends = f'x1="{x_0:.1f}" y1="{y_0:.1f}" x2="{x_1:.1f}" y2="{y_1:.1f}"'
    return f'<line {ends} stroke="{colour}" {more}/>\n'


def _text(x: float, y: float, text: str, more: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>\n'
