"""How events reach the user: plain lines, one JSON object a line, or a live view."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import trio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from meshnode.cli.shown import shown
from meshnode.errors import MeshError
from meshnode.events import Event, Kind
from meshnode.pipeline.wording import layers_text

REFRESH_INTERVAL_S = 0.25
_MAX_LIVE_LINES = 12
_DONE_TITLES = {"leasing": "digested", "loading": "loaded"}

Status = Callable[[], Mapping[str, Any]]


class View(Protocol):
    """What a node's user sees."""

    def emit(self, event: Event) -> None: ...

    async def run(self, status: Status, /) -> None:
        """Keeps what is shown up to date, until cancelled."""
        ...


def choose_view(log_format: str) -> View:
    """`json`, `plain`, or `auto`: live on a terminal, plain elsewhere."""
    if log_format == "json":
        return JsonView()
    if log_format == "plain" or sys.stdout is None or not sys.stdout.isatty():
        return PlainView()
    return LiveView(Console())


class OutputClosed(MeshError):
    """Nobody can read what the node says."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"the standard output cannot be written to ({error.strerror}): redirect it elsewhere"
        )


def _print(line: str) -> None:
    """A line at once. A closed output (`>&-`) is the user's wish; one that breaks ends the node,
    since its invite and its warnings would be lost."""
    if sys.stdout is None:
        return
    try:
        print(line, flush=True)
    except OSError as error:
        raise give_up_output(error) from None


def give_up_output(error: OSError) -> OutputClosed:
    """Nothing more is written: Python would try at its end, and show a traceback then."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return OutputClosed(error)


class JsonView:
    """One JSON object a line."""

    def emit(self, event: Event) -> None:
        record = {"time": round(time.time(), 3), "event": event.kind.value, "text": event.text}
        _print(json.dumps(record | dict(event.data), default=str))

    async def run(self, _status: Status, /) -> None:
        await trio.sleep_forever()


class PlainView:
    """One line an event."""

    def emit(self, event: Event) -> None:
        mark = "warning: " if event.kind is Kind.WARNING else ""
        _print(mark + shown(event.text))

    async def run(self, _status: Status, /) -> None:
        await trio.sleep_forever()


class LiveView:
    """I draw what the node is doing: peers, layers, load progress, speed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: list[Text] = []

    def emit(self, event: Event) -> None:
        if event.kind in (Kind.INVITE, Kind.REPLY):  # must stay on screen, whole, to be copied
            self._console.print(event.text, soft_wrap=True, highlight=False, markup=False)
            return
        if event.kind is Kind.PROGRESS:
            return  # the tables have it
        style = "yellow" if event.kind is Kind.WARNING else ""
        self._lines = [*self._lines, Text(shown(event.text), style=style)][-_MAX_LIVE_LINES:]

    async def run(self, status: Status, /) -> None:
        # Drawn from here and not from rich's own thread: the status is trio's to read.
        with Live(console=self._console, auto_refresh=False) as live:
            try:
                while True:
                    live.update(self.render(status()), refresh=True)
                    await trio.sleep(REFRESH_INTERVAL_S)
            finally:
                live.update(self.render(status()), refresh=True)

    def render(self, status: Mapping[str, Any]) -> Group:
        parts: list[Any] = list(self._lines)
        if status.get("peers"):
            parts.append(_peers(status))
        if status.get("layers"):
            parts.append(_layers(status))
        return Group(*parts, _footer(status))


def _peers(status: Mapping[str, Any]) -> Table:
    titles = ("peer", "link", "address", "path", "RTT", "loss", "sent", "received")
    table = Table(*titles, box=None, padding=(0, 2))
    for peer in status.get("peers", ()):
        _add_row(
            table,
            str(peer.get("name")),
            str(peer.get("link") or "-"),
            str(peer.get("address") or "-"),
            path_text(peer),
            ms_text(peer.get("rtt_ms")),
            loss_text(peer.get("loss")),
            bytes_text(peer.get("bytes_out")),
            bytes_text(peer.get("bytes_in")),
        )
    return table


def path_text(link: Mapping[str, Any]) -> str:
    relayed = link.get("relayed")
    return "-" if relayed is None else "relayed" if relayed else "direct"


def ms_text(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.1f} ms"


def loss_text(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def bytes_text(size_bytes: int | None) -> str:
    if size_bytes is not None and size_bytes < 2**20:
        return f"{size_bytes / 2**10:.1f} KiB"
    return _mebibytes(size_bytes)


def _add_row(table: Table, *cells: str) -> None:
    """Cells as text: a name from a peer may look like rich's markup. Cells too many are left."""
    table.add_row(*(Text(cell) for cell in cells[: len(table.columns)]))


def _layers(status: Mapping[str, Any]) -> Table:
    done = {worker["node"]: worker for worker in status.get("health", {}).get("workers", ())}
    table = Table("node", "device", "layers", "weights", box=None, padding=(0, 2))
    shows_done = bool(done)
    if shows_done:
        table.add_column(_DONE_TITLES.get(status["health"].get("stage"), "done"))
    for share in status.get("layers", ()):
        layers = layers_text(share["first"], share["last"], bool(share.get("output")))
        weights = _mebibytes(share.get("weight_bytes"))
        # A node with several devices has a row for each, and tells of all of them together.
        told = progress_text(done.pop(share["node"], None)) if shows_done else ""
        _add_row(table, share["node"], share["device"], layers, weights, told)
    return table


def progress_text(worker: Mapping[str, Any] | None) -> str:
    """`12.0 MiB of 48.0 MiB (25%)`"""
    if worker is None:
        return ""
    done_bytes, total_bytes = worker["done_bytes"], worker["total_bytes"]
    if not total_bytes:
        return _mebibytes(done_bytes)
    return f"{_mebibytes(done_bytes)} of {_mebibytes(total_bytes)} ({done_bytes / total_bytes:.0%})"


def _footer(status: Mapping[str, Any]) -> Text:
    health = status.get("health", {})
    progress = health.get("progress")
    line = f"{health.get('stage', '')}"
    if progress is not None and health.get("stage") != "ready":
        line += f" {progress:.0%}"
    if status.get("tokens_per_s"):
        line += f"   {status['tokens_per_s']:.1f} tok/s"
    return Text(line, style="bold")


def _mebibytes(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / 2**20:.1f} MiB"
