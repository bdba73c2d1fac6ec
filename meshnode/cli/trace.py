"""`mesh trace`: where a token's time goes, from what the engine wrote to GGML_RPC_TRACE."""

from __future__ import annotations

import json
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from meshnode.cli.shown import shown_cell
from meshnode.errors import ResourceError, UsageError
from meshnode.trace.reading import (
    Choice,
    FirstReading,
    SecondReading,
    choose,
    client_of,
)
from meshnode.trace.records import NotATrace
from meshnode.trace.rows import Row, make_rows
from meshnode.trace.scene import Scene, make_scene
from meshnode.trace.svg import draw_svg
from meshnode.trace.tables import columns, hop_lines, json_report, notes, table_lines
from meshnode.trace.text import WIDTH, describe_split, draw_text, list_events

CHUNK_BYTES = 1 << 20
MAX_FILES = 256
_ASCII = str.maketrans({"█": "#", "·": ".", "…": "~", "×": "x", "\N{REPLACEMENT CHARACTER}": "?"})


@dataclass(frozen=True)
class Source:
    """One file, as long as it was at first: who writes it may go on."""

    path: Path
    size_bytes: int


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--token",
    type=click.IntRange(1),
    help="Show the N-th decode of the trace. Default: the one of median length.",
    metavar="N",
)
@click.option("--load", is_flag=True, help="Show the load: from the start to the first decode.")
@click.option("--svg", type=click.Path(path_type=Path), help="Also draw it into this file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def trace(
    files: tuple[Path, ...], token: int | None, load: bool, svg: Path | None, as_json: bool
) -> None:
    """Show where a token's time goes.

    FILES are what an engine wrote with GGML_RPC_TRACE set: llama-server's, and those of the
    ggml-rpc-servers on the same machine, if there are any.
    """
    if token is not None and load:
        raise UsageError("--token and --load show different things: give one of them")
    if len(files) > MAX_FILES:
        raise UsageError(f"{len(files)} files are too many: at most {MAX_FILES} at once")
    if svg is not None and svg.resolve() in [path.resolve() for path in files]:
        raise UsageError(f"--svg {svg} is one of the traces: name another file")
    sources = [_source(path) for path in files]
    readings = [_read_first(number, source) for number, source in enumerate(sources)]
    choice = choose(readings, token=token, load=load)
    scene = _read_again(readings, sources, choice)
    rows = _rows(scene, readings)
    if svg is not None:
        _write(svg, draw_svg(scene, rows, choice.title, describe_split(scene)))
    paths = [_shown(path) for path in files]
    if as_json:
        click.echo(json.dumps(json_report(choice, scene, readings, paths)))
    else:
        _show(_lines(choice, scene, rows, readings, paths))


def _source(path: Path) -> Source:
    with _told(path):
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise UsageError(f"{_shown(path)} is {kind}: a trace is read twice, so save it to one")
        return Source(path, facts.st_size)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except NotATrace as error:
        raise UsageError(f"{_shown(path)} {error}") from None
    except OSError as error:
        raise UsageError(f"{_shown(path)} cannot be read: {error.strerror}") from None


def _shown(path: Path) -> str:
    return shown_cell(str(path))


def _read_first(number: int, source: Source) -> FirstReading:
    reading = FirstReading(number)
    with _told(source.path):
        _read(source, reading.receive)
        reading.finish()
    return reading


def _read_again(
    readings: Sequence[FirstReading], sources: Sequence[Source], choice: Choice
) -> Scene:
    clippings = []
    for reading, source in zip(readings, sources, strict=True):
        second = SecondReading(reading, choice)
        with _told(source.path):
            _read(source, second.receive)
        clippings.append(second.clipping)
    return make_scene(choice.stretch, clippings, choice.pairs)


def _read(source: Source, receive: Callable[[bytes], None]) -> None:
    with source.path.open("rb") as file:
        for data in _chunks(file, source.size_bytes):
            receive(data)


def _chunks(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    left_bytes = size_bytes
    while data := file.read(min(CHUNK_BYTES, left_bytes)):
        left_bytes -= len(data)
        yield data


def _endpoints(readings: Sequence[FirstReading]) -> dict[int, str]:
    client = client_of(readings)
    return {one.number: one.endpoint for one in client.book.connections.values()} if client else {}


def _rows(scene: Scene, readings: Sequence[FirstReading]) -> list[Row]:
    return make_rows(scene, _endpoints(readings), [reading.name for reading in readings])


def _lines(
    choice: Choice,
    scene: Scene,
    rows: Sequence[Row],
    readings: Sequence[FirstReading],
    paths: Sequence[str],
) -> Iterator[str]:
    names = [reading.name for reading in readings]
    yield choice.title
    if client_of(readings):
        yield from textwrap.wrap(describe_split(scene), WIDTH)
    yield from ("", *draw_text(scene, rows))
    if hops := hop_lines(scene, _endpoints(readings)):
        yield from ("", "on the way", *hops)
    if table := table_lines(columns(choice, scene, readings)):
        yield from ("", *table)
    listed = scene.events if choice.decode else scene.round_trips()
    if listed:
        yield from ("", *list_events(listed, scene, names))
    for note in notes(choice, scene, readings, paths):
        yield f"note: {note}"


def _show(lines: Iterator[str]) -> None:
    text = "\n".join(lines)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode("ascii", "replace").decode()
    click.echo(text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"{_shown(path)} cannot be written ({error.strerror}): name another file after --svg"
        ) from None
