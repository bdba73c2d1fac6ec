"""The figures of a trace: as lines of text, and as values for programs. Sans-IO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

from meshnode.trace.reading import Choice, FirstReading, client_of
from meshnode.trace.records import Role
from meshnode.trace.scene import Scene
from meshnode.trace.spans import Tally
from meshnode.trace.text import fit
from meshnode.trace.wording import bytes_text, ms_number, ms_text

MAX_COMMANDS_SHOWN = 30
_NAME_WIDTH = 26
_COLUMN_WIDTH = 17


@dataclass(frozen=True)
class Column:
    """One stretch's figures. Counters are by command."""

    title: str
    dur_ns: int
    messages: int
    writes: int
    bytes_up: int
    bytes_down: int
    round_trips: int
    rounds: int
    wait_ns: int
    sends: Mapping[str, int]
    waits: Mapping[str, int]


def columns(choice: Choice, scene: Scene, readings: Sequence[FirstReading]) -> list[Column]:
    """The load's, the drawn decode's, the median's; none without a client's trace."""
    client = client_of(readings)
    if client is None:
        return []
    spans = client.spans
    first = spans.decode(1)
    shown = [_of_tally("load", first.t_ns if first else client.last_ns, spans.load)]
    if choice.decode is not None:
        shown.append(_of_tally(choice.name, choice.decode.dur_ns, scene.tally()))
    if typical := spans.typical():
        figures = {**vars(typical)}
        del figures["batch"], figures["decodes"]
        shown.append(Column(title=f"median of {typical.decodes:,}", **figures))
    return shown


def _of_tally(title: str, dur_ns: int, tally: Tally) -> Column:
    return Column(
        *(title, dur_ns, tally.messages, tally.writes, tally.bytes_up, tally.bytes_down),
        *(tally.round_trips, tally.depth.reached, tally.wait_ns, tally.sends, tally.waits),
    )


def table_lines(shown: Sequence[Column]) -> list[str]:
    if not shown:
        return []
    rows = [
        ("", [column.title for column in shown]),
        ("ms", [ms_number(column.dur_ns) for column in shown]),
        ("messages sent", [f"{column.messages:,}" for column in shown]),
        ("system calls that write", [f"{column.writes:,}" for column in shown]),
        ("bytes up", [bytes_text(column.bytes_up) for column in shown]),
        ("bytes down", [bytes_text(column.bytes_down) for column in shown]),
        ("synchronous round trips", [f"{column.round_trips:,}" for column in shown]),
        ("  one after another", [f"{column.rounds:,}" for column in shown]),
        ("ms waited", [ms_number(column.wait_ns) for column in shown]),
    ]
    lines = [_line(name, cells) for name, cells in rows]
    return [*lines, "", *_by_command(shown)]


def _by_command(shown: Sequence[Column]) -> list[str]:
    """How often each was sent, and in brackets how often it was waited for."""
    weight: dict[str, int] = {}
    for column in shown:
        for counter in (column.sends, column.waits):
            for command, times in counter.items():
                weight[command] = weight.get(command, 0) + times
    commands = sorted(weight, key=lambda command: (-weight[command], command))
    lines = [_line("sent (waited for)", [column.title for column in shown])]
    for command in commands[:MAX_COMMANDS_SHOWN]:
        lines.append(_line(command, [_times(column, command) for column in shown]))
    if len(commands) > MAX_COMMANDS_SHOWN:
        lines.append(f"and {len(commands) - MAX_COMMANDS_SHOWN:,} more commands")
    return lines


def _times(column: Column, command: str) -> str:
    waits = column.waits.get(command, 0)
    return f"{column.sends.get(command, 0):,}" + (f" ({waits:,})" if waits else "")


def _line(name: str, cells: Sequence[str]) -> str:
    return (fit(name, _NAME_WIDTH) + "".join(f"{cell:>{_COLUMN_WIDTH}}" for cell in cells)).rstrip()


def hop_lines(scene: Scene, endpoints: Mapping[int, str]) -> list[str]:
    """By connection: how long requests and answers were on their way."""
    lines = []
    for conn, figures in hop_figures(scene).items():
        name = fit(f"{conn} {endpoints.get(conn, '')}".strip(), _NAME_WIDTH)
        text = f"{name} there {ms_text(figures['there_ns'])}"
        if figures["back_ns"] is not None:
            text += f", back {ms_text(figures['back_ns'])}"
        lines.append(f"{text} (medians; requests: {figures['requests']:,})")
    return lines


def hop_figures(scene: Scene) -> dict[int, dict[str, Any]]:
    by_conn: dict[int, list[tuple[int, int | None]]] = {}
    for hop in scene.hops:
        by_conn.setdefault(hop.conn, []).append((hop.there_ns, hop.back_ns))
    figures = {}
    for conn, ways in sorted(by_conn.items()):
        backs = [back for _, back in ways if back is not None]
        figures[conn] = {
            "requests": len(ways),
            "there_ns": median_low([there for there, _ in ways]),
            "back_ns": median_low(backs) if backs else None,
        }
    return figures


def notes(
    choice: Choice, scene: Scene, readings: Sequence[FirstReading], paths: Sequence[str]
) -> list[str]:
    """What a reader should know before believing the rest."""
    said = []
    for reading, path in zip(readings, paths, strict=True):
        if reading.reader.broken_lines:
            said.append(f"{path}: {reading.reader.broken_lines:,} broken lines were passed over")
        if reading.reader.is_cut_off:
            said.append(f"{path}: its last line has no end and was passed over")
        if reading.reader.runs > 1:
            said.append(f"{path}: {reading.reader.runs:,} runs wrote to it; this is the last one")
        if shift_ns := choice.shifted_ns.get(reading.file):
            said.append(
                f"{path}: its clock disagrees with the client's; moved by {ms_text(shift_ns)}, so "
                "that a message's two ways take equally long"
            )
    if scene.left_out:
        said.append(f"{scene.left_out:,} events more than can be drawn were left out")
    return said


def json_report(
    choice: Choice, scene: Scene, readings: Sequence[FirstReading], paths: Sequence[str]
) -> dict[str, Any]:
    """Everything, ready for JSON. Times in ns; those of events since the stretch's begin."""
    client = client_of(readings)
    typical = client.spans.typical() if client else None
    return {
        "files": [
            {
                "path": path,
                "role": reading.header.role.value,
                "pid": reading.header.pid,
                "events": reading.records,
                "runs": reading.reader.runs,
                "broken_lines": reading.reader.broken_lines,
                "cut_off": reading.reader.is_cut_off,
                "shifted_ns": choice.shifted_ns.get(reading.file, 0),
            }
            for reading, path in zip(readings, paths, strict=True)
        ],
        "shown": {
            "name": choice.name,
            "decode": choice.decode and asdict(choice.decode),
            "begin_ns": choice.stretch.begin_ns,
            "length_ns": scene.length_ns,
            "split": asdict(scene.split()),
            "left_out": scene.left_out,
        },
        "decodes": client.spans.decodes if client else 0,
        "typical": typical and asdict(typical),
        "columns": [_column_facts(column) for column in columns(choice, scene, readings)],
        "hops": {str(conn): figures for conn, figures in hop_figures(scene).items()},
        "events": [
            {
                "begin_ns": event.begin_ns,
                "file": event.file,
                "conn": event.conn,
                **event.record._asdict(),
                "client": event.role is Role.CLIENT,
            }
            for event in scene.events
        ],
    }


def _column_facts(column: Column) -> dict[str, Any]:
    return {**vars(column), "sends": dict(column.sends), "waits": dict(column.waits)}
